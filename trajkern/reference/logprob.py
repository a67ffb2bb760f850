"""Token log-probs and softmax statistics in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trajkern._types import TokenStats


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
        temperature = temperature.to(z.dtype)[..., None]
    z = z / temperature
    target = targets.long()[..., None]
    z_target = z.gather(-1, target).squeeze(-1)
    # a token that is certain needs the mass of the others, not 1 minus its own
    if z.shape[-1] == 1:
        logprobs = z_target - z_target
        largest_other = torch.full_like(z_target, -torch.inf)
    else:
        others = z.scatter(-1, target, -torch.inf)
        logprobs = -torch.logaddexp(torch.zeros_like(z_target), others.logsumexp(-1) - z_target)
        largest_other = others.detach().amax(-1)

    def masked(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x, 0)

    logp = z.log_softmax(-1)
    p = logp.exp()
    return TokenStats(
        masked(logprobs),
        masked(-torch.where(p > 0, p * logp, 0).sum(-1)) if "entropy" in outputs else None,
        masked(p.detach().square().sum(-1)) if "sum_sq_probs" in outputs else None,
        masked(z_target.detach() >= largest_other).bool() if "is_top1" in outputs else None,
    )
