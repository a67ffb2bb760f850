"""DRO's reflection reward in plain torch, one group after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern._results import Reflection
from trajkern.reference._scale import unit_of


def variance_weights(
    logprobs: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    group_ids: Tensor,  # [N]
    *,
    ddof: int = 0,
    normalize: bool = True,
) -> Tensor:
    """See :func:`trajkern.variance_weights`."""
    return reflection_rewards(logprobs, cu_seqlens, group_ids, ddof=ddof, normalize=normalize).weights


def reflection_rewards(
    logprobs: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    group_ids: Tensor,  # [N]
    *,
    baseline: Tensor | None = None,  # [P]
    ddof: int = 0,
    normalize: bool = True,
) -> Reflection:
    """See :func:`trajkern.reflection_rewards`."""
    x = logprobs if logprobs.dtype == torch.float64 else logprobs.float()
    gain = x if baseline is None else x - baseline.to(x.dtype)
    bounds = cu_seqlens.tolist()
    rewards, scores = x.new_zeros(group_ids.shape[0]), []
    weights, std = x * 0, x * 0
    for group in group_ids.unique():  # ascending
        members = (group_ids == group).nonzero()[:, 0]
        tokens = torch.stack([torch.arange(bounds[n], bounds[n + 1], device=x.device) for n in members.tolist()])
        s = _deviation(x[tokens], ddof)
        total = s.sum()
        w = s / torch.where(total == 0, 1, total) if normalize else s
        rewards = rewards.index_put((members,), (w * gain[tokens]).sum(1))
        weights, std = (y.index_put((tokens,), v.expand(tokens.shape)) for y, v in ((weights, w), (std, s)))
        scores.append(s[s.detach().argmax()] if s.numel() else s.sum())
    return Reflection(rewards, weights, std, torch.stack(scores) if scores else x.new_zeros(0))


def _deviation(x: Tensor, ddof: int) -> Tensor:
    """Of each column of [K, L]; 0, with a gradient of 0, where a column is constant or K is too small."""
    if x.shape[0] <= ddof:
        return (x * 0).sum(0)
    d = x - x[0].detach()  # exact where the column is constant, and a large common value costs nothing
    unit = unit_of(d.abs().amax(0))
    variance = ((d - d.mean(0)) / unit).square().sum(0) / (x.shape[0] - ddof)
    return unit * torch.where(variance > 0, torch.where(variance > 0, variance, 1).sqrt(), 0)
