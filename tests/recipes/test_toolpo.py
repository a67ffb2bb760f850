"""ToolPO: the tool reward reaches the acting tokens only; by hand and against a plain loop."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trajkern import Spans
from trajkern.recipes.toolpo import (
    action_mask,
    action_rewards,
    answered,
    fold_preference,
    group_preference,
    token_advantages,
)

# rollouts 0 and 1 share a prompt, rollout 2 is alone; rollout 1 has no token
ARGUMENTS = {
    "success": torch.tensor([1.0, 0.0, 1.0]),
    "action": torch.tensor([2.0, 1.0, 3.0]),
    "group_ids": torch.tensor([4, 4, 5]),
    "action_mask": torch.tensor([False, True, True, True]),
    "cu_seqlens": torch.tensor([0, 3, 3, 4]),
}


def call(**change: Tensor) -> Tensor:
    return token_advantages(**(ARGUMENTS | change))


def test_literal(device: str) -> None:
    out = call(**{name: x.to(device) for name, x in ARGUMENTS.items()})
    assert out.tolist() == [0.5, 1.0, 1.0, 0.0] and out.dtype == torch.float32


def test_action_rewards(device: str) -> None:
    calls, preference = torch.tensor([0.0, 2.0], device=device), torch.tensor([0.5, -0.25], device=device)
    assert action_rewards(calls, preference).tolist() == [0.5, 1.75]
    assert action_rewards(calls, preference, call_weight=0.5, preference_weight=2).tolist() == [1.0, 0.5]


def test_fold_preference() -> None:
    direct, folded = torch.tensor([300.0, 100.0, 0.0, 5.0]), torch.tensor([100.0, 300.0, 0.0, 0.0])
    assert fold_preference(direct, folded).tolist() == [0.5, -0.5, 0.0, 1.0]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 2), st.lists(st.booleans(), max_size=4)),
        max_size=10,
    )
)
def test_matches_a_plain_loop(rows: list[tuple]) -> None:
    def centred(i: int, field: int) -> float:
        peers = [row[field] for row in rows if row[2] == rows[i][2]]
        return rows[i][field] - statistics.fmean(peers) if len(peers) > 1 else 0.0

    expected = [centred(i, 0) + m * centred(i, 1) for i, row in enumerate(rows) for m in row[3]]
    double = {"dtype": torch.float64}
    out = token_advantages(
        torch.tensor([r[0] for r in rows], **double),
        torch.tensor([r[1] for r in rows], **double),
        torch.tensor([r[2] for r in rows], dtype=torch.int64),
        torch.tensor([m for r in rows for m in r[3]], dtype=torch.bool),
        torch.tensor([0] + [len(r[3]) for r in rows]).cumsum(0),
    )
    torch.testing.assert_close(out, torch.tensor(expected, **double), rtol=1e-9, atol=1e-9)


def test_no_attribution_without_acting_tokens() -> None:
    out = call(action_mask=torch.zeros(4, dtype=torch.bool))
    assert out.tolist() == [0.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float64])
def test_counts_may_be_integers(dtype: torch.dtype) -> None:
    """Every count, with the numbers of floats; bool and integers come out as float32."""
    result = torch.float64 if dtype == torch.float64 else torch.float32
    ones = torch.tensor([1, 0, 1]).to(dtype)
    out = call(success=ones, action=ones)
    assert out.tolist() == [0.5, 1.0, 1.0, 0.0] and out.dtype == result
    reward = action_rewards(ones, ones, preference_weight=0.5)
    assert reward.tolist() == [1.5, 0.0, 1.5] and reward.dtype == result
    lengths = torch.tensor([1, 1, 0]).to(dtype)
    assert fold_preference(lengths, ones).tolist() == [0.0, 1.0, -1.0]
    assert group_preference(ones, torch.tensor([True, False, False]), torch.tensor([4, 4, 5])).dtype == result


def test_group_preference(device: str) -> None:
    """The first prompt's direct rollouts took 300 tokens on average; the second's all fold; the third's none does."""
    rows = [(100, True, 4), (200, False, 4), (400, False, 4), (500, True, 4), (9, True, 5), (7, True, 5), (3, False, 6)]
    lengths, folded, groups = (torch.tensor(x, device=device) for x in zip(*rows, strict=True))
    assert group_preference(lengths, folded, groups).tolist() == [0.5, 0.0, 0.0, -0.25, 0.0, 0.0, 0.0]


def test_action_mask() -> None:
    def of(start: list[int], end: list[int]) -> Spans:
        at = torch.arange(len(start))
        return Spans(torch.tensor(start), torch.tensor(end), torch.zeros_like(at), at, 6)

    calls, folds = of([1, 4], [2, 5]), of([4], [6])
    assert action_mask(calls).tolist() == [False, True, False, False, True, False]
    assert action_mask(calls, folds).tolist() == [False, True, False, False, True, True]
    with pytest.raises(ValueError, match="action_mask needs the spans of tool calls"):
        action_mask()
    with pytest.raises(TypeError, match="spans must be trajkern.Spans"):
        action_mask(torch.ones(6) > 0)
    other = Spans(torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.tensor([0]), 5)
    with pytest.raises(ValueError, match="spans must be of the same tokens; they are of 6 and 5"):
        action_mask(calls, other)


def test_a_simulated_tool() -> None:
    table = {"price(tea)": "4"}
    assert answered(lambda call: table.get(call, "error: no such item"), "price(tea)") == "4"
    assert answered(lambda call: table.get(call, "error: no such item"), "price(") == "error: no such item"
    with pytest.raises(TypeError, match=r"simulate must return a string, got None \(NoneType\) for the call 'x'"):
        answered(table.get, "x")
    with pytest.raises(TypeError, match="simulate must be a function of a call, got"):
        answered("tool", "x")
    with pytest.raises(TypeError, match="call must be a string, got 3"):
        answered(str, 3)
    with pytest.raises(KeyError):
        answered(table.__getitem__, "x")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: call(success=torch.ones(2)), ValueError, r"success must have shape \[3\] \(one a trajectory\)"),
        (lambda: call(action_mask=torch.ones(4)), TypeError, "action_mask must have dtype bool"),
        (lambda: call(cu_seqlens=torch.tensor([0, 3, 3, 5])), ValueError, "cu_seqlens must run from 0 to the 4 tokens"),
        (lambda: call(cu_seqlens=torch.tensor([0, 3, 2, 4])), ValueError, "cu_seqlens must never decrease"),
        (lambda: call(group_ids=torch.tensor([4, 4])), ValueError, r"group_ids must have shape \[3\]"),
        (lambda: action_rewards(torch.tensor([-1.0]), torch.zeros(1)), ValueError, "correct_calls must be at least 0"),
        (lambda: action_rewards(torch.ones(2), torch.zeros(1)), ValueError, r"preference must have shape \[2\]"),
        (lambda: action_rewards(torch.ones(1), torch.zeros(1), call_weight=-1), ValueError, "call_weight must be at"),
        (
            lambda: group_preference(torch.tensor([-1]), torch.tensor([True]), torch.tensor([0])),
            ValueError,
            "lengths must be at least 0",
        ),
        (lambda: fold_preference(torch.ones(1), -torch.ones(1)), ValueError, "folded_lengths must be at least 0"),
    ],
)
def test_refuses(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
