"""Launchers of csrc/cpu/policy_loss.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._native._args import DTYPE, check_cu_seqlens, pointer


def policy_loss(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor,  # [T]
    advantages: Tensor,  # [N] or [T]
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
    check_cu_seqlens(cu_seqlens, tokens)
    loss, metrics = torch.empty((), dtype=dtype), torch.empty(7, dtype=dtype)
    grads = [torch.empty(tokens, dtype=dtype) if need else None for need in options[6:]]
    pointers = map(pointer, (logprobs, old_logprobs, advantages, ref_logprobs, sampler_logprobs, entropy, normalizer,
                             cu_seqlens, mask, selected, loss, metrics, *grads))  # fmt: skip
    _ext.cpu().policy_loss(DTYPE[dtype], [*pointers], tokens, cu_seqlens.shape[0] - 1, options, params)
    return [loss, metrics, *(g for g in grads if g is not None)]


def scale_gradient_(x: Tensor, scale: Tensor) -> None:
    _ext.cpu().scale_gradient_(DTYPE[x.dtype], x.data_ptr(), x.shape[0], scale.data_ptr())
