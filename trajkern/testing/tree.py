"""Specs of the tree family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trajkern.layouts.tree import Tree
from trajkern.ops.tree import REDUCTIONS
from trajkern.testing.registry import Case, Inputs, OpSpec, Variant

DTYPES = (torch.float32, torch.float64)


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def random_tree(g: torch.Generator, nodes: int, roots: int = 3, reach: int = 8) -> Tree:
    """Each node hangs on one of the ``reach`` before it; about an eighth of the nodes have no token."""
    back = torch.randint(1, reach + 1, (nodes,), generator=g)
    parent = torch.where(torch.arange(nodes) < roots, -1, (torch.arange(nodes) - back).clamp_min(0))
    return Tree(parent, torch.randint(0, 8, (nodes,), generator=g))


def regular_tree(levels: int, branching: int, length: int = 3) -> Tree:
    """One tree whose inner nodes all have as many children, level by level."""
    nodes = sum(branching**k for k in range(levels))
    return Tree((torch.arange(nodes) - 1) // branching, torch.full((nodes,), length))


def chain(nodes: int) -> Tree:
    return Tree(torch.arange(nodes) - 1, torch.ones(nodes, dtype=torch.int64))


def star(leaves: int) -> Tree:
    node = torch.arange(leaves + 1)
    return Tree((node > 0).long() - 1, node % 3)


def comb(teeth: int) -> Tree:
    """A chain each of whose nodes has a leaf besides: L grows with the depth."""
    node = torch.arange(2 * teeth)
    return Tree(torch.where(node % 2 == 0, node - 2, node - 1).clamp_min(-1), torch.ones(2 * teeth, dtype=torch.int64))


def joined(trees: list[Tree]) -> Tree:
    """The forest of all of them, in order."""
    sizes = [tree.num_nodes for tree in trees]
    parents = [torch.where(t.parent < 0, -1, t.parent + sum(sizes[:i])) for i, t in enumerate(trees)]
    return Tree(torch.cat(parents), torch.cat([tree.node_lengths for tree in trees]))


TreeMaker = Callable[[torch.Generator], Tree]
_SHAPES: tuple[tuple[str, TreeMaker, str, bool], ...] = (
    ("regular", lambda g: regular_tree(4, 3), "the usual search tree", False),
    ("one_node", lambda g: chain(1), "a root that is a leaf", False),
    ("roots_only", lambda g: joined([chain(1)] * 5), "no tree has two nodes", False),
    ("empty", lambda g: chain(0), "M = 0", False),
    ("chain", lambda g: chain(70), "only children", False),
    ("comb", lambda g: comb(70), "deep, with many leaves", False),
    ("star", lambda g: star(70), "one node with all leaves", False),
    ("short_of_a_segment", lambda g: joined([star(9), star(63)]), "the last segment lacks one leaf", False),
    ("long_chain", lambda g: chain(5000), "deep", True),
    ("wide_star", lambda g: star(20_000), "wide", True),
    ("forest", lambda g: random_tree(g, 20_000, 50, 2000), "many threads", True),
)


def _randoms(size: str, spread: float = 1.0, centre: float = 0.0, tree: TreeMaker | None = None, **options: Any):
    """Random values of the leaves or of the nodes, and a random tree where none is asked for."""

    def make(g: torch.Generator) -> Inputs:
        forest = random_tree(g, 90) if tree is None else tree(g)
        name = {"leaf": "leaf_values", "node": "node_values", "advantage": "leaf_advantages"}[size]
        count = forest.num_nodes if size == "node" else forest.num_leaves
        return {name: _randn(g, count) * spread + centre, "tree": forest} | {
            k: v(g, count) if callable(v) else v for k, v in options.items()
        }

    return make


def _shaped(size: str, **options: Any) -> tuple[Case, ...]:
    return tuple(Case(n, _randoms(size, tree=make, **options), why, large=big) for n, make, why, big in _SHAPES)


def _levelled(size: str, levels: int, **options: Any):
    """Values of which many are equal."""
    make = _randoms(size, **options)

    def rounded(g: torch.Generator) -> Inputs:
        inputs = make(g)
        name = next(iter(inputs))
        return inputs | {name: (inputs[name] * levels).round() / levels}

    return rounded


def _among_others(inputs: Inputs, g: torch.Generator):
    """The same trees with others before and after them."""
    tree, before, after = inputs["tree"], random_tree(g, 37, 2), random_tree(g, 50)
    wide = inputs | {"tree": joined([before, tree, after])}
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            a, b = (t.num_leaves if name.startswith("leaf") else t.num_nodes for t in (before, after))
            wide[name] = torch.cat([torch.rand(a, dtype=x.dtype), x.cpu(), torch.rand(b, dtype=x.dtype)]).to(x.device)

    def undo(name: str, x: Tensor) -> Tensor:
        leaf = name.startswith("grad_leaf")
        start, count = (before.num_leaves, tree.num_leaves) if leaf else (before.num_nodes, tree.num_nodes)
        return x if x.shape[0] == count else x[start : start + count]

    return wide, undo


_OTHERS = Variant("among_other_trees", _among_others)


def _ones(g: torch.Generator, n: int) -> Tensor:
    return torch.ones(n, dtype=torch.float64)


def _some(g: torch.Generator, n: int) -> Tensor:
    return torch.rand(n, generator=g, dtype=torch.float64).sub(0.3).relu()


SUBTREE_REDUCE = OpSpec(
    name="subtree_reduce",
    family="tree",
    outputs=lambda x: {"reduced": x},
    differentiable=("leaf_values",),
    typed=("leaf_values",),
    dtypes=DTYPES,
    cases=(
        *(Case(op, _randoms("leaf", op=op), f"{op} over random trees") for op in REDUCTIONS),
        Case("max_ties", _levelled("leaf", 1, op="max"), "equal leaves: the first has the gradient"),
        Case("min_ties", _levelled("leaf", 1, op="min"), "equal leaves: the first has the gradient"),
        Case("large_mean", _randoms("leaf", 1.0, 10_000.0, op="var"), "a one-pass variance fails"),
        Case("constant", _randoms("leaf", 0.0, 0.1, op="var"), "no variance at all"),
        Case("mean_of_large", _randoms("leaf", 1.0, 10_000.0, op="mean"), "leaves near 10,000"),
        *_shaped("leaf", op="var"),
        Case("deep_max", _randoms("leaf", op="max", tree=lambda g: comb(3000)), "deep", large=True),
        Case("deep_sum", _randoms("leaf", op="sum", tree=lambda g: comb(1500)), "deep", large=True),
        Case("wide_mean", _randoms("leaf", op="mean", tree=lambda g: star(20_000)), "wide", large=True),
    ),
    variants=(_OTHERS,),
    term_scale={"reduced": 1.0, "grad_leaf_values": 1.0},
)

SIBLING_ADVANTAGES = OpSpec(
    name="sibling_advantages",
    family="tree",
    outputs=lambda x: {"advantages": x},
    differentiable=("node_values",),
    typed=("node_values",),
    dtypes=DTYPES,
    cases=(
        *(
            Case(f"{baseline}{suffix}", _randoms("node", baseline=baseline, **options), f"baseline {baseline}{suffix}")
            for baseline in ("mean", "leave_one_out", "parent", "none")
            for suffix, options in (
                ("", {}),
                ("_no_std", {"scale": "none"}),
                ("_population", {"ddof": 0, "eps": 1e-4}),
                ("_zero", {"singleton": "zero"}),
            )
        ),
        Case("large_mean", _randoms("node", 1.0, 10_000.0), "values near 10,000"),
        Case("constant", _randoms("node", 0.0, 0.1), "equal siblings are exactly 0 and have a finite gradient"),
        Case("no_eps", _levelled("node", 1, eps=0.0), "equal siblings divide 0 by 0"),
        *_shaped("node"),
        *(Case(f"{c.name}_parent", c.make, c.reason, c.large) for c in _shaped("node", baseline="parent")),
    ),
    variants=(_OTHERS,),
    term_scale={"advantages": 1.0, "grad_node_values": 1.0},
)

BRANCH_COEFFICIENTS = OpSpec(
    name="branch_coefficients",
    family="tree",
    outputs=lambda x: x._asdict(),
    differentiable=("leaf_advantages",),
    typed=("leaf_advantages", "leaf_weights"),
    dtypes=DTYPES,
    cases=(
        Case("typical", _randoms("advantage"), "no weights"),
        Case("zeros", _levelled("advantage", 1), "advantages of 0 count as leaves, with no sign and no gradient"),
        Case(
            "weights",
            _randoms("advantage", leaf_weights=_some),
            "some leaves count nowhere",
        ),
        *_shaped("advantage", leaf_weights=_ones),
    ),
    variants=(_OTHERS,),
    no_grad_outputs=("leaf_count", "positive_count", "negative_count", "zero_count"),
    term_scale={"positive": 1.0, "negative": 1.0, "leaf_count": 1.0, "grad_leaf_advantages": 1.0},
)


SPECS = (SUBTREE_REDUCE, SIBLING_ADVANTAGES, BRANCH_COEFFICIENTS)
