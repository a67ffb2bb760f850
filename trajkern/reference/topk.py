"""The likeliest tokens of a head in plain torch: the whole logits are formed."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern._results import TopK
from trajkern.reference.head import logits


def linear_topk(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    k: int,
    *,
    rows: Tensor | None = None,  # [P]
    targets: Tensor | None = None,  # [P] or [P, M]
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [T]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # [P]
    **_: object,
) -> TopK:
    """See :func:`trajkern.linear_topk`; the workspace has no meaning here."""
    count = hidden.shape[0] if rows is None else rows.shape[0]
    rows = torch.arange(count, device=hidden.device) if rows is None else rows.long()
    keep = torch.ones(count, dtype=torch.bool, device=hidden.device) if mask is None else mask
    rows = torch.where(keep, rows, 0)
    h = hidden.index_select(0, rows) if hidden.shape[0] else hidden[:0]
    z = logits(torch.where(keep[:, None], h, 0), weight, bias, softcap, logit_scale)
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().to(z.dtype)[rows][:, None]
    ids = z.detach().sort(dim=1, descending=True, stable=True).indices[:, :k]  # equal ones stay in the order of ids
    top = ids[:, :1]
    largest = z.detach().gather(1, top)
    u = (z - z.gather(1, top)) / temperature + (largest - largest)  # NaN where the largest is not finite
    rest = u.exp().scatter(1, top, 0).sum(1, keepdim=True)  # without the largest, whose own term is 1
    log_norm = rest.log1p()
    logprobs = u.gather(1, ids).scatter(1, torch.zeros_like(top), 0) - log_norm
    tail = _log_tail(u, ids)
    of_targets = None
    if targets is not None:
        target = torch.where(keep[:, None], targets.long().view(count, -1), 0)
        of_targets = torch.where(target == top, 0, u.gather(1, target)) - log_norm
        of_targets = torch.where(keep[:, None], of_targets, 0).view(targets.shape)
    return TopK(
        torch.where(keep[:, None], logprobs, 0),
        torch.where(keep[:, None], ids, 0),
        torch.where(keep, tail, 0),
        of_targets,
    )


def _log_tail(u: Tensor, ids: Tensor) -> Tensor:
    """log of what the ids leave of the softmax of ``u`` [P, V], which is 0 at the largest: [P].

    From the mass outside itself, which 1 minus the mass inside would lose.
    """
    first = torch.zeros_like(u, dtype=torch.bool).scatter(1, ids[:, :1], True)
    inside = first.scatter(1, ids, True)
    others = torch.where(inside, -torch.inf, u)
    peak = others.detach().amax(1, keepdim=True)
    some = peak > -torch.inf  # not of a NaN, which reaches the result by log_inside
    peak = torch.where(some, peak, 0)
    outside = torch.where(inside, -torch.inf, u - peak).exp().sum(1, keepdim=True)
    log_outside = peak + torch.where(some, outside, 1).log()
    log_inside = torch.where(inside & ~first, u, -torch.inf).exp().sum(1, keepdim=True).log1p()
    tail = -torch.logaddexp(torch.zeros_like(log_inside), log_inside - log_outside)
    return torch.where(some | log_inside.isnan(), tail, -torch.inf).squeeze(1)
