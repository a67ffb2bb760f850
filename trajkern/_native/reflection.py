"""Launchers of csrc/cpu/reflection.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._native._args import DTYPE, pointer
from trajkern._values import check_cu_seqlens, check_equal_lengths, check_squarable


def reflection_groups(
    group_ids: Tensor,  # [N]
    cu_seqlens: Tensor,  # [N+1]
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    order, rank, bounds = torch.empty_like(group_ids), torch.empty_like(group_ids), torch.empty_like(cu_seqlens)
    legal = _ext.cpu().reflection_groups(
        group_ids.data_ptr(),
        cu_seqlens.data_ptr(),
        group_ids.shape[0],
        tokens,
        order.data_ptr(),
        rank.data_ptr(),
        bounds.data_ptr(),
    )
    if not legal:
        check_cu_seqlens(cu_seqlens, tokens)
        check_equal_lengths(cu_seqlens, group_ids)
    return order, rank, bounds


def _problem(
    logprobs: Tensor,
    cu_seqlens: Tensor,
    order: Tensor,
    rank: Tensor,
    bounds: Tensor,
    baseline: Tensor | None,
    ddof: int,
    normalize: bool,
) -> tuple[int, ...]:
    tensors = logprobs, cu_seqlens, order, rank, bounds, baseline
    return *(pointer(x) for x in tensors), order.shape[0], ddof, normalize


def reflection_rewards(
    logprobs: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    order: Tensor,  # [N]
    rank: Tensor,  # [N]
    bounds: Tensor,  # [N+1]
    baseline: Tensor | None,  # [P]
    ddof: int,
    normalize: bool,
    rewarded: bool,
) -> list[Tensor]:
    weights = torch.empty_like(logprobs)
    rewards, std, scores = (None, None, None)
    if rewarded:
        rewards, scores = (logprobs.new_empty(order.shape) for _ in range(2))
        std = torch.empty_like(logprobs)
    results = rewards, weights, std, scores
    legal = _ext.cpu().reflection_rewards(
        DTYPE[logprobs.dtype],
        _problem(logprobs, cu_seqlens, order, rank, bounds, baseline, ddof, normalize),
        [pointer(x) for x in results],
    )
    if not legal:
        check_squarable("logprobs", logprobs)
        if baseline is not None:
            check_squarable("baseline", baseline)
    return [x for x in results if x is not None]


def reflection_rewards_backward(
    logprobs: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    order: Tensor,  # [N]
    rank: Tensor,  # [N]
    bounds: Tensor,  # [N+1]
    baseline: Tensor | None,  # [P]
    *upstream: Any,
) -> list[Tensor]:
    """``upstream``: the gradients in rewards ``[N]``, weights ``[P]``, std ``[P]`` and scores ``[N]``; ddof, normalize,
    and whether logprobs and baseline need one."""
    *of_results, ddof, normalize, needs = upstream
    grads = [torch.empty_like(logprobs) if need else None for need in needs]
    _ext.cpu().reflection_rewards_backward(
        DTYPE[logprobs.dtype],
        _problem(logprobs, cu_seqlens, order, rank, bounds, baseline, ddof, normalize),
        [pointer(x) for x in of_results],
        [pointer(x) for x in grads],
    )
    return [x for x in grads if x is not None]
