"""The tree family's reference against literal tables and plain Python walks."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

from trajkern import Tree, reference
from trajkern.ops.tree import REDUCTIONS
from trajkern.testing.tree import joined, random_tree

# 0 -> (1 -> (3, 4), 2), 5 alone; leaves 2, 3, 4, 5
TREE = Tree(torch.tensor([-1, 0, 0, 1, 1, -1]), torch.tensor([2, 0, 3, 1, 2, 1]))
LEAVES = torch.tensor([1.0, 4.0, 2.0, 7.0], dtype=torch.float64)


LITERAL: dict[str, list[float]] = {
    "sum": [7, 6, 1, 4, 2, 7],
    "mean": [7 / 3, 3, 1, 4, 2, 7],
    "max": [4, 4, 1, 4, 2, 7],
    "min": [1, 2, 1, 4, 2, 7],
    "var": [14 / 9, 1, 0, 0, 0, 0],
}
WALKS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "mean": statistics.fmean,
    "max": max,
    "min": min,
    "var": statistics.pvariance,
}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_subtree_reduce(op: str) -> None:
    expected = torch.tensor(LITERAL[op], dtype=torch.float64)
    torch.testing.assert_close(reference.subtree_reduce(LEAVES, TREE, op), expected)


VALUES = torch.tensor([10.0, 4.0, 1.0, 5.0, 3.0, 8.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    (
        ({"scale": "none"}, [0, 1.5, -1.5, 1, -1, 0]),
        ({"scale": "none", "baseline": "leave_one_out"}, [0, 3, -3, 2, -2, 0]),
        ({"scale": "none", "baseline": "parent"}, [0, -6, -9, 1, -1, 0]),
        ({"scale": "none", "baseline": "none"}, [0, 4, 1, 5, 3, 0]),
        ({"eps": 0.0}, [0, 0.5**0.5, -(0.5**0.5), 0.5**0.5, -(0.5**0.5), 0]),
        ({"eps": 0.0, "ddof": 0}, [0, 1, -1, 1, -1, 0]),
        ({"eps": 1.0, "ddof": 0, "baseline": "parent"}, [0, -6 / 2.5, -9 / 2.5, 0.5, -0.5, 0]),
    ),
)
def test_sibling_advantages(options: dict, expected: list[float]) -> None:
    actual = reference.sibling_advantages(VALUES, TREE, **options)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "expected"),
    (
        ({}, 3 / 1.5),
        ({"scale": "none"}, 3),
        ({"singleton": "zero"}, 0),
        ({"baseline": "leave_one_out", "singleton": "zero"}, 0),
        ({"baseline": "parent", "singleton": "zero"}, (3 - 5) / 1.5),
        ({"baseline": "none", "singleton": "zero"}, 3 / 1.5),
    ),
)
def test_only_child(options: dict, expected: float) -> None:
    tree = Tree(torch.tensor([-1, 0]), torch.tensor([1, 1]))
    values = torch.tensor([5.0, 3.0], dtype=torch.float64)
    assert reference.sibling_advantages(values, tree, eps=0.5, **options).tolist() == [0, pytest.approx(expected)]


def test_equal_siblings_are_exactly_zero() -> None:
    values = torch.full((6,), 0.1)
    for baseline in ("mean", "leave_one_out"):
        assert (reference.sibling_advantages(values, TREE, baseline=baseline, eps=0.0) == 0).all()
    assert (reference.subtree_reduce(torch.full((4,), 0.1), TREE, "var") == 0).all()


def test_large_common_value_costs_no_precision() -> None:
    small = reference.subtree_reduce(LEAVES.float(), TREE, "var")
    torch.testing.assert_close(reference.subtree_reduce(LEAVES.float() + 1e4, TREE, "var"), small)


def test_branch_coefficients() -> None:
    advantages = torch.tensor([1.0, -4.0, 2.0, 0.0], dtype=torch.float64)
    plain = reference.branch_coefficients(advantages, TREE)
    weighted = reference.branch_coefficients(advantages, TREE, leaf_weights=torch.tensor([2.0, 0.5, 0.0, 3.0]))
    expected = {
        "positive": ([3, 2, 1, 0, 2, 0], [2, 0, 2, 0, 0, 0]),
        "negative": ([-4, -4, 0, -4, 0, 0], [-2, -2, 0, -2, 0, 0]),
        "leaf_count": ([3, 2, 1, 1, 1, 1], [2.5, 0.5, 2, 0.5, 0, 3]),
        "positive_count": ([2, 1, 1, 0, 1, 0], [1, 0, 1, 0, 0, 0]),
        "negative_count": ([1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 0, 0]),
        "zero_count": ([0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1]),
    }
    for name, (without, with_weights) in expected.items():
        assert getattr(plain, name).tolist() == without and getattr(weighted, name).tolist() == with_weights


def _leaves_below(tree: Tree, node: int) -> list[int]:
    children = [c for c, p in enumerate(tree.parent.tolist()) if p == node]
    return [x for c in children for x in _leaves_below(tree, c)] if children else [node]


@pytest.mark.parametrize("seed", range(4))
def test_against_plain_walks(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    tree = random_tree(g, 40)
    x = torch.randn(tree.num_leaves, generator=g, dtype=torch.float64)
    at = dict(zip(tree.leaves.tolist(), x.tolist(), strict=True))
    for op in REDUCTIONS:
        expected = [WALKS[op]([at[leaf] for leaf in _leaves_below(tree, n)]) for n in range(40)]
        torch.testing.assert_close(reference.subtree_reduce(x, tree, op), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("op", REDUCTIONS)
def test_gradients(op: str) -> None:
    tree = random_tree(torch.Generator().manual_seed(1), 20)
    x = torch.randn(tree.num_leaves, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.subtree_reduce(x, tree, op), x)


@pytest.mark.parametrize("baseline", ("mean", "leave_one_out", "parent", "none"))
def test_sibling_gradients(baseline: str) -> None:
    tree = random_tree(torch.Generator().manual_seed(1), 20)
    v = torch.randn(20, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: reference.sibling_advantages(v, tree, baseline=baseline), v)


def test_a_forest_is_its_trees() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [random_tree(g, n, 1) for n in (1, 7, 30)]
    forest = joined(parts)
    v = torch.randn(forest.num_nodes, generator=g)
    pieces = v.split([part.num_nodes for part in parts])
    apart = [reference.sibling_advantages(x, part) for x, part in zip(pieces, parts, strict=True)]
    torch.testing.assert_close(reference.sibling_advantages(v, forest), torch.cat(apart))


def test_permuted_siblings_permute_the_results() -> None:
    # nodes 1 and 2 change places, with what hangs on them
    turned = Tree(torch.tensor([-1, 0, 0, 2, 2, -1]), torch.tensor([2, 3, 0, 1, 2, 1]))
    order = torch.tensor([0, 2, 1, 3, 4, 5])
    torch.testing.assert_close(reference.subtree_reduce(LEAVES, turned)[order], reference.subtree_reduce(LEAVES, TREE))
    torch.testing.assert_close(
        reference.sibling_advantages(VALUES[order], turned)[order], reference.sibling_advantages(VALUES, TREE)
    )
