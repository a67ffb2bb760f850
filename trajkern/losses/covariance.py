"""Which tokens have the largest covariance of advantage and log-prob (the choice that kl_cov and clip_cov make)."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_covariances(
    advantages: Tensor,  # [T]
    logprobs: Tensor,  # [T]
    mask: Tensor,  # [T]
    candidates: Tensor,  # [T]
    fraction: float,
    band: tuple[float, float] | None = None,
) -> Tensor:
    """True on the k candidates of largest (A - mean A)(log p - mean log p), ties to the earlier token, ``[T]``.

    The means run over ``mask``; k = max(1, floor(fraction * masked tokens)); with ``band`` only covariances strictly
    inside it are candidates, of which there may be fewer than k. Nothing is read on the host.
    """
    with torch.no_grad():
        count = mask.sum()

        def centred(x: Tensor) -> Tensor:
            x = torch.where(mask, x.double(), 0)
            return x - x.sum() / count.clamp_min(1)

        covariance = centred(advantages) * centred(logprobs)
        if band is not None:
            candidates = candidates & (covariance > band[0]) & (covariance < band[1])
        order = torch.where(candidates, covariance, -torch.inf).sort(descending=True, stable=True).indices
        k = (fraction * count.double()).floor().clamp_min(1)
        chosen = torch.zeros_like(mask).scatter(0, order, torch.arange(order.numel(), device=mask.device) < k)
        return chosen & candidates
