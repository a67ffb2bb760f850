"""What several recipes need of groups and nodes: argument checks, ids of pairs, sums over a group, values of a tree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import Tree, spread, subtree_reduce
from trajkern._checks import check_boundaries, check_shape, check_tensor, readable
from trajkern._values import check_cu_seqlens, check_squarable, check_values
from trajkern.layouts.spans import trajectories
from trajkern.ops.advantage import FLOATS, INTEGERS


def check_vector(
    name: str,
    x: Any,
    count: int | None,
    meaning: str,
    device: torch.device | None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    *,
    finite: bool = True,
) -> None:
    """``x`` is a vector of ``count`` values (any number for None); floats are finite, and of squares that are, where
    reading them is free."""
    check_tensor(name, x, dtypes=dtypes, ndim=1, device=device)
    if count is not None:
        check_shape(name, x, (count,), meaning)
    if finite and x.is_floating_point() and readable(x):
        check_squarable(name, x)


def check_ids(name: str, x: Any, count: int, meaning: str, device: torch.device) -> None:
    check_vector(name, x, count, meaning, device, INTEGERS)


def check_index(name: str, x: Any, count: int, meaning: str, device: torch.device, bound: int, what: str) -> None:
    """``x`` holds ``count`` places among ``bound`` ones; their range is checked where reading them is free."""
    check_ids(name, x, count, meaning, device)
    if readable(x) and bool(((x < 0) | (x >= bound)).any()):
        at = int(((x < 0) | (x >= bound)).nonzero()[0, 0])
        raise ValueError(f"{name} must lie in [0, {bound}), the {what}; it is {int(x[at])} at index {at}")


def check_order(name: str, x: Any, count: int, meaning: str, device: torch.device) -> None:
    """``x`` holds ``count`` indices, at least 0 where reading them is free."""
    check_ids(name, x, count, meaning, device)
    if readable(x):
        check_values(name, x, 0)


def taken(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]`` of floats; NaN for a place that does not exist, where :func:`check_index` could not read it."""
    if readable(index):
        return x[index]
    inside = (index >= 0) & (index < x.shape[0])
    return torch.where(inside, x[torch.where(inside, index, 0)], torch.nan) if x.shape[0] else x.new_zeros(index.shape)


def widened(x: Tensor) -> Tensor:
    """The dtype of a result: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def pair_ids(*keys: Tensor) -> Tensor:  # [N] each
    """Dense ids of equal tuples (a_i, b_i, ...), ascending like the tuples, int64 ``[N]``; reads no device value."""
    order = torch.arange(keys[0].shape[0], device=keys[0].device)
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    changed = torch.zeros_like(order, dtype=torch.bool)
    for key in keys:
        ranked = key[order]
        changed[1:] |= ranked[1:] != ranked[:-1]
    return torch.empty_like(order).scatter(0, order, changed.cumsum(0))


def group_sum(
    x: Tensor,  # [N]
    ids: Tensor,  # [N] in [0, N)
) -> Tensor:
    """Each row's group's sum, ``[N]``: int64 for integers and flags, float64 for floats, in a fixed order."""
    wide = x.double() if x.is_floating_point() else x.long()
    # unlike index_add, index_put sorts on a GPU, so the order of a sum does not depend on the run
    return torch.zeros_like(wide).index_put((ids,), wide, accumulate=True)[ids]


def check_packing(cu_seqlens: Any, tokens: int, device: torch.device) -> int:
    """The number of trajectories that ``cu_seqlens`` bounds."""
    check_boundaries("cu_seqlens", cu_seqlens, device)
    if readable(cu_seqlens):
        check_cu_seqlens(cu_seqlens, tokens)
    return cu_seqlens.shape[0] - 1


def to_tokens(
    values: Tensor,  # [N]
    cu_seqlens: Tensor,  # [N+1]
    tokens: int,
) -> Tensor:
    """Each token's trajectory's value, ``[T]``."""
    return spread(values, trajectories(cu_seqlens, tokens))


def leaf_means(leaf_rewards: Tensor, tree: Tree) -> Tensor:  # [L]
    """V(n) = mean of the rewards of the leaves below n, float64 ``[M]``; exactly their value where they are equal."""
    x = leaf_rewards.double()
    return subtree_reduce(x, tree, "mean").clamp(subtree_reduce(x, tree, "min"), subtree_reduce(x, tree, "max"))


def parents(tree: Tree) -> Tensor:
    """The layout's own, int64 ``[M]``: what it was given may lie in memory that others write into."""
    return tree.arrays[0].long()


def check_tree(leaf_rewards: Any, tree: Any) -> None:
    if not isinstance(tree, Tree):
        raise TypeError(f"tree must be a Tree, got {type(tree).__name__}")
    check_vector("leaf_rewards", leaf_rewards, tree.num_leaves, "one reward a leaf", tree.device)
