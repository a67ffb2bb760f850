"""Launchers of csrc/cpu/policy_loss.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._native._args import DTYPE, pointer
from trajkern._values import check_cu_seqlens
from trajkern.losses.inputs import LossInputs, fill_without_tokens


def policy_loss(
    logprobs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    selected: Tensor | None,  # [T]
    *inputs: Any,
) -> list[Tensor]:
    """``inputs``: those of :class:`LossInputs`, of which ``options`` has all of kinds.OPTIONS."""
    x = LossInputs(*inputs)
    assert x.old_logprobs is not None
    tokens, dtype = logprobs.shape[0], logprobs.dtype
    loss, metrics = torch.empty((), dtype=dtype, device="cpu"), torch.empty(len(x.metrics), dtype=dtype, device="cpu")
    grad_logprobs = torch.empty(tokens, dtype=dtype, device="cpu") if x.options[-2] else None
    grad_entropy = torch.empty(tokens, dtype=dtype, device="cpu") if x.options[-1] else None
    pointers = [
        logprobs.data_ptr(),
        x.old_logprobs.data_ptr(),
        x.advantages.data_ptr(),
        pointer(x.ref_logprobs),
        pointer(x.sampler_logprobs),
        pointer(entropy),
        pointer(x.normalizer),
        x.cu_seqlens.data_ptr(),
        pointer(x.mask),
        pointer(selected),
        loss.data_ptr(),
        metrics.data_ptr(),
        pointer(grad_logprobs),
        pointer(grad_entropy),
        pointer(x.supervised_weights),
        pointer(x.supervised_normalizer),
        pointer(x.kl_weights),
        pointer(x.kl_normalizer),
    ]
    sizes = tokens, x.cu_seqlens.shape[0] - 1, x.advantages.shape[1] if x.advantages.ndim == 2 else 0
    if not _ext.cpu().policy_loss(DTYPE[dtype], pointers, *sizes, x.options, x.params):
        check_cu_seqlens(x.cu_seqlens, tokens)
    if tokens == 0:  # tensors without an address, by which the kernel knows what is given
        given = {"ref_logprobs": x.ref_logprobs, "sampler_logprobs": x.sampler_logprobs}
        fill_without_tokens(metrics, entropy=entropy, **given)
    return [result for result in (loss, metrics, grad_logprobs, grad_entropy) if result is not None]


def scale_gradients_(first: Tensor, second: Tensor | None, scale: Tensor) -> None:
    for x in (first, second):
        if x is not None:
            _ext.cpu().scale_gradient_(DTYPE[x.dtype], x.data_ptr(), x.shape[0], scale.data_ptr())
