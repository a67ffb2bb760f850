"""Launchers of csrc/bind/tree.cpp, by which csrc/cpu/tree.cpp and csrc/cuda/tree.cu are called.

``tree`` is Tree.arrays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern._native._args import call, pointer
from trajkern._values import check_leaves, check_squarable


def _sizes(tree: list[Tensor]) -> tuple[int, int]:
    """Nodes and leaves."""
    return tree[0].shape[0], tree[5].shape[0]


def _nodes(tree: list[Tensor]) -> tuple[Any, ...]:
    return [x.data_ptr() for x in tree], *_sizes(tree)


def subtree_reduce(
    leaf_values: Tensor,  # [L]
    tree: list[Tensor],
    op: int,
) -> Tensor:
    out = leaf_values.new_empty(tree[0].shape[0])
    pointers = leaf_values.data_ptr(), _nodes(tree), op, out.data_ptr()
    if not call("subtree_reduce", leaf_values, *pointers, scratch=("tree_scratch", *_sizes(tree))):
        check_squarable("leaf_values", leaf_values)
    return out


def subtree_reduce_backward(
    grad_out: Tensor,  # [M]
    leaf_values: Tensor,  # [L]
    tree: list[Tensor],
    op: int,
) -> Tensor:
    grad_leaf_values = torch.empty_like(leaf_values)
    call(
        "subtree_reduce_backward",
        leaf_values,
        grad_out.data_ptr(),
        leaf_values.data_ptr(),
        _nodes(tree),
        op,
        grad_leaf_values.data_ptr(),
        scratch=("tree_scratch", *_sizes(tree)),
    )
    return grad_leaf_values


def sibling_advantages(
    node_values: Tensor,  # [M]
    tree: list[Tensor],
    baseline: int,
    by_std: bool,
    ddof: float,
    eps: float,
    zero_singleton: bool,
) -> Tensor:
    advantages = torch.empty_like(node_values)
    rule = baseline, by_std, ddof, eps, zero_singleton
    if not call("sibling_advantages", node_values, node_values.data_ptr(), _nodes(tree), rule, advantages.data_ptr()):
        check_squarable("node_values", node_values)
    return advantages


def sibling_advantages_backward(
    grad_advantages: Tensor,  # [M]
    node_values: Tensor,  # [M]
    tree: list[Tensor],
    *rule: float,
) -> Tensor:
    """``rule``: sibling_advantages' last five arguments."""
    grad_node_values = torch.empty_like(node_values)
    call(
        "sibling_advantages_backward",
        node_values,
        grad_advantages.data_ptr(),
        node_values.data_ptr(),
        _nodes(tree),
        rule,
        grad_node_values.data_ptr(),
    )
    return grad_node_values


def branch_coefficients(
    leaf_advantages: Tensor,  # [L]
    leaf_weights: Tensor | None,  # [L]
    tree: list[Tensor],
) -> tuple[Tensor, ...]:
    out = tuple(leaf_advantages.new_empty(tree[0].shape[0]) for _ in range(6))
    legal = call(
        "branch_coefficients",
        leaf_advantages,
        leaf_advantages.data_ptr(),
        pointer(leaf_weights),
        _nodes(tree),
        [x.data_ptr() for x in out],
        scratch=("tree_scratch", *_sizes(tree)),
    )
    if not legal:
        check_leaves(leaf_advantages, leaf_weights)
    return out


def branch_coefficients_backward(
    grad_positive: Tensor,  # [M]
    grad_negative: Tensor,  # [M]
    leaf_advantages: Tensor,  # [L]
    leaf_weights: Tensor | None,  # [L]
    tree: list[Tensor],
) -> Tensor:
    grad_leaf_advantages = torch.empty_like(leaf_advantages)
    call(
        "branch_coefficients_backward",
        leaf_advantages,
        (grad_positive.data_ptr(), grad_negative.data_ptr()),
        leaf_advantages.data_ptr(),
        pointer(leaf_weights),
        _nodes(tree),
        grad_leaf_advantages.data_ptr(),
    )
    return grad_leaf_advantages
