"""The divergences of a student from a teacher in plain torch: the whole logits are formed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trajkern._dtypes import accumulator
from trajkern.reference.head import logits


def linear_divergence(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [T, H']
    teacher_weight: Tensor,  # [V', H']
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,  # [V']
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    vocabulary: int | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,  # [T]
    **_: Any,
) -> Tensor:
    """See :func:`trajkern.linear_divergence`; the workspace has no meaning here."""
    if mask is not None:
        hidden, teacher_hidden = (torch.where(mask[:, None], h, 0) for h in (hidden, teacher_hidden))
    weight, teacher_weight = weight[:vocabulary], teacher_weight[:vocabulary]
    bias, teacher_bias = (None if b is None else b[:vocabulary] for b in (bias, teacher_bias))
    z = logits(hidden, weight, bias, softcap, logit_scale)
    student = torch.log_softmax(z / temperature, -1)
    with torch.no_grad():
        z = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
        teacher = torch.log_softmax(z / temperature, -1)
    divergence = _divergence(student, teacher, beta)
    return divergence if mask is None else torch.where(mask, divergence, 0)


def topk_divergence(
    student_logprobs: Tensor,  # [T, K]
    teacher_logprobs: Tensor,  # [T, K]
    *,
    ids: Tensor | None = None,  # [T, K]
    beta: float = 0.0,
    mask: Tensor | None = None,  # [T]
) -> Tensor:
    """See :func:`trajkern.topk_divergence`. In float64: the tail is what little the K ids leave of 1."""
    student, teacher = student_logprobs.double(), teacher_logprobs.detach().double()
    if ids is not None:
        student, teacher = (counted_once(x, ids) for x in (student, teacher))
    if mask is not None:
        uniform = -math.log(student.shape[1] + 1)
        student, teacher = (torch.where(mask[:, None], x, uniform) for x in (student, teacher))
    student, teacher = (torch.cat((x, _log_tail(x)), -1) for x in (student, teacher))
    divergence = _divergence(student, teacher, beta)
    if mask is not None:
        divergence = torch.where(mask, divergence, 0)
    return divergence.to(accumulator(student_logprobs))


def counted_once(logprobs: Tensor, ids: Tensor) -> Tensor:  # [T, K]
    """p = 0 where a row has named the id before."""
    ordered, order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.where(torch.empty_like(again).scatter_(1, order, again), -math.inf, logprobs)


def _log_tail(logprobs: Tensor) -> Tensor:  # [T, K] -> [T, 1]
    total = logprobs.exp().sum(-1, keepdim=True)
    some = total < 1
    floor = math.log(torch.finfo(total.dtype).tiny)
    return torch.where(some, torch.log1p(-torch.where(some, total, 0)), floor)


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Of log-probs [..., V] along the last dimension; see :func:`trajkern.linear_divergence`."""
    neither = (student == -math.inf) & (teacher == -math.inf)  # exp(-1e4) is 0, and its products are not NaN
    student, teacher = (torch.where(neither, -1e4, x) for x in (student, teacher))
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log p - log q) of log-probs; a p of 0 adds 0."""
    none = p == -math.inf  # a NaN is not: it reaches the sum
    p, q = (torch.where(none, -1e4, x) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1)
