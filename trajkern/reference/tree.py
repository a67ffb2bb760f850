"""Reductions over subtrees and siblings in plain torch: every leaf walks up to its root."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern._results import Branch
from trajkern.reference._scale import unit_of


def _accumulated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _paths(tree: Any) -> tuple[Tensor, Tensor]:
    """(node, leaf) for every node on the path of every leaf; node M where a path is shorter than the longest."""
    above = torch.cat([tree.parent.long(), tree.parent.new_full((1,), -1).long()])
    above = torch.where(above < 0, tree.num_nodes, above)
    nodes = [tree.leaves]
    for _ in range(tree.levels - 1):
        nodes.append(above[nodes[-1]])
    leaf = torch.arange(tree.num_leaves, device=tree.device)
    return torch.cat(nodes), leaf.repeat(len(nodes))


def _sums(x: Tensor, index: Tensor, count: int) -> Tensor:
    return torch.zeros(count + 1, dtype=x.dtype, device=x.device).index_add(0, index, x)


def subtree_reduce(
    leaf_values: Tensor,  # [L]
    tree: Any,
    op: str = "mean",
) -> Tensor:
    """See :func:`trajkern.subtree_reduce`."""
    x, m = _accumulated(leaf_values), tree.num_nodes
    node, leaf = _paths(tree)
    if op in ("max", "min"):
        best = torch.zeros(m + 1, dtype=x.dtype, device=x.device)
        best = best.scatter_reduce(0, node, x.detach()[leaf], f"a{op}", include_self=False)
        place = torch.where(x.detach()[leaf] == best[node], leaf, tree.num_leaves)
        first = torch.full((m + 1,), tree.num_leaves, device=x.device).scatter_reduce(0, node, place, "amin")
        return x[first[:m]]
    total = _sums(x[leaf], node, m)
    if op == "sum":
        return total[:m]
    count = _sums(torch.ones_like(x)[leaf], node, m).clamp_min(1)
    mean = total / count
    if op == "mean":
        return mean[:m]
    if op != "var":
        raise ValueError(f"op must be a reduction of trajkern.subtree_reduce, got {op!r}")
    # measured from a leaf below, equal leaves have a variance of exactly zero
    origin = torch.zeros_like(mean).scatter(0, node, x[leaf].detach()).detach()
    d = x[leaf] - origin[node]
    centred = d - (_sums(d, node, m) / count)[node]
    return (_sums(centred.square(), node, m) / count)[:m]


def sibling_advantages(
    node_values: Tensor,  # [M]
    tree: Any,
    *,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "raw",
) -> Tensor:
    """See :func:`trajkern.sibling_advantages`."""
    v, m = _accumulated(node_values), tree.num_nodes
    root = tree.parent < 0
    family = torch.where(root, m, tree.parent.long())
    node = torch.arange(m, device=v.device)
    first = torch.full((m + 1,), m, device=v.device).scatter_reduce(0, family, node, "amin")[family]
    origin = torch.cat([v, v.new_zeros(1)])[first].detach()
    d = v - origin
    count = _sums(torch.ones_like(v), family, m)[family]
    sum_d = _sums(d, family, m)[family]
    alone = count == 1
    if baseline == "mean":
        out = torch.where(alone, v, d - sum_d / count)
    elif baseline == "leave_one_out":
        out = torch.where(alone, v, d - (sum_d - d) / torch.where(alone, 1, count - 1))
    elif baseline == "parent":
        out = v - v[torch.where(root, 0, tree.parent.long())]
    else:
        out = v
    if scale == "std":
        unit = unit_of(v.new_zeros(m + 1).scatter_reduce(0, family, d.detach().abs(), "amax"))[family]
        variance = _sums(((d - sum_d / count) / unit).square(), family, m)[family] / (count - ddof).clamp_min(1)
        # the square root has no finite derivative at zero; that of equal siblings is taken as zero
        std = unit * torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
        divisor = torch.where(alone, 1, std) + eps
        out = out / torch.where(divisor == 0, 1, divisor)
    if singleton == "zero" and baseline in ("mean", "leave_one_out"):
        out = torch.where(alone, 0, out)
    return torch.where(root, 0, out)


def branch_coefficients(
    leaf_advantages: Tensor,  # [L]
    tree: Any,
    *,
    leaf_weights: Tensor | None = None,  # [L]
) -> Branch:
    """See :func:`trajkern.branch_coefficients`."""
    a = _accumulated(leaf_advantages)
    w = torch.ones_like(a) if leaf_weights is None else leaf_weights.detach().to(a.dtype)
    node, leaf = _paths(tree)
    leaves = Branch.of(a, w, (w != 0).to(a.dtype))
    return Branch(*(_sums(x[leaf], node, tree.num_nodes)[: tree.num_nodes] for x in leaves))
