"""Launchers of csrc/cpu/logprob.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._dtypes import accumulator
from trajkern._native._args import DTYPE, as_rows, pointer, rows
from trajkern._values import check_targets


def token_stats(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    temperatures: Tensor | None,  # [...]
    temperature: float,
    mask: Tensor | None,  # [...]
    outputs: int,
) -> list[Tensor]:
    x = as_rows(logits)
    dtype = accumulator(x)
    shape = targets.shape
    stats = [torch.empty(shape, dtype=dtype, device="cpu"), torch.empty((*shape, 2), dtype=dtype, device="cpu")]
    pointers = [x.data_ptr() for x in stats] + [0, 0, 0]
    for i, kind in enumerate((dtype, dtype, torch.bool)):
        if outputs >> i & 1:
            stats.append(torch.empty(shape, dtype=kind, device="cpu"))
            pointers[2 + i] = stats[-1].data_ptr()
    if _ext.cpu().token_stats(DTYPE[x.dtype], *_problem(x, targets, temperatures, temperature, mask), pointers) >= 0:
        check_targets(targets, x.shape[-1], mask)
    return stats


def _problem(
    x: Tensor, targets: Tensor, temperatures: Tensor | None, temperature: float, mask: Tensor | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Where the logits lie, and what is asked of them."""
    outer, inner, *strides = rows(x)
    asked = (outer, inner, x.shape[-1], targets.data_ptr(), temperature, pointer(temperatures), pointer(mask))
    return (x.data_ptr(), *strides), asked


def _backward(
    grad_logits: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    mask: Tensor | None,
    *saved: Tensor | None,
) -> None:
    """``saved``: log-probs, norm and entropy."""
    upstreams = _flat(grad_logprobs), _flat(grad_entropy)
    _ext.cpu().token_stats_backward(
        DTYPE[logits.dtype],
        (grad_logits.data_ptr(), *rows(grad_logits)[2:]),
        *_problem(logits, targets, temperatures, temperature, mask),
        [(pointer(x), 0 if x is None else x.stride(0)) for x in upstreams],
        [pointer(x) for x in saved],
    )


def _flat(x: Tensor | None) -> Tensor | None:
    """One dimension; an expanded scalar (the upstream of a sum) stays one number."""
    if x is None or x.ndim == 1:
        return x
    if not any(x.stride()):
        return x.as_strided((x.numel(),), (0,))
    return x.reshape(-1)


def token_stats_backward(grad_logprobs: Tensor, grad_entropy: Tensor | None, logits: Tensor, *saved) -> Tensor:
    x = as_rows(logits)
    grad_logits = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    _backward(grad_logits, grad_logprobs, grad_entropy, x, *saved)
    return grad_logits.view(logits.shape)


def token_stats_backward_(grad_logprobs: Tensor, grad_entropy: Tensor | None, logits: Tensor, *saved) -> None:
    x = as_rows(logits)
    _backward(x, grad_logprobs, grad_entropy, x, *saved)
    if x.data_ptr() != logits.data_ptr():
        logits.copy_(x.view(logits.shape))
