"""Launchers of csrc/cpu/policy_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._checks import check_cu_seqlens
from trajkern._native._args import DTYPE, pointer


def policy_loss(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor,  # [T]
    advantages: Tensor,  # [N] or [T], or a branch's rows of them [6, N or T]
    cu_seqlens: Tensor,  # [N+1]
    mask: Tensor | None,  # [T]
    ref_logprobs: Tensor | None,  # [T]
    sampler_logprobs: Tensor | None,  # [T]
    entropy: Tensor | None,  # [T]
    selected: Tensor | None,  # [T]
    normalizer: Tensor | None,  # []
    options: list[int],
    params: list[float],
) -> list[Tensor]:
    tokens, dtype = logprobs.shape[0], logprobs.dtype
    loss, metrics = torch.empty((), dtype=dtype), torch.empty(7, dtype=dtype)
    grad = torch.empty(tokens, dtype=dtype) if options[6] else None
    grad_entropy = torch.empty(tokens, dtype=dtype) if options[7] else None
    pointers = [
        logprobs.data_ptr(),
        old_logprobs.data_ptr(),
        advantages.data_ptr(),
        pointer(ref_logprobs),
        pointer(sampler_logprobs),
        pointer(entropy),
        pointer(normalizer),
        cu_seqlens.data_ptr(),
        pointer(mask),
        pointer(selected),
        loss.data_ptr(),
        metrics.data_ptr(),
        pointer(grad),
        pointer(grad_entropy),
    ]
    sizes = tokens, cu_seqlens.shape[0] - 1, advantages.shape[1] if advantages.ndim == 2 else 0
    if not _ext.cpu().policy_loss(DTYPE[dtype], pointers, *sizes, options, params):
        check_cu_seqlens(cu_seqlens, tokens)
    return [x for x in (loss, metrics, grad, grad_entropy) if x is not None]


def scale_gradient_(x: Tensor, scale: Tensor) -> None:
    _ext.cpu().scale_gradient_(DTYPE[x.dtype], x.data_ptr(), x.shape[0], scale.data_ptr())
