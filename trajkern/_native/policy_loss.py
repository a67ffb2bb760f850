"""Launchers of csrc/cpu/policy_loss.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._checks import check_cu_seqlens
from trajkern._native._args import DTYPE, pointer
from trajkern.losses.inputs import fill_without_tokens
from trajkern.losses.kinds import METRICS


def policy_loss(
    logprobs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    selected: Tensor | None,  # [T]
    *inputs: Any,
) -> list[Tensor]:
    """``inputs``: those of :class:`LossInputs`, of which ``options`` has all of kinds.OPTIONS."""
    old_logprobs, advantages, cu_seqlens, mask, ref_logprobs, sampler_logprobs, normalizer, options, params = inputs
    tokens, dtype = logprobs.shape[0], logprobs.dtype
    loss, metrics = torch.empty((), dtype=dtype), torch.empty(len(METRICS), dtype=dtype)
    grad_logprobs = torch.empty(tokens, dtype=dtype) if options[-2] else None
    grad_entropy = torch.empty(tokens, dtype=dtype) if options[-1] else None
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
        pointer(grad_logprobs),
        pointer(grad_entropy),
    ]
    sizes = tokens, cu_seqlens.shape[0] - 1, advantages.shape[1] if advantages.ndim == 2 else 0
    if not _ext.cpu().policy_loss(DTYPE[dtype], pointers, *sizes, options, params):
        check_cu_seqlens(cu_seqlens, tokens)
    if tokens == 0:  # tensors without an address, by which the kernel knows what is given
        fill_without_tokens(metrics, entropy=entropy, ref_logprobs=ref_logprobs, sampler_logprobs=sampler_logprobs)
    return [x for x in (loss, metrics, grad_logprobs, grad_entropy) if x is not None]


def scale_gradients_(first: Tensor, second: Tensor | None, scale: Tensor) -> None:
    for x in (first, second):
        if x is not None:
            _ext.cpu().scale_gradient_(DTYPE[x.dtype], x.data_ptr(), x.shape[0], scale.data_ptr())
