"""Token log-probs and softmax statistics in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trajkern._results import TokenStats


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """See :func:`trajkern.token_logprobs`; ``inplace_backward`` has no meaning here."""
    return token_stats(logits, targets, outputs=(), temperature=temperature, mask=mask).logprobs


def token_stats(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    *,
    outputs: Sequence[str] = ("entropy",),
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,  # [...]
    inplace_backward: bool = False,
) -> TokenStats:
    """See :func:`trajkern.token_stats`; ``inplace_backward`` has no meaning here."""
    z = logits.double() if logits.dtype == torch.float64 else logits.float()
    if mask is not None:
        z = torch.where(mask[..., None], z, 0)
        targets = torch.where(mask, targets, 0)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(z.dtype)[..., None]
    target = targets.long()[..., None]
    z_target = z.gather(-1, target)
    # Measured from the largest logit, the target's where it ties: then log p = -log1p(mass of the others), which keeps
    # its precision, and its gradient's, as p -> 1.
    largest, pivot = z.detach().max(-1, keepdim=True)
    poison = largest - largest  # NaN where the largest is not finite, as for torch.log_softmax
    is_top1 = (z_target >= largest) & (poison == 0)
    pivot = torch.where(is_top1, target, pivot)
    u = (z - z.gather(-1, pivot)) / temperature + poison
    log_norm = u.exp().scatter(-1, pivot, 0).sum(-1, keepdim=True).log1p()
    logprobs = torch.where(is_top1, 0, u.gather(-1, target)) - log_norm
    logp = u - log_norm
    p = logp.exp()

    def masked(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x, 0)

    return TokenStats(
        masked(logprobs.squeeze(-1)),
        masked(-(p * torch.where(p > 0, logp, 0)).sum(-1)) if "entropy" in outputs else None,
        masked(p.detach().square().sum(-1)) if "sum_sq_probs" in outputs else None,
        masked(is_top1.squeeze(-1)).bool() if "is_top1" in outputs else None,
    )
