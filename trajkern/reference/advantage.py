"""Group-relative advantages and segmented returns in plain torch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from trajkern._results import GAE
from trajkern.reference._scale import unit_of


def _accumulated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def group_advantages(
    rewards: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    *,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "raw",
    gate: Tensor | None = None,  # [N]
    weights: Tensor | None = None,  # [N]
) -> Tensor:
    """See :func:`trajkern.group_advantages`."""
    r = _accumulated(rewards)
    w = torch.ones_like(r) if weights is None else weights.detach().to(r.dtype)
    if gate is not None:
        w = torch.where(gate, w, 0)
    counted = w != 0
    r = torch.where(counted, r, 0)
    ids, group = torch.unique(group_ids, return_inverse=True)

    def group_sum(x: Tensor) -> Tensor:
        return torch.zeros(ids.numel(), dtype=r.dtype, device=r.device).index_add(0, group, x)[group]

    # measured from the group's first counted reward, a constant group is exactly zero and a large mean costs nothing
    position = torch.arange(r.numel(), device=r.device)
    first = torch.full((ids.numel(),), r.numel(), device=r.device).scatter_reduce(
        0, group[counted], position[counted], "amin"
    )
    origin = torch.cat([r, r.new_zeros(1)])[first][group].detach()
    d = torch.where(counted, r - origin, 0)
    largest = torch.zeros(ids.numel(), dtype=r.dtype, device=r.device).scatter_reduce(
        0, group, d.detach().abs(), "amax"
    )
    unit = unit_of(largest)[group]  # neither a sum nor a square of what is divided by it overflows
    d = d / unit
    total, sum_d = group_sum(w), group_sum(w * d)
    mean_d = sum_d / total.clamp_min(torch.finfo(r.dtype).tiny)
    alone = total <= 1
    if baseline == "mean":
        centred = d - mean_d
    elif baseline == "leave_one_out":
        centred = d - (sum_d - d) / torch.where(alone, 1, total - 1)
    else:
        centred = r / unit
    out = centred * unit
    if scale == "std":
        variance = group_sum(w * (d - mean_d).square()) / torch.where(alone, 1, total - ddof)
        # the square root has no finite derivative at zero; a constant group's is taken as zero
        std = unit * torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
        divisor = std + eps
        out = centred * (unit / torch.where(divisor == 0, 1, divisor))
    if baseline != "none" or scale != "none":
        raw = r / (1 + eps) if scale == "std" else r
        out = torch.where(alone, raw if singleton == "raw" else torch.zeros_like(r), out)
    return torch.where(counted, out, 0)


def discounted_returns(
    rewards: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N+1]
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,  # [T]
) -> Tensor:
    """See :func:`trajkern.discounted_returns`."""
    return gae(rewards, torch.zeros_like(rewards), cu_seqlens, gamma=gamma, lam=1.0, mask=mask).returns


def gae(
    rewards: Tensor,  # [T]
    values: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N+1]
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,  # [N]
    mask: Tensor | None = None,  # [T]
) -> GAE:
    """See :func:`trajkern.gae`. One token at a time: clear, not fast."""
    r, v = _accumulated(rewards), values.to(_accumulated(rewards).dtype)
    zero = (r + v)[:0].sum()  # with a gradient, of 0
    advantages = [zero] * r.numel()
    bounds = cu_seqlens.tolist()
    for n, (start, end) in enumerate(pairwise(bounds)):
        advantage, next_value = zero, zero if bootstrap is None else bootstrap[n].to(r.dtype)
        for t in range(end - 1, start - 1, -1):
            if mask is None or bool(mask[t]):
                advantage = r[t] + gamma * next_value - v[t] + gamma * lam * advantage
                next_value = v[t]
                advantages[t] = advantage
    stacked = torch.stack(advantages) if advantages else r + v
    returns = stacked + (v if mask is None else torch.where(mask, v, 0))
    return GAE(stacked, returns)


def whiten(
    x: Tensor,  # [T]
    *,
    mask: Tensor | None = None,  # [T]
    shift_mean: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
) -> Tensor:
    """See :func:`trajkern.whiten`."""
    x = _accumulated(x)
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    x = torch.where(keep, x, 0)
    count = keep.sum()
    largest = torch.cat((x.detach().abs(), x.new_ones(1))).amax()  # at least 1: eps must not overflow
    unit = unit_of(largest)
    x = x / unit
    mean = x.sum() / count.clamp_min(1)
    centred = torch.where(keep, x - mean, 0)
    variance = centred.square().sum() / (count - ddof).clamp_min(1)
    # the square root has no finite derivative at zero, where nothing is off the mean
    std = torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
    out = centred * (unit / torch.hypot(unit * std, unit.new_tensor(eps**0.5)))
    return out if shift_mean else torch.where(keep, out + mean * unit, 0)
