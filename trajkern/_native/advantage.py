"""Launchers of csrc/bind/advantage.cpp, by which csrc/cpu/advantage.cpp and csrc/cuda/advantage.cu are called."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern._native._args import call, pointer
from trajkern._values import check_cu_seqlens, check_rewards


def _rows(
    rewards: Tensor, group_ids: Tensor, gate: Tensor | None, weights: Tensor | None
) -> tuple[tuple[int, ...], int]:
    n = rewards.shape[0]
    if n >= 2**31:
        raise ValueError(f"rewards must hold fewer than 2**31 trajectories, got {n}")
    return (rewards.data_ptr(), group_ids.data_ptr(), pointer(gate), pointer(weights)), n


def _pack(cu_seqlens: Tensor, mask: Tensor | None, tokens: int) -> tuple[int, ...]:
    return cu_seqlens.data_ptr(), pointer(mask), cu_seqlens.shape[0] - 1, tokens


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
    scratch = "group_scratch", rewards.shape[0]
    if not call("group_advantages", rewards, *rows, rule, advantages.data_ptr(), scratch=scratch):
        check_rewards(rewards, gate, weights)
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
    pointers = grad_advantages.data_ptr(), grad_rewards.data_ptr()
    call("group_advantages_backward", rewards, *rows, rule, *pointers, scratch=("group_scratch", rewards.shape[0]))
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
    bad = call(
        "gae",
        rewards,
        _pack(cu_seqlens, mask, tokens),
        rewards.data_ptr(),
        pointer(values),
        pointer(bootstrap),
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
    bad = call(
        "gae_backward",
        grad_advantages,
        _pack(cu_seqlens, mask, tokens),
        grad_advantages.data_ptr(),
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
    call(
        "whiten",
        x,
        x.data_ptr(),
        pointer(mask),
        x.shape[0],
        shift_mean,
        ddof,
        eps,
        out.data_ptr(),
        stats.data_ptr(),
        scratch=("whiten_scratch", x.shape[0]),
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
    call(
        "whiten_backward",
        x,
        grad_out.data_ptr(),
        x.data_ptr(),
        pointer(mask),
        x.shape[0],
        stats.data_ptr(),
        shift_mean,
        ddof,
        grad_x.data_ptr(),
        scratch=("whiten_scratch", x.shape[0]),
    )
    return grad_x
