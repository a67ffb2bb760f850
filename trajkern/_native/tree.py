"""Launchers of csrc/cpu/tree.cpp and csrc/cuda/tree.cu, which take the same arguments. ``tree`` is Tree.arrays."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from trajkern._checks import check_finite, check_values
from trajkern._native._args import DTYPE, call, pointer


def _scratch(x: Tensor, tree: list[Tensor]) -> Tensor | None:
    """What a CUDA kernel keeps between its launches; the C++ ones allocate for themselves."""
    if x.device.type == "cpu":
        return None
    return torch.empty(96 * tree[5].shape[0] + 8 * tree[0].shape[0], dtype=torch.uint8, device=x.device)


def _tree(tree: list[Tensor]) -> tuple[list[int], int, int]:
    return [x.data_ptr() for x in tree], tree[0].shape[0], tree[5].shape[0]


def subtree_reduce(
    leaf_values: Tensor,  # [L]
    tree: list[Tensor],
    op: int,
) -> Tensor:
    out, scratch = leaf_values.new_empty(tree[0].shape[0]), _scratch(leaf_values, tree)
    legal = call(
        "subtree_reduce",
        leaf_values,
        leaf_values.data_ptr(),
        DTYPE[leaf_values.dtype],
        *_tree(tree),
        op,
        out.data_ptr(),
        pointer(scratch),
    )
    if legal is False:
        check_finite("leaf_values", leaf_values)
    return out


def subtree_reduce_backward(
    grad_out: Tensor,  # [M]
    leaf_values: Tensor,  # [L]
    tree: list[Tensor],
    op: int,
) -> Tensor:
    grad_leaf_values, scratch = torch.empty_like(leaf_values), _scratch(leaf_values, tree)
    call(
        "subtree_reduce_backward",
        leaf_values,
        grad_out.data_ptr(),
        leaf_values.data_ptr(),
        DTYPE[leaf_values.dtype],
        *_tree(tree),
        op,
        grad_leaf_values.data_ptr(),
        pointer(scratch),
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
    legal = call(
        "sibling_advantages",
        node_values,
        node_values.data_ptr(),
        DTYPE[node_values.dtype],
        *_tree(tree),
        baseline,
        by_std,
        ddof,
        eps,
        zero_singleton,
        advantages.data_ptr(),
    )
    if legal is False:
        check_finite("node_values", node_values)
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
        DTYPE[node_values.dtype],
        *_tree(tree),
        *rule,
        grad_node_values.data_ptr(),
    )
    return grad_node_values


def branch_coefficients(
    leaf_advantages: Tensor,  # [L]
    leaf_weights: Tensor | None,  # [L]
    tree: list[Tensor],
) -> tuple[Tensor, ...]:
    out = tuple(leaf_advantages.new_empty(tree[0].shape[0]) for _ in range(6))
    scratch = _scratch(leaf_advantages, tree)
    bad = call(
        "branch_coefficients",
        leaf_advantages,
        leaf_advantages.data_ptr(),
        DTYPE[leaf_advantages.dtype],
        pointer(leaf_weights),
        *_tree(tree),
        [x.data_ptr() for x in out],
        pointer(scratch),
    )
    if bad:
        check_finite("leaf_advantages", leaf_advantages)
        check_values("leaf_weights", cast(Tensor, leaf_weights), 0)
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
        grad_positive.data_ptr(),
        grad_negative.data_ptr(),
        leaf_advantages.data_ptr(),
        DTYPE[leaf_advantages.dtype],
        pointer(leaf_weights),
        *_tree(tree),
        grad_leaf_advantages.data_ptr(),
    )
    return grad_leaf_advantages
