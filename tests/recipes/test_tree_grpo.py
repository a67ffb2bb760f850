"""Tree-GRPO: two norms of a rollout, by hand and against a plain loop."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trajkern.recipes.tree_grpo import ESTIMATORS, leaf_advantages

# two prompts; the first has a tree of two leaves and a lone winner, the second a constant tree and a lone failure
REWARDS = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
TREES = [0, 0, 1, 2, 2, 3]
GROUPS = [7, 7, 7, 9, 9, 9]
A, B, H = 0.33333333 / 0.57735027, -0.66666667 / 0.57735027, 0.5 / 0.70710678
EXPECTED = {
    "tree": [A + H, B - H, A + 1, A, A, B],
    "tree_inner": [H, -H, 1, 0, 0, 0],
    "tree_2norm": [H, -H, A, 0, 0, B],
}


def norm(x: list[float], ids: list[int]) -> list[float]:
    out = []
    for value, key in zip(x, ids, strict=True):
        peers = [v for v, k in zip(x, ids, strict=True) if k == key]
        mean, std = (statistics.fmean(peers), statistics.stdev(peers)) if len(peers) > 1 else (0.0, 1.0)
        out.append((value - mean) / (std + 1e-6))
    return out


def plain(rewards: list[float], trees: list[int], groups: list[int], estimator: str) -> list[float]:
    if estimator == "tree_inner":
        return norm(rewards, trees)
    if estimator == "tree_2norm":
        return norm(norm(rewards, groups), trees)
    return [a + b for a, b in zip(norm(rewards, groups), norm(rewards, trees), strict=True)]


def call(rewards, trees, groups, *, device: str = "cpu", dtype=torch.float64, **options) -> Tensor:
    ids = (torch.tensor(x, device=device, dtype=torch.int64) for x in (trees, groups))
    return leaf_advantages(torch.tensor(rewards, dtype=dtype, device=device), *ids, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_literal(estimator: str, device: str) -> None:
    out = call(REWARDS, TREES, GROUPS, device=device, dtype=torch.float32, estimator=estimator)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.cpu(), torch.tensor(EXPECTED[estimator]), rtol=1e-5, atol=1e-5)
    # equal rewards of a tree, and a lone failure, are exactly nothing
    if estimator == "tree_inner":
        assert out[3:].tolist() == [0, 0, 0]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, -2.0]), st.integers(0, 5)), max_size=24),
    st.sampled_from(ESTIMATORS),
)
def test_matches_a_plain_loop(rows: list[tuple[float, int]], estimator: str) -> None:
    rewards, trees = [r for r, _ in rows], [t for _, t in rows]
    groups = [t // 3 for t in trees]
    expected = torch.tensor(plain(rewards, trees, groups, estimator), dtype=torch.float64)
    torch.testing.assert_close(call(rewards, trees, groups, estimator=estimator), expected, rtol=1e-9, atol=1e-9)


def test_default_is_the_sum_of_both() -> None:
    default = call(REWARDS, TREES, GROUPS)
    assert torch.equal(default, call(REWARDS, TREES, GROUPS, estimator="tree"))


def test_large_rewards_keep_their_spread() -> None:
    rewards = [10000.0, 10001.0, 10000.0, 10001.0]
    out = call(rewards, [0, 0, 1, 1], [0] * 4, dtype=torch.float32)
    expected = 0.5 / math.sqrt(1 / 3) + 0.5 / math.sqrt(1 / 2)
    torch.testing.assert_close(out, torch.tensor([-expected, expected] * 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "tree_diff"}, ValueError, "estimator must be one of 'tree', 'tree_inner', 'tree_2norm'"),
        ({"trees": [0, 0, 1, 2, 2]}, ValueError, r"tree_ids must have shape \[6\]"),
        ({"groups": [7] * 5}, ValueError, r"group_ids must have shape \[6\]"),
        ({"trees": [0, 0, 1, 2, 1, 3]}, ValueError, r"each tree in one group; tree 1 is in \[7, 9\]"),
        ({"rewards": [1.0, 0, 1, math.nan, 1, 0]}, ValueError, "rewards must be finite"),
        ({"dtype": torch.int64, "rewards": [1] * 6}, TypeError, "rewards must have dtype"),
    ],
)
def test_refuses(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(**({"rewards": REWARDS, "trees": TREES, "groups": GROUPS} | change))
