"""Reductions over subtrees, advantages among siblings, and the coefficients with which a packed tree is trained.

Over the leaves l below node n (n itself where it is a leaf), with c_n of them:

    sum_n = sum x_l      mean_n = sum_n / c_n      var_n = sum (x_l - mean_n)^2 / c_n      max_n, min_n

Over the k children of one node, with values v, mean m and std s = sqrt(sum (v - m)^2 / (k - ddof)):

    A_i = (v_i - b_i) / (s + eps)        b_i = m, the mean of the other k - 1, the parent's value, or 0

Both are measured from one of the values: equal values have a variance of exactly 0, and a large common value costs no
precision. One pass up the tree or down it, whatever its depth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import check_choice, check_number, check_shape, check_tensor, laid_out, readable
from trajkern._dtypes import FLOATS, INTEGERS, accumulator
from trajkern._results import Branch
from trajkern._values import check_leaves, check_squarable
from trajkern.layouts.tree import Tree
from trajkern.ops._autograd import applied, differentiable_once, keep, kept
from trajkern.ops._library import define, recorded

REDUCTIONS = ("sum", "mean", "max", "min", "var")
BASELINES = ("mean", "leave_one_out", "parent", "none")
SCALES = ("std", "none")
SINGLETONS = ("raw", "zero")


def _nodes(x: Tensor, tree: list[Tensor]) -> Tensor:
    return x.new_empty(tree[0].shape[0])


_subtree_reduce = define(
    "tree",
    "subtree_reduce(Tensor leaf_values, Tensor[] tree, int op) -> Tensor",
    lambda leaf_values, tree, op: _nodes(leaf_values, tree),
)
_subtree_reduce_backward = define(
    "tree",
    "subtree_reduce_backward(Tensor grad_out, Tensor leaf_values, Tensor[] tree, int op) -> Tensor",
    lambda grad_out, leaf_values, *_: torch.empty_like(leaf_values),
)
_sibling_advantages = define(
    "tree",
    "sibling_advantages(Tensor node_values, Tensor[] tree, int baseline, bool by_std, float ddof, float eps,"
    " bool zero_singleton) -> Tensor",
    lambda node_values, *_: torch.empty_like(node_values),
)
_sibling_advantages_backward = define(
    "tree",
    "sibling_advantages_backward(Tensor grad_advantages, Tensor node_values, Tensor[] tree, int baseline, bool by_std,"
    " float ddof, float eps, bool zero_singleton) -> Tensor",
    lambda grad_advantages, node_values, *_: torch.empty_like(node_values),
)
_branch_coefficients = define(
    "tree",
    "branch_coefficients(Tensor leaf_advantages, Tensor? leaf_weights, Tensor[] tree)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda leaf_advantages, leaf_weights, tree: tuple(_nodes(leaf_advantages, tree) for _ in range(6)),
)
_branch_coefficients_backward = define(
    "tree",
    "branch_coefficients_backward(Tensor grad_positive, Tensor grad_negative, Tensor leaf_advantages,"
    " Tensor? leaf_weights, Tensor[] tree) -> Tensor",
    lambda grad_positive, grad_negative, leaf_advantages, *_: torch.empty_like(leaf_advantages),
)


class _SubtreeReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf_values, op, tree):
        keep(ctx, leaf_values, *tree)
        ctx.op = op
        return _subtree_reduce(leaf_values, tree, op)

    @staticmethod
    @differentiable_once("subtree_reduce")
    def backward(ctx: Any, grad):
        leaf_values, *tree = kept(ctx)
        return _subtree_reduce_backward(grad.contiguous(), leaf_values, tree, ctx.op), None, None


class _SiblingAdvantages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, node_values, rule, tree):
        keep(ctx, node_values, *tree)
        ctx.rule = rule
        return _sibling_advantages(node_values, tree, *rule)

    @staticmethod
    @differentiable_once("sibling_advantages")
    def backward(ctx: Any, grad):
        node_values, *tree = kept(ctx)
        return _sibling_advantages_backward(grad.contiguous(), node_values, tree, *ctx.rule), None, None


class _BranchCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf_advantages, leaf_weights, tree):
        ctx.set_materialize_grads(False)  # four of the outputs have none
        keep(ctx, leaf_advantages, leaf_weights, *tree)
        out = _branch_coefficients(leaf_advantages, leaf_weights, tree)
        ctx.mark_non_differentiable(*out[2:])
        return out

    @staticmethod
    @differentiable_once("branch_coefficients", linear=True)
    def backward(ctx: Any, positive, negative, *_):
        leaf_advantages, leaf_weights, *tree = kept(ctx)
        none = leaf_advantages.new_zeros
        grads = (none(tree[0].shape[0]) if g is None else g.contiguous() for g in (positive, negative))
        return _branch_coefficients_backward(*grads, leaf_advantages, leaf_weights, tree), None, None


def _accumulated(x: Tensor) -> Tensor:
    return laid_out(x, accumulator(x))


def _check_tree(tree: Any) -> None:
    if not isinstance(tree, Tree):
        raise TypeError(f"tree must be a Tree, got {type(tree).__name__}")
    tree.check_given()


@recorded
def subtree_reduce(
    leaf_values: Tensor,  # [L]
    tree: Tree,
    op: str = "mean",
) -> Tensor:
    """Reduce the leaves below every node.

    Args:
        leaf_values: float ``[L]``, finite and of a magnitude of at most 2^126 (2^480 in float64), so that no square
            overflows (checked on the CPU), in the order of ``tree.leaves``.
        tree: the nodes; M of them.
        op: "sum", "mean", "max", "min" or "var" (the population's: a leaf's is 0).

    Returns:
        ``[M]`` float32 (float64 for float64), differentiable once; the gradient of an extreme goes to the first of
        equal leaves.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    _check_tree(tree)
    check_tensor("leaf_values", leaf_values, dtypes=FLOATS, ndim=1, device=tree.device)
    check_shape("leaf_values", leaf_values, (tree.num_leaves,), "one value a leaf")
    op = check_choice("op", op, REDUCTIONS)
    if _backends.wants_reference("tree", leaf_values):
        if readable(leaf_values):
            check_squarable("leaf_values", leaf_values)
        return _backends.reference().subtree_reduce(leaf_values, tree, op)
    return applied(_SubtreeReduce, _accumulated(leaf_values), REDUCTIONS.index(op), tree.arrays)


