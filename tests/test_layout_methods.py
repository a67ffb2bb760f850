"""What layouts' methods are called with: the same hostile values as functions' arguments, and the same rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trajkern as tk
from tests.attack.case import Case, of_function, outcome
from trajkern._memory import shown

X, FLAGS = torch.arange(4.0), torch.tensor([False, True, False, True])
BATCH = tk.PackedBatch(torch.arange(4), torch.tensor([0, 2, 4]), FLAGS, torch.zeros(2, dtype=torch.int64))
TREE = tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([2, 1, 1]))
CALLS: list[tuple[Callable[..., Any], dict[str, Any], dict[str, str]]] = [
    (BATCH.to_padded, {"x": X, "length": 3}, {"length": "int | None"}),
    (BATCH.padded_index, {"length": 3}, {}),
    (tk.PackedBatch.concatenate, {"batches": [BATCH], "groups": "apart"}, {}),
    (TREE.pairs, {"tokens": torch.arange(4)}, {}),
    (TREE.leaf_weights, {"mask": FLAGS, "aggregate": "token_mean"}, {}),
    (TREE.along_paths, {"per_node": torch.arange(3)}, {}),
    (TREE.attention_mask, {"dense": True}, {}),
    (TREE.pruned, {"leaves": torch.tensor([True, False])}, {}),
    (tk.Paths(TREE, X[:2]).to, {"device": "cpu"}, {"device": "device"}),
]
CASES = [
    case
    for method, arguments, kinds in CALLS
    for case in of_function(method.__qualname__, method, arguments, kinds)
    if case.label
    not in (
        "value: nan",
        "value: inf",
        "value: True",
        "max_length: 4611686018427387904",
        "max_length: 63 bits",
    )  # legal
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}, {case.label}")
def test_a_method(case: Case) -> None:
    assert not outcome(case).fault


@pytest.mark.parametrize("index", [slice("a", "b"), slice(None, None, 0), slice(0.5), "x", object, [None], [0, True]])
def test_an_index(index: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="index must be"):
        BATCH[index]


@pytest.mark.parametrize("side", ["up", None, 0, b"left"])
def test_a_side(side: Any) -> None:
    for call in (lambda: BATCH.padded_index(3, side), lambda: BATCH.to_padded(X, side=side)):
        with pytest.raises(ValueError, match="side must be one of 'left', 'right'"):
            call()


def test_too_short_rows() -> None:
    for length in (1, -1):
        with pytest.raises(ValueError, match="length must be at least the longest trajectory's 2, got"):
            BATCH.padded_index(length)


@pytest.mark.parametrize("x", [X, X.long(), X.half(), X > 1])
@pytest.mark.parametrize("value", [0, True, 1.5, -100, float("nan"), float("-inf"), 1e6, 2**40, 10**30])
def test_a_padding_is_what_the_dtype_holds(x: torch.Tensor, value: float) -> None:
    """Or refused: no number stands for another."""
    try:
        padded = BATCH.to_padded(x, length=3, value=value)[0, 2].item()
    except ValueError as error:
        assert str(error).startswith(f"value must be one that {str(x.dtype).removeprefix('torch.')} holds")
        assert not (x.is_floating_point() and abs(value) < 100)
    else:
        assert padded == pytest.approx(float(value), rel=1e-3, nan_ok=True)


def test_an_error_reads_no_tensor() -> None:
    """A message says of one what it is: its memory may be gone."""
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    assert shown([freed, (1, {"a": freed})]) == "[float32[3] on cpu, (1, {'a': float32[3] on cpu})]"
    with pytest.raises(ValueError, match=r"side must be one of 'left', 'right'; got float32\[3\] on cpu"):
        BATCH.padded_index(3, freed)  # type: ignore[arg-type]
