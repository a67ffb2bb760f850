"""No hostile call kills the process, gets through in silence or is refused without its name: a sample of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.attack.__main__ import SURFACES, attacked
from tests.attack.case import Case, outcome
from tests.attack.page import text

STEPS = {"functions": 23, "odd": 97, "pairs": 97, "credit": 11, "adapters": 17, "command": 29}


@pytest.mark.parametrize("surface", SURFACES)
def test_a_sample(surface: str) -> None:
    found = attacked(surface, STEPS[surface], heavy=False)
    assert len(found) > 50
    assert not [x for x in found if x.fault]


@pytest.mark.slow
@pytest.mark.parametrize("surface", SURFACES)
def test_all(surface: str) -> None:
    assert not [x for x in attacked(surface) if x.fault]


def _raise(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "came", "fault"),
    [
        (_raise(ValueError("x must be 1, got 2")), "ValueError", ""),
        (_raise(TypeError("xs must be 1, got 2")), "TypeError", "without the name x"),
        (_raise(RuntimeError("x must be 1")), "RuntimeError", "RuntimeError: x must be 1"),
        (lambda: None, "result", "was accepted"),
    ],
)
def test_what_is_good_enough(call: Callable[[], None], came: str, fault: str) -> None:
    found = outcome(Case("f", "x: 2", call, ("x",)))
    assert found.came == came and fault in found.fault and bool(found.fault) == bool(fault)


def test_a_call_that_kills_is_known_and_passed_over() -> None:
    found = attacked("killed")
    assert [(x.label, x.came) for x in found] == [
        ("first", "result"),
        ("second", "the process died"),
        ("third", "result"),
    ]
    page = text(found, {"killed": "what is killed"})
    assert "| `f` | 3 | 0 | 0 | 2 | 1 |" in page and "3 calls, 1 bad." in page
