"""Launchers of csrc/cpu/reflection.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._checks import check_cu_seqlens, check_equal_lengths, check_finite
from trajkern._native._args import DTYPE, pointer


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


def _grouped(
    logprobs: Tensor, cu_seqlens: Tensor, order: Tensor, rank: Tensor, bounds: Tensor, baseline: Tensor | None
) -> tuple[int, ...]:
    return (
        DTYPE[logprobs.dtype],
        logprobs.data_ptr(),
        cu_seqlens.data_ptr(),
        order.data_ptr(),
        rank.data_ptr(),
        bounds.data_ptr(),
        pointer(baseline),
        order.shape[0],
    )


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
    legal = _ext.cpu().reflection_rewards(
        *_grouped(logprobs, cu_seqlens, order, rank, bounds, baseline),
        ddof,
        normalize,
        pointer(rewards),
        weights.data_ptr(),
        pointer(std),
        pointer(scores),
    )
    if not legal:
        check_finite("logprobs", logprobs)
        if baseline is not None:
            check_finite("baseline", baseline)
    return [x for x in (rewards, weights, std, scores) if x is not None]


def reflection_rewards_backward(
    logprobs: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    order: Tensor,  # [N]
    rank: Tensor,  # [N]
    bounds: Tensor,  # [N+1]
    baseline: Tensor | None,  # [P]
    grad_rewards: Tensor | None,  # [N]
    grad_weights: Tensor | None,  # [P]
    grad_std: Tensor | None,  # [P]
    grad_scores: Tensor | None,  # [N]
    ddof: int,
    normalize: bool,
    needs: list[bool],
) -> list[Tensor]:
    made = [torch.empty_like(logprobs) if need else None for need in needs]
    _ext.cpu().reflection_rewards_backward(
        *_grouped(logprobs, cu_seqlens, order, rank, bounds, baseline),
        pointer(grad_rewards),
        pointer(grad_weights),
        pointer(grad_std),
        pointer(grad_scores),
        ddof,
        normalize,
        *map(pointer, made),
    )
    return [x for x in made if x is not None]
