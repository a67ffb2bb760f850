"""The metrics of the policy loss, by the table of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern.losses.kinds import METRICS, SAMPLER_BAND


def sampler_values(log_w: Tensor | None) -> dict[str, Tensor | None]:
    """What the metrics of w, the ratio of the old policy to the sampler, are made of, ``[T]``."""
    names = [name for name, metric in METRICS.items() if metric.needs == "sampler_logprobs"]
    if log_w is None:
        return dict.fromkeys(names)
    w, (low, high) = log_w.exp(), SAMPLER_BAND
    outside = ((w < low) | (w > high)).to(w.dtype)
    return dict(zip(names, (torch.expm1(log_w) - log_w, outside, w), strict=True))


def metrics_of(values: dict[str, Tensor | None], copies: Tensor, segments: Any) -> dict[str, Tensor]:
    """Over the tokens of all ranks, each as often as it has unmasked rollouts; NaN where there are no values.

    ``segments`` adds up, and takes the largest, over ranks.
    """
    found = {name: _reduced(values[name], metric.reduction, copies, segments) for name, metric in METRICS.items()}
    return {name: x.detach().to(copies.dtype) for name, x in found.items()}


def _reduced(x: Tensor | None, reduction: str, copies: Tensor, segments: Any) -> Tensor:
    count, some = segments.added(copies.sum()), copies > 0
    if x is None:
        return count.new_full((), torch.nan)
    if reduction == "largest":
        return segments.largest(torch.where(some, x, 0).amax() if x.numel() else x.new_zeros(()))
    wide = copies.dtype if segments.ranks is None else torch.float64  # in which the order of the ranks is none
    total = segments.added(torch.where(some, x * copies, 0).to(wide).sum())
    if reduction == "mean":
        return total / count.clamp_min(1)
    if reduction == "sum":
        return total
    if reduction == "effective_share":
        squares = segments.added(torch.where(some, x * x * copies, 0).to(wide).sum())
        return total * total / torch.where(count > 0, count * squares, 1)
    raise AssertionError(f"unknown reduction {reduction!r}")
