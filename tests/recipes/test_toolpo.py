"""ToolPO: the tool reward reaches the acting tokens only; by hand and against a plain loop."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trajkern.recipes.toolpo import action_rewards, fold_preference, token_advantages

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
        (lambda: fold_preference(torch.ones(1), -torch.ones(1)), ValueError, "folded_lengths must be at least 0"),
    ],
)
def test_refuses(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
