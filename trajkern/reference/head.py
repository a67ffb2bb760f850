"""The head in plain torch: the whole logits are formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trajkern._dtypes import accumulator
from trajkern._results import TokenStats
from trajkern.losses.config import PolicyLoss
from trajkern.reference.logprob import token_stats
from trajkern.reference.policy_loss import policy_loss


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """See :func:`trajkern.linear_logprobs`."""
    return linear_token_stats(hidden, weight, targets, outputs=(), **options).logprobs


def linear_token_stats(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [P]
    *,
    outputs: Sequence[str] = ("entropy",),
    rows: Tensor | None = None,  # [P]
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [T]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # [P]
    sampling_support: tuple[Tensor, Tensor] | None = None,  # [E], [P+1]
    logits_dtype: torch.dtype = torch.float32,
    **_: Any,
) -> TokenStats:
    """See :func:`trajkern.linear_token_stats`; the workspace has no meaning here."""
    rows = torch.arange(targets.shape[0], device=targets.device) if rows is None else rows.long()
    if mask is not None:
        rows, targets = torch.where(mask, rows, 0), torch.where(mask, targets, 0)
    h = hidden.index_select(0, rows) if hidden.shape[0] else hidden[:0]  # which takes no negative place
    if mask is not None:
        h = torch.where(mask[:, None], h, 0)
    z = logits(h, weight, bias, softcap, logit_scale, rounded=logits_dtype == hidden.dtype)
    t = temperature[rows] if isinstance(temperature, Tensor) else temperature
    mean = (z.detach() / (t[:, None] if isinstance(t, Tensor) else t)).mean(1)
    if sampling_support is not None:
        z = torch.where(_supported(sampling_support, z), z, -torch.inf)
    others = [name for name in outputs if name != "mean_logit"]
    stats = token_stats(z, targets, outputs=others, temperature=t, mask=mask)
    if "mean_logit" not in outputs:
        return stats
    return stats._replace(mean_logit=mean if mask is None else torch.where(mask, mean, 0))


def logits(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    softcap: float | None,
    logit_scale: float,
    *,
    rounded: bool = False,
) -> Tensor:
    """softcap(logit_scale (h w^T + bias)), in the accumulator's dtype, or each step ``rounded`` to the inputs'."""
    dtype = accumulator(hidden)
    if not rounded:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    z = hidden @ weight.t()
    if bias is not None:
        z = z + bias
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z.to(dtype)


def _supported(support: tuple[Tensor, Tensor], z: Tensor) -> Tensor:
    ids, offsets = support
    pair = torch.repeat_interleave(torch.arange(z.shape[0], device=z.device), offsets.diff(), output_size=ids.shape[0])
    keep = torch.zeros(z.shape, dtype=torch.bool, device=z.device)
    keep[pair, ids.long()] = True
    return keep


def linear_policy_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [P]
    old_logprobs: Tensor | None,  # [P]
    advantages: Tensor | None,  # [N] or [P]
    cu_seqlens: Tensor,  # [N+1]
    *,
    config: PolicyLoss,
    mask: Tensor | None = None,  # [P]
    ref_logprobs: Tensor | None = None,  # [P]
    sampler_logprobs: Tensor | None = None,  # [P]
    branch: Any = None,
    normalizer: float | Tensor | None = None,
    per_token: bool | None = None,
    supervised_weights: Tensor | None = None,  # [P]
    supervised_normalizer: float | Tensor | None = None,
    kl_weights: Tensor | None = None,  # [P]
    kl_normalizer: float | Tensor | None = None,
    with_entropy: bool = False,
    with_logprobs: bool = False,
    **head: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See :func:`trajkern.linear_policy_loss`."""
    outputs = ("entropy",) if config.entropy_coef or with_entropy else ()
    computed = mask
    for weights in (supervised_weights, kl_weights):
        if computed is not None and weights is not None:
            computed = computed | (weights != 0)
    stats = linear_token_stats(hidden, weight, targets, outputs=outputs, mask=computed, **head)
    old = stats.logprobs.detach() if old_logprobs is None else old_logprobs
    loss, metrics = policy_loss(
        stats.logprobs,
        old,
        advantages,
        cu_seqlens,
        config=config,
        mask=mask,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        entropy=stats.entropy,
        branch=branch,
        normalizer=normalizer,
        per_token=per_token,
        supervised_weights=supervised_weights,
        supervised_normalizer=supervised_normalizer,
        kl_weights=kl_weights,
        kl_normalizer=kl_normalizer,
    )
    return loss, metrics | ({"logprobs": stats.logprobs.detach()} if with_logprobs else {})
