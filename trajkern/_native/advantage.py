"""Launchers of csrc/cpu/advantage.cpp and csrc/cuda/advantage.cu, which take the same arguments."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._checks import check_cu_seqlens, check_finite, check_values
from trajkern._native._args import DTYPE, pointer


def _call(name: str, x: Tensor, *args: Any, partial_sums: bool = False) -> Any:
    """The kernel of x's device; a CUDA kernel runs on torch's current stream there.

    ``partial_sums``: give a CUDA kernel room for three sums a block; the number of blocks depends on the length alone.
    """
    if x.device.type == "cpu":
        return getattr(_ext.cpu(), name)(*args)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        if not partial_sums:
            return getattr(_ext.cuda(), name)(*args, stream)
        blocks = min(max(-(-x.shape[0] // 2048), 1), 1024)
        partials = x.new_empty(3 * blocks, dtype=torch.float64)
        return getattr(_ext.cuda(), name)(*args, partials.data_ptr(), blocks, stream)


def _rows(rewards: Tensor, group_ids: Tensor, gate: Tensor | None, weights: Tensor | None) -> tuple[int, ...]:
    n = rewards.shape[0]
    if n >= 2**31:
        raise ValueError(f"rewards must hold fewer than 2**31 trajectories, got {n}")
    return rewards.data_ptr(), DTYPE[rewards.dtype], group_ids.data_ptr(), pointer(gate), pointer(weights), n


def group_advantages(
    rewards: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    gate: Tensor | None,  # [N]
    weights: Tensor | None,  # [N]
    baseline: int,
    scale: int,
    ddof: float,
    eps: float,
    singleton: int,
) -> Tensor:
    advantages = torch.empty_like(rewards)
    rows = _rows(rewards, group_ids, gate, weights)
    rule = baseline, scale, ddof, eps, singleton
    if _call("group_advantages", rewards, *rows, *rule, advantages.data_ptr()) is False:
        check_finite("rewards", rewards)
        check_values("weights", cast(Tensor, weights), 0)
    return advantages


def group_advantages_backward(
    grad_advantages: Tensor,  # [N]
    rewards: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    gate: Tensor | None,  # [N]
    weights: Tensor | None,  # [N]
    *rule: float,
) -> Tensor:
    """``rule``: group_advantages' last five arguments."""
    grad_rewards = torch.empty_like(rewards)
    rows = _rows(rewards, group_ids, gate, weights)
    _call("group_advantages_backward", rewards, grad_advantages.data_ptr(), *rows, *rule, grad_rewards.data_ptr())
    return grad_rewards


def gae(
    rewards: Tensor,  # [T]
    values: Tensor | None,  # [T]
    cu_seqlens: Tensor,  # [N+1]
    bootstrap: Tensor | None,  # [N]
    mask: Tensor | None,  # [T]
    gamma: float,
    lam: float,
) -> Tensor:
    advantages = torch.empty_like(rewards)
    tokens = rewards.shape[0]
    bad = _call(
        "gae",
        rewards,
        rewards.data_ptr(),
        DTYPE[rewards.dtype],
        pointer(values),
        cu_seqlens.data_ptr(),
        cu_seqlens.shape[0] - 1,
        tokens,
        pointer(bootstrap),
        pointer(mask),
        gamma,
        lam,
        advantages.data_ptr(),
    )
    if bad >= 0:
        check_cu_seqlens(cu_seqlens, tokens)
    return advantages


def gae_backward(
    grad_advantages: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N+1]
    mask: Tensor | None,  # [T]
    gamma: float,
    lam: float,
    need_values: bool,
    need_bootstrap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count, tokens = cu_seqlens.shape[0] - 1, grad_advantages.shape[0]
    grad_rewards = torch.empty_like(grad_advantages)
    grad_values = grad_advantages.new_empty(tokens if need_values else 0)
    grad_bootstrap = grad_advantages.new_empty(count if need_bootstrap else 0)
    bad = _call(
        "gae_backward",
        grad_advantages,
        grad_advantages.data_ptr(),
        DTYPE[grad_advantages.dtype],
        cu_seqlens.data_ptr(),
        count,
        tokens,
        pointer(mask),
        gamma,
        lam,
        grad_rewards.data_ptr(),
        pointer(grad_values if need_values else None),
        pointer(grad_bootstrap if need_bootstrap else None),
    )
    if bad >= 0:
        check_cu_seqlens(cu_seqlens, tokens)
    return grad_rewards, grad_values, grad_bootstrap


def whiten(
    x: Tensor,  # [T]
    mask: Tensor | None,  # [T]
    shift_mean: bool,
    ddof: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The second result is (mean, 1 / sqrt(var + eps)) in float64, which the backward needs."""
    out, stats = torch.empty_like(x), x.new_empty(2, dtype=torch.float64)
    _call(
        "whiten",
        x,
        x.data_ptr(),
        DTYPE[x.dtype],
        pointer(mask),
        x.shape[0],
        shift_mean,
        ddof,
        eps,
        out.data_ptr(),
        stats.data_ptr(),
        partial_sums=True,
    )
    return out, stats


def whiten_backward(
    grad_out: Tensor,  # [T]
    x: Tensor,  # [T]
    mask: Tensor | None,  # [T]
    stats: Tensor,  # [2]
    shift_mean: bool,
    ddof: int,
) -> Tensor:
    grad_x = torch.empty_like(x)
    _call(
        "whiten_backward",
        x,
        grad_out.data_ptr(),
        x.data_ptr(),
        DTYPE[x.dtype],
        pointer(mask),
        x.shape[0],
        stats.data_ptr(),
        shift_mean,
        ddof,
        grad_x.data_ptr(),
        partial_sums=True,
    )
    return grad_x
