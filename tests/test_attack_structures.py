"""The attack's mutations reach every node, and what reads one in silence is found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.attack.case import outcome
from tests.attack.mutated import GONE, mutations
from tests.attack.target import Target, same, target_cases

GIVEN = {"a": [SimpleNamespace(b=1, c=(torch.ones(2), "x"))], "d": {"e": 0.5}}


def test_every_node_is_reached_and_the_rest_is_left() -> None:
    paths = {x.path for x in mutations(GIVEN)}
    assert paths == {(), ("a",), ("a", 0), ("a", 0, "b"), ("a", 0, "c"), ("a", 0, "c", 0), ("a", 0, "c", 1)} | {
        ("d",),
        ("d", "e"),
    }
    gone = {x.path: x.value for x in mutations(GIVEN) if x.after is GONE}
    assert "d" not in gone["d",] and gone["d", "e"]["d"] == {} and not hasattr(gone["a", 0, "b"]["a"][0], "b")
    assert gone["d", "e"]["a"] == GIVEN["a"] and GIVEN["d"] == {"e": 0.5} and GIVEN["a"][0].b == 1


def _careless(given: Any) -> float:
    return sum(given["numbers"]) / 2


def _careful(given: Any) -> float:
    numbers = given.get("numbers") if isinstance(given, dict) else None
    if not isinstance(numbers, list) or len(numbers) != 2 or not {*map(type, numbers)} <= {int, float}:
        raise TypeError("numbers must be two numbers")
    if not all(abs(x) < 2**63 for x in numbers):
        raise ValueError("numbers must be finite")
    return sum(numbers) / 2


@pytest.mark.parametrize(("function", "faults"), [(_careless, True), (_careful, False)])
def test_what_reads_in_silence_is_found(function: Any, faults: bool) -> None:
    found = [outcome(x) for x in target_cases(Target("f", function, {"numbers": [1.5, 2.0]}, "numbers"))]
    assert not found[0].fault and len(found) > 50
    assert {x.fault for x in found if x.came == "result"} == ({"", "was accepted"} if faults else {""})
    assert any(x.fault.startswith("KeyError") for x in found) == faults


def test_results_are_the_same_in_their_types() -> None:
    assert same(
        [torch.tensor([1.0, float("nan")]), {"a": (1, 2.0)}], [torch.tensor([1.0, float("nan")]), {"a": (1, 2.0)}]
    )
    assert not same(1, 1.0) and not same(True, 1) and not same([1], [1, 2])
    assert not same(torch.ones(2), torch.ones(2, dtype=torch.float64))
