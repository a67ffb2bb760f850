"""Launchers of csrc/cpu/logprob.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._checks import check_targets
from trajkern._dtypes import accumulator
from trajkern._native._args import DTYPE, as_rows, pointer, rows


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
    made = [torch.empty(shape, dtype=dtype), torch.empty((*shape, 2), dtype=dtype)]
    asked = [0, 0, 0]
    for i, kind in enumerate((dtype, dtype, torch.bool)):
        if outputs >> i & 1:
            made.append(torch.empty(shape, dtype=kind))
            asked[i] = made[-1].data_ptr()
    bad = _ext.cpu().token_stats(
        x.data_ptr(),
        DTYPE[x.dtype],
        *rows(x),
        x.shape[-1],
        targets.data_ptr(),
        temperature,
        pointer(temperatures),
        pointer(mask),
        outputs,
        made[0].data_ptr(),
        made[1].data_ptr(),
        *asked,
    )
    if bad >= 0:
        check_targets(targets, x.shape[-1], mask)
    return made


def _backward(
    grad_logits: Tensor,
    grad_logprobs,
    grad_entropy,
    logits,
    targets,
    temperatures,
    temperature,
    mask,
    logprobs,
    norm,
    entropy,
) -> None:
    outer, inner, *strides = rows(logits)
    grad_strides = rows(grad_logits)[2:]
    grad_logprobs, grad_entropy = _flat(grad_logprobs), _flat(grad_entropy)
    _ext.cpu().token_stats_backward(
        grad_logits.data_ptr(),
        *grad_strides,
        logits.data_ptr(),
        DTYPE[logits.dtype],
        outer,
        inner,
        *strides,
        logits.shape[-1],
        targets.data_ptr(),
        temperature,
        pointer(temperatures),
        pointer(mask),
        grad_logprobs.data_ptr(),
        grad_logprobs.stride(0),
        pointer(grad_entropy),
        0 if grad_entropy is None else grad_entropy.stride(0),
        logprobs.data_ptr(),
        norm.data_ptr(),
        pointer(entropy),
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
    grad_logits = torch.empty(x.shape, dtype=x.dtype)
    _backward(grad_logits, grad_logprobs, grad_entropy, x, *saved)
    return grad_logits.view(logits.shape)


def token_stats_backward_(grad_logprobs: Tensor, grad_entropy: Tensor | None, logits: Tensor, *saved) -> None:
    x = as_rows(logits)
    _backward(x, grad_logprobs, grad_entropy, x, *saved)
    if x.data_ptr() != logits.data_ptr():
        logits.copy_(x.view(logits.shape))
