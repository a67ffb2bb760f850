"""Every published normalisation of rewards, as arguments of the one function, on groups [1, 3], [2, 2] and [4]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from trajkern import reference


def tensor(x: Sequence[float]) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


R, G = tensor([1, 3, 2, 2, 4]), torch.tensor([0, 0, 1, 1, 2])
SQRT2 = math.sqrt(2.0)


def check(expected: Sequence[float], rewards: Tensor = R, **options) -> None:
    actual = reference.group_advantages(rewards, G, **options)
    assert actual.tolist() == pytest.approx(expected, rel=1e-12, abs=0)


def test_tree_grpo() -> None:
    a = 1 / (SQRT2 + 1e-6)
    check([-a, a, 0, 0, 4 / (1 + 1e-6)])


def test_tree_grpo_intra_plus_inter() -> None:
    """The leaves' group norm over the prompt plus that over the tree."""
    prompt = torch.zeros(5, dtype=torch.int64)
    both = sum(reference.group_advantages(R, g) for g in (prompt, G))
    std = math.sqrt((1.4**2 + 0.6**2 + 2 * 0.4**2 + 1.6**2) / 4) + 1e-6  # mean 2.4
    a, lone = 1 / (SQRT2 + 1e-6), 4 / (1 + 1e-6)
    expected = [-1.4 / std - a, 0.6 / std + a, -0.4 / std, -0.4 / std, 1.6 / std + lone]
    assert both.tolist() == pytest.approx(expected, rel=1e-12)


def test_tree_per_token() -> None:
    """Statistics pooled over the tokens of trajectories of 3, 1, 5, 2 and 1 tokens; one lone token gets 0."""
    std = math.sqrt((3 * 0.5**2 + 1.5**2) / 3) + 1e-6  # mean (3*1 + 3)/4
    check([-0.5 / std, 1.5 / std, 0, 0, 0], weights=tensor([3, 1, 5, 2, 1]), singleton="zero")


def test_belief_turns() -> None:
    """Groups of (prompt, turn): a finished rollout's zero is in the statistics."""
    rewards = tensor([[1.0, 0.5], [3.0, 0.0]])  # [rollout, turn]; the second ends after its first turn
    turns = torch.tensor([[0, 1], [0, 1]])
    actual = reference.group_advantages(rewards.flatten(), turns.flatten())
    a, b = 1 / (SQRT2 + 1e-6), 0.25 / (math.sqrt(0.125) + 1e-6)
    assert actual.tolist() == pytest.approx([-a, b, a, -b], rel=1e-12)


def test_rlcr() -> None:
    check([-1, 1, 0, 0, 0], scale="none", singleton="zero")


def test_toolpo() -> None:
    """Success everywhere, plus the action reward where the mask of tool calls is set."""
    success, action = (
        reference.group_advantages(r, G, scale="none", singleton="zero") for r in (R, tensor([0, 1, 0, 0.5, 1]))
    )
    on_tools = success + tensor([1, 0, 0, 1, 1]) * action
    assert on_tools.tolist() == [-1.5, 1, 0, 0.25, 0]


def test_treepo() -> None:
    """Centred by id prefix at each depth (a lone prefix is kept raw at depth 0, left out below), then whitened."""
    root = torch.tensor([0, 0, 0, 0, 1])
    centred = reference.group_advantages(R, root, scale="none", singleton="raw")
    below = reference.group_advantages(R, G, scale="none", singleton="zero")
    total = centred + below
    assert total.tolist() == [-2, 2, 0, 0, 4]
    std = math.sqrt((2.8**2 + 1.2**2 + 2 * 0.8**2 + 3.2**2) / 4 + 1e-8)  # mean 0.8
    expected = [-2.8 / std, 1.2 / std, -0.8 / std, -0.8 / std, 3.2 / std]
    assert reference.whiten(total, eps=1e-8).tolist() == pytest.approx(expected, rel=1e-12)


def test_treerl() -> None:
    check([-2, 2, 0, 0, 0], baseline="leave_one_out", scale="none", singleton="zero")


@pytest.mark.parametrize("scale", ["none", "std"])
def test_spo_tree(scale: str) -> None:
    """The parent's value is the centre, the children's population std the scale."""
    parent = tensor([1.5, 1.5, 2, 2, 4])
    std = {"none": 1.0, "std": 1 + 1e-8}[scale]
    check(
        [-0.5 / std, 1.5 / std, 0, 0, 0],
        R - parent,
        baseline="none",
        scale=scale,
        ddof=0,
        eps=1e-8,
        singleton="zero",
    )


def test_gigpo() -> None:
    """Step advantages inside an anchor state: a lone anchor gives 0; episode advantages: raw."""
    check([-1, 1, 0, 0, 0], scale="none", singleton="zero")
    check([-1, 1, 0, 0, 4], scale="none", singleton="raw")
    a = 1 / (SQRT2 + 1e-6)
    check([-a, a, 0, 0, 0], singleton="zero")


def test_openclaw_step_wise() -> None:
    """Population std; a lone step is raw; a constant bucket is 0, and leaves the loss by its mask."""
    a = 1 / (1 + 1e-6)
    check([-a, a, 0, 0, 4 * a], ddof=0)
    constant = reference.group_advantages(R, G, scale="none", singleton="raw") == 0
    assert constant.tolist() == [False, False, True, True, False]


def test_raw_rewards() -> None:
    check(R.tolist(), baseline="none", scale="none", singleton="zero")


@pytest.mark.parametrize("ddof", [0, 1])
def test_filtered_groups(ddof: int) -> None:
    """Prompts whose rewards do not differ are gated out; the others keep their own statistics."""
    a = 1 / (math.sqrt(2 / (2 - ddof)) + 1e-4)
    check([-a, a, 0, 0, 0], gate=torch.tensor([1, 1, 0, 0, 0]).bool(), ddof=ddof, eps=1e-4)
