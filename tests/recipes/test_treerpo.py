"""TreeRPO: means of children and GRPO among siblings, by hand and against a plain recursion."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trajkern as tk
from trajkern.recipes.treerpo import node_advantages
from trajkern.testing.tree import chain, comb, joined, random_tree, regular_tree, star

# node 0 has children 1 (leaf), 2; node 2 has the leaves 3, 4, 5: V(2) = 1/3, V(0) = 2/3, not the leaves' mean 1/2
PARENT, REWARDS = [-1, 0, 0, 2, 2, 2], [1.0, 1.0, 0.0, 0.0]


def tree_of(parent: list[int], device: str = "cpu") -> tk.Tree:
    return tk.Tree(torch.tensor(parent, device=device), torch.ones(len(parent), dtype=torch.int64, device=device))


def plain(rewards: list[float], tree: tk.Tree, scale: str) -> list[float]:
    parent, m = tree.parent.tolist(), tree.num_nodes
    children = [[c for c in range(m) if parent[c] == n] for n in range(m)]
    value = dict(zip(tree.leaves.tolist(), rewards, strict=True))
    for n in reversed(range(m)):
        if children[n]:
            value[n] = statistics.fmean(value[c] for c in children[n])
    out = [0.0] * m
    for family in children:
        peers = [value[c] for c in family]
        for c in family if len(family) > 1 else ():
            out[c] = (value[c] - statistics.fmean(peers)) / (statistics.stdev(peers) + 1e-6 if scale == "std" else 1)
    return out


@pytest.mark.parametrize("scale", ["std", "none"])
def test_literal(scale: str, device: str) -> None:
    out = node_advantages(torch.tensor(REWARDS, device=device), tree_of(PARENT, device), scale=scale)
    assert out.dtype == torch.float32
    by_hand = [0, 1 / 3, -1 / 3, 2 / 3, -1 / 3, -1 / 3]
    spread = [1, math.sqrt(2) / 3, math.sqrt(2) / 3, *[math.sqrt(1 / 3)] * 3] if scale == "std" else [1] * 6
    expected = torch.tensor([a / s for a, s in zip(by_hand, spread, strict=True)])
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.sampled_from(["std", "none"]))
def test_matches_a_plain_recursion(seed: int, scale: str) -> None:
    g = torch.Generator().manual_seed(seed)
    tree = random_tree(g, 24, roots=2, reach=6)
    rewards = torch.randn(tree.num_leaves, generator=g, dtype=torch.float64)
    expected = torch.tensor(plain(rewards.tolist(), tree, scale), dtype=torch.float64)
    torch.testing.assert_close(node_advantages(rewards, tree, scale=scale), expected, rtol=1e-6, atol=1e-6)


def test_edges() -> None:
    assert node_advantages(torch.tensor([3.0]), chain(1)).tolist() == [0]
    assert node_advantages(torch.tensor([3.0]), chain(5)).tolist() == [0] * 5  # only children
    assert node_advantages(torch.full((27,), 0.1), regular_tree(4, 3)).tolist() == [0] * 40
    big, small = torch.tensor([10000.0, 10001.0, 10000.0]), torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(node_advantages(big, star(3)), node_advantages(small, star(3)))


def test_equal_rewards_below_siblings_of_unequal_shape_are_exactly_nothing() -> None:
    for seed in range(5):
        tree = random_tree(torch.Generator().manual_seed(seed), 40, roots=2, reach=6)
        assert node_advantages(torch.full((tree.num_leaves,), 0.7, dtype=torch.float64), tree).count_nonzero() == 0


def test_depth_costs_no_precision() -> None:
    """In a comb the weight of a leaf halves with every level: far below what a product from the root could hold."""
    teeth = 3000
    rewards = (torch.arange(teeth) % 2).double()  # the last tooth is the last spine node's only child
    tree = comb(teeth)
    out = node_advantages(rewards, tree, scale="none")
    value = rewards.tolist()
    spine = value[-1]
    expected = torch.zeros(2 * teeth, dtype=torch.float64)
    for n in reversed(range(1, teeth)):  # spine node n and tooth n - 1 are siblings
        expected[2 * n], expected[2 * n - 1] = (spine - value[n - 1]) / 2, (value[n - 1] - spine) / 2
        spine = (spine + value[n - 1]) / 2
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_a_forest_equals_its_trees() -> None:
    g = torch.Generator().manual_seed(1)
    trees = [random_tree(g, n, roots=1) for n in (9, 17, 30)]
    rewards = [torch.randn(t.num_leaves, generator=g) for t in trees]
    apart = torch.cat([node_advantages(r, t) for r, t in zip(rewards, trees, strict=True)])
    assert torch.equal(node_advantages(torch.cat(rewards), joined(trees)), apart)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"leaf_rewards": torch.ones(3)}, ValueError, r"leaf_rewards must have shape \[4\]"),
        ({"scale": "max"}, ValueError, "scale must be one of 'std', 'none'"),
        ({"tree": None}, TypeError, "tree must be a Tree, got NoneType"),
    ],
)
def test_refuses(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        node_advantages(**({"leaf_rewards": torch.tensor(REWARDS), "tree": tree_of(PARENT)} | change))