@recorded
def sibling_advantages(
    node_values: Tensor,  # [M]
    tree: Tree,
    *,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "raw",
) -> Tensor:
    """Advantage of each node relative to the other children of its parent. A root's is 0.

    Args:
        node_values: float ``[M]``, finite and of a magnitude of at most 2^126 (2^480 in float64), so that no square
            overflows. Checked on the CPU; elsewhere what overflows gives siblings that are not finite.
        tree: the nodes.
        baseline: what is subtracted: the siblings' "mean" (the node among them), the mean of the others
            ("leave_one_out"), the "parent"'s value, or "none".
        scale: divide by the siblings' "std" + eps, or "none". Where std + eps is 0 the divisor is 1; an only child's
            std counts as 1.
        ddof: 1 for the unbiased variance, 0 for the population's.
        eps: added to the standard deviation, 0 or a positive number that float32 and its reciprocals hold (float64's
            for float64 values).
        singleton: advantage of an only child with baseline "mean" or "leave_one_out": "raw" gives v / (1 + eps) with
            scale "std" and v with "none"; "zero" gives 0. The other baselines keep their centre.

    Returns:
        ``[M]`` float32 (float64 for float64), differentiable once; siblings of equal value have a standard deviation
        that counts as constant, and with baseline "mean" or "leave_one_out" advantages of exactly 0.

    Source: SPO (github AIFrameResearch/SPO), TreeRPO (arXiv 2506.05183), TreeRL (2506.11902).
    """
    _check_tree(tree)
    check_tensor("node_values", node_values, dtypes=FLOATS, ndim=1, device=tree.device)
    check_shape("node_values", node_values, (tree.num_nodes,), "one value a node")
    baseline, scale = check_choice("baseline", baseline, BASELINES), check_choice("scale", scale, SCALES)
    ddof, singleton = check_choice("ddof", ddof, (0, 1)), check_choice("singleton", singleton, SINGLETONS)
    eps = check_number("eps", eps, low=0, dtype=accumulator(node_values))
    if _backends.wants_reference("tree", node_values):
        if readable(node_values):
            check_squarable("node_values", node_values)
        return _backends.reference().sibling_advantages(
            node_values, tree, baseline=baseline, scale=scale, ddof=ddof, eps=eps, singleton=singleton
        )
    rule = BASELINES.index(baseline), scale == "std", float(ddof), float(eps), singleton == "zero"
    return applied(_SiblingAdvantages, _accumulated(node_values), rule, tree.arrays)


@recorded
def branch_coefficients(
    leaf_advantages: Tensor,  # [L]
    tree: Tree,
    *,
    leaf_weights: Tensor | None = None,  # [L]
) -> Branch:
    """What a node's tokens are multiplied with so that training the packed tree equals training its flat rollouts.

    A token that several rollouts share has one ratio r and one advantage a rollout. A clipped objective is not linear
    in A, but it is so for A > 0 and for A < 0 apart: sum_l min(r A_l, clip(r) A_l) needs only the sums of both.

    Args:
        leaf_advantages: float ``[L]``, finite where a leaf has a weight (checked on the CPU).
        tree: the nodes.
        leaf_weights: float or integer ``[L]``, at least 0, no gradient: ``tree.leaf_weights(mask, aggregate)`` for
            the sequence means. A leaf of weight 0 counts nowhere, whatever its advantage; without weights each is 1.

    Returns:
        :class:`Branch` of ``[M]``, float32 (float64 for float64 advantages); ``positive`` and ``negative`` are
        differentiable once, in the advantages.
    """
    _check_tree(tree)
    check_tensor("leaf_advantages", leaf_advantages, dtypes=FLOATS, ndim=1, device=tree.device)
    check_shape("leaf_advantages", leaf_advantages, (tree.num_leaves,), "one advantage a leaf")
    if leaf_weights is not None:
        check_tensor("leaf_weights", leaf_weights, dtypes=(*FLOATS, *INTEGERS), device=tree.device)
        check_shape("leaf_weights", leaf_weights, (tree.num_leaves,), "one weight a leaf")
    if _backends.wants_reference("tree", leaf_advantages):
        if readable(leaf_advantages):
            check_leaves(leaf_advantages, leaf_weights)
        return _backends.reference().branch_coefficients(leaf_advantages, tree, leaf_weights=leaf_weights)
    x = _accumulated(leaf_advantages)
    weights = None if leaf_weights is None else laid_out(leaf_weights.detach(), x.dtype)
    return Branch(*applied(_BranchCoefficients, x, weights, tree.arrays))
