"""Cases of the tree family: reductions over a forest, beside the same level by level in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajkern._bench.case import Problem, Target, TimedCase, with_compiled
from trajkern.layouts.tree import Tree
from trajkern.testing.numerics import Outcome
from trajkern.testing.tree import regular_tree

LEVELS, BRANCHING = 5, 3  # 121 nodes a tree
EPS = 1e-6


def forest(nodes: int) -> Tree:
    """Trees of five levels, three children a node, up to that many nodes."""
    one = regular_tree(LEVELS, BRANCHING, 1)
    count = nodes // one.num_nodes
    parent = one.parent + torch.where(one.parent < 0, 0, one.num_nodes * torch.arange(count)[:, None])
    return Tree(parent.flatten(), one.node_lengths.repeat(count))


def _levels(tree: Tree) -> list[tuple[Tensor, Tensor]]:
    """(node, parent) of each level but the first, the deepest first."""
    levels = []
    for depth in range(tree.levels - 1, 0, -1):
        node = (tree.depth == depth).nonzero().squeeze(1)
        levels.append((node, tree.parent[node]))
    return levels


def _mean_form(tree: Tree) -> Callable[..., Outcome]:
    """In its favour: it is given the nodes of each level, and how many leaves each has."""
    levels, leaves, count = _levels(tree), tree.leaves, tree.leaf_count

    def form(leaf_values: Tensor, **_) -> Outcome:
        sums = leaf_values.new_zeros(count.shape[0]).index_copy(0, leaves, leaf_values)
        for node, parent in levels:
            sums.index_add_(0, parent, sums[node])
        return {"reduced": sums / count}

    return form


def _sibling_form(tree: Tree) -> Callable[..., Outcome]:
    """In its favour: it is given the number of siblings, and no only child to make an exception of."""
    nodes, root = tree.num_nodes, tree.parent < 0
    family = torch.where(root, nodes, tree.parent)
    count = torch.bincount(family, minlength=nodes + 1)[family]

    def form(node_values: Tensor, **_) -> Outcome:
        zero = node_values.new_zeros(nodes + 1)
        d = node_values - (zero.scatter_add(0, family, node_values)[family] / count)
        variance = zero.scatter_add(0, family, d * d)[family] / (count - 1)
        return {"advantages": torch.where(root, 0, d / (variance.sqrt() + EPS))}

    return form


def _branch_form(tree: Tree) -> Callable[..., Outcome]:
    levels, leaves, nodes = _levels(tree), tree.leaves, tree.num_nodes

    def form(leaf_advantages: Tensor, **_) -> Outcome:
        a = leaf_advantages
        each = torch.stack((a.relu(), -(-a).relu(), torch.ones_like(a), (a > 0).float(), (a < 0).float()))
        sums = a.new_zeros(5, nodes).index_copy(1, leaves, each)
        for node, parent in levels:
            sums.index_add_(1, parent, sums[:, node])
        names = ("positive", "negative", "leaf_count", "positive_count", "negative_count")
        return dict(zip(names, sums, strict=True))

    return form


def _problem(op: str, argument: str, form: Callable[[Tree], Callable[..., Outcome]], nodes: int, outputs: int = 1):
    def make(device: str) -> Problem:
        tree = forest(nodes).to(device)
        size = tree.num_nodes if argument == "node_values" else tree.num_leaves
        x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
        if argument == "node_values":  # no two siblings so close that rounding their difference decides
            x = x.clamp(-4, 4) / 16 + torch.arange(size, device=device) % BRANCHING
        inputs = {argument: x, "tree": tree}
        if op == "subtree_reduce":
            inputs["op"] = "mean"
        ranges = 16 * tree.num_nodes  # children and leaves below each node
        return Problem(
            op=op,
            inputs=inputs,
            rivals=with_compiled(form(tree)) if nodes <= 10**6 else {"eager": form(tree)},
            bare=torch.empty(tree.num_nodes, device=device).clone,
            bytes=x.nbytes + 4 * outputs * tree.num_nodes + ranges,
        )

    return make


def reduce_problem(nodes: int) -> Callable[[str], Problem]:
    return _problem("subtree_reduce", "leaf_values", _mean_form, nodes)


def sibling_problem(nodes: int) -> Callable[[str], Problem]:
    return _problem("sibling_advantages", "node_values", _sibling_form, nodes)


def branch_problem(nodes: int) -> Callable[[str], Problem]:
    return _problem("branch_coefficients", "leaf_advantages", _branch_form, nodes, 6)


_TEN = (Target("fast", 10, "eager"),)
CASES = tuple(
    TimedCase(op, "forward", f"{nodes:,} nodes", problem(nodes), targets=targets)
    for op, problem in (
        ("subtree_reduce", reduce_problem),
        ("sibling_advantages", sibling_problem),
        ("branch_coefficients", branch_problem),
    )
    for nodes, targets in (
        (65_536, ()),
        (1_000_000, _TEN if op != "branch_coefficients" else ()),
        (10_000_000, ()),
    )
)
