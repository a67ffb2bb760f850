"""NSR, PSR and W-REINFORCE: the table of advantages, and what is left out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trajkern.recipes.nsr import KINDS, advantages

SCORES = [1.0, 0.0, 1.0, 0.5, -1.0]
TABLE = {
    "psr": ([1, 0, 1, 0, 0], [True, False, True, False, False]),
    "nsr": ([0, -1, 0, 0, 0], [False, True, False, False, False]),
    "w_reinforce": ([0.1, -1, 0.1, 0.5, -1], [True] * 5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_literal(kind: str, device: str) -> None:
    out, keep = advantages(torch.tensor(SCORES, device=device), kind=kind)
    expected, trained = TABLE[kind]
    assert torch.equal(out.cpu(), torch.tensor(expected, dtype=torch.float32)) and keep.tolist() == trained


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(SCORES)), st.sampled_from(KINDS), st.sampled_from([0.0, 0.1, 1.0]))
def test_matches_a_plain_loop(scores: list[float], kind: str, weight: float) -> None:
    out, keep = advantages(torch.tensor(scores, dtype=torch.float64), kind=kind, positive_weight=weight)
    if kind == "w_reinforce":
        expected = [weight if s == 1 else -1 if s == 0 else s for s in scores]
        assert all(keep.tolist())
    else:
        side = 1 if kind == "psr" else 0
        expected = [s - (1 - side) if s == side else 0 for s in scores]
        assert keep.tolist() == [s == side for s in scores]
    assert out.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    out, keep = advantages(torch.tensor([1, 0, 1], dtype=dtype), kind="nsr")
    assert out.tolist() == [0, -1, 0] and keep.tolist() == [False, True, False]
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_nothing_left_and_nothing_given() -> None:
    assert not advantages(torch.ones(3), kind="nsr")[1].any()
    assert advantages(torch.zeros(0), kind="psr")[0].shape == (0,)


@pytest.mark.parametrize(
    ("correct", "options", "error", "message"),
    [
        (torch.ones(2), {"kind": "grpo"}, ValueError, "kind must be one of 'psr', 'nsr', 'w_reinforce'"),
        (torch.ones(2), {"kind": "psr", "positive_weight": -0.1}, ValueError, "positive_weight must be at least 0"),
        (torch.ones(2, 2), {"kind": "psr"}, ValueError, "correct must have 1 dimension"),
        (torch.tensor([1, math.nan]), {"kind": "w_reinforce"}, ValueError, "correct must be finite"),
        ([1, 0], {"kind": "psr"}, TypeError, "correct must be a tensor"),
    ],
)
def test_refuses(correct, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        advantages(correct, **options)
