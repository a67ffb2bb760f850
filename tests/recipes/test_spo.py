"""SPO-tree: a node over its parent, by hand and against a plain walk, and the tokens that learn."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trajkern as tk
from trajkern.recipes.spo import low_probability, node_advantages
from trajkern.testing.tree import chain, random_tree, regular_tree, star

PARENT, REWARDS = [-1, 0, 0, 1, 1, 2], [1.0, 0.0, 1.0]


def tree_of(parent: list[int], device: str = "cpu") -> tk.Tree:
    return tk.Tree(torch.tensor(parent, device=device), torch.ones(len(parent), dtype=torch.int64, device=device))


def plain(rewards: list[float], tree: tk.Tree, scale: str) -> list[float]:
    parent = tree.parent.tolist()
    below: list[list[float]] = [[] for _ in parent]
    for reward, node in zip(rewards, tree.leaves.tolist(), strict=True):
        while node >= 0:
            below[node].append(reward)
            node = parent[node]
    value = [statistics.fmean(x) for x in below]
    out = [0.0 if p < 0 else value[n] - value[p] for n, p in enumerate(parent)]
    if scale == "std":
        for n, p in enumerate(parent):
            family = [value[c] for c, q in enumerate(parent) if q == p]
            if p >= 0 and len(family) > 1:
                out[n] /= statistics.pstdev(family) + 1e-8
    return out


@pytest.mark.parametrize("scale", ["none", "std"])
def test_literal(scale: str, device: str) -> None:
    """V: root 2/3, nodes 1/2 and 1; node 5 is an only child."""
    out = node_advantages(torch.tensor(REWARDS, device=device), tree_of(PARENT, device), scale=scale)
    by_hand = [0, -1 / 6, 1 / 3, 1 / 2, -1 / 2, 0]
    spread = [1, 1 / 4, 1 / 4, 1 / 2, 1 / 2, 1] if scale == "std" else [1] * 6
    expected = torch.tensor([a / s for a, s in zip(by_hand, spread, strict=True)])
    assert out.dtype == torch.float32 and out[5] == 0
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_default_is_unscaled() -> None:
    assert torch.equal(
        node_advantages(torch.tensor(REWARDS), tree_of(PARENT)),
        node_advantages(torch.tensor(REWARDS), tree_of(PARENT), scale="none"),
    )


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.sampled_from(["std", "none"]))
def test_matches_a_plain_walk(seed: int, scale: str) -> None:
    g = torch.Generator().manual_seed(seed)
    tree = random_tree(g, 24, roots=2, reach=6)
    rewards = torch.randn(tree.num_leaves, generator=g, dtype=torch.float64)
    expected = torch.tensor(plain(rewards.tolist(), tree, scale), dtype=torch.float64)
    torch.testing.assert_close(node_advantages(rewards, tree, scale=scale), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", ["none", "std"])
def test_equal_rewards_are_exactly_nothing(scale: str) -> None:
    for seed in range(5):
        tree = random_tree(torch.Generator().manual_seed(seed), 40, roots=2, reach=6)
        rewards = torch.full((tree.num_leaves,), 0.7, dtype=torch.float64)
        assert node_advantages(rewards, tree, scale=scale).count_nonzero() == 0


@pytest.mark.parametrize("scale", ["none", "std"])
def test_edges(scale: str) -> None:
    assert node_advantages(torch.tensor([3.0]), chain(4), scale=scale).tolist() == [0] * 4
    assert node_advantages(torch.full((27,), 0.1), regular_tree(4, 3), scale=scale).tolist() == [0] * 40
    big, small = torch.tensor([10000.0, 10001.0, 10000.0]), torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(node_advantages(big, star(3), scale=scale), node_advantages(small, star(3), scale=scale))


def test_low_probability(device: str) -> None:
    p = torch.tensor([0.0, 0.5, 0.899, 0.901, 1.0], device=device)
    logprobs = torch.cat((p.log(), torch.full((1,), math.nan, device=device)))
    assert low_probability(logprobs).tolist() == [True, True, True, False, False, False]
    assert low_probability(logprobs, threshold=0.5001).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: node_advantages(torch.ones(2), tree_of(PARENT)), ValueError, r"leaf_rewards must have shape \[3\]"),
        (lambda: node_advantages(torch.ones(3), tree_of(PARENT), scale="var"), ValueError, "scale must be one of"),
        (lambda: low_probability(torch.ones(2, 2)), ValueError, "old_logprobs must have 1 dimension"),
        (lambda: low_probability(torch.ones(2), threshold=0), ValueError, "threshold must be greater than 0"),
    ],
)
def test_refuses(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
