"""Group-relative advantages, and discounted returns and GAE as scans over packed trajectories.

Over the counted trajectories of a group (gate true, weight not 0), with W = sum w and d_i = r_i - r_first:

    mean = sum w d / W        var = sum w (d - mean)^2 / (W - ddof)        A_i = (d_i - mean) / (sqrt(var) + eps)

Measured from the group's first reward, a constant group is exactly 0 and a large common reward costs no precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import (
    check_boundaries,
    check_choice,
    check_flag,
    check_number,
    check_process_group,
    check_shape,
    check_tensor,
    laid_out,
    readable,
)
from trajkern._dtypes import FLOATS, INTEGERS, accumulator
from trajkern._results import GAE
from trajkern._values import check_cu_seqlens, check_rewards
from trajkern.ops import _rank_moments
from trajkern.ops._autograd import applied, differentiable_once, keep, kept
from trajkern.ops._library import define, recorded

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "none")
SINGLETONS = ("raw", "zero")


_group_advantages = define(
    "advantage",
    "group_advantages(Tensor rewards, Tensor group_ids, Tensor? gate, Tensor? weights, int baseline, int scale,"
    " float ddof, float eps, int singleton) -> Tensor",
    lambda rewards, *_: torch.empty_like(rewards),
)
_group_advantages_backward = define(
    "advantage",
    "group_advantages_backward(Tensor grad_advantages, Tensor rewards, Tensor group_ids, Tensor? gate,"
    " Tensor? weights, int baseline, int scale, float ddof, float eps, int singleton) -> Tensor",
    lambda grad_advantages, rewards, *_: torch.empty_like(rewards),
)
_gae = define(
    "advantage",
    "gae(Tensor rewards, Tensor? values, Tensor cu_seqlens, Tensor? bootstrap, Tensor? mask, float gamma, float lam)"
    " -> Tensor",
    lambda rewards, *_: torch.empty_like(rewards),
)
_gae_backward = define(
    "advantage",
    "gae_backward(Tensor grad_advantages, Tensor cu_seqlens, Tensor? mask, float gamma, float lam, bool need_values,"
    " bool need_bootstrap) -> (Tensor, Tensor, Tensor)",
    lambda grad, cu_seqlens, mask, gamma, lam, need_values, need_bootstrap: (
        torch.empty_like(grad),
        grad.new_empty(grad.shape if need_values else 0),
        grad.new_empty(cu_seqlens.shape[0] - 1 if need_bootstrap else 0),
    ),
)
_whiten = define(
    "advantage",
    "whiten(Tensor x, Tensor? mask, bool shift_mean, int ddof, float eps) -> (Tensor, Tensor)",
    lambda x, *_: (torch.empty_like(x), x.new_empty(2, dtype=torch.float64)),
)
_whiten_backward = define(
    "advantage",
    "whiten_backward(Tensor grad_out, Tensor x, Tensor? mask, Tensor stats, bool shift_mean, int ddof) -> Tensor",
    lambda grad_out, x, *_: torch.empty_like(x),
)


class _GroupAdvantages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rewards, rows, options):
        keep(ctx, rewards, *rows)
        ctx.options = options
        return _group_advantages(rewards, *rows, *options)

    @staticmethod
    @differentiable_once("group_advantages")
    def backward(ctx: Any, grad):
        return _group_advantages_backward(grad.contiguous(), *kept(ctx), *ctx.options), None, None


class _GAE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rewards, values, cu_seqlens, bootstrap, mask, gamma, lam):
        keep(ctx, cu_seqlens, mask)
        ctx.decay = (gamma, lam)
        return _gae(rewards, values, cu_seqlens, bootstrap, mask, gamma, lam)

    @staticmethod
    @differentiable_once("discounted_returns", "gae", linear=True)
    def backward(ctx: Any, grad):
        needs = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        grads = _gae_backward(grad.contiguous(), *kept(ctx), *ctx.decay, *needs)
        values, bootstrap = (g if need else None for g, need in zip(grads[1:], needs, strict=True))
        return grads[0], values, None, bootstrap, None, None, None


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, mask, shift_mean, ddof, eps):
        out, stats = _whiten(x, mask, shift_mean, ddof, eps)
        keep(ctx, x, mask, stats)
        ctx.options = (shift_mean, ddof)
        return out

    @staticmethod
    @differentiable_once("whiten")
    def backward(ctx: Any, grad):
        return _whiten_backward(grad.contiguous(), *kept(ctx), *ctx.options), None, None, None, None


def _accumulated(x: Tensor) -> Tensor:
    return laid_out(x, accumulator(x))


@recorded
def group_advantages(
    rewards: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    *,
    baseline: str = "mean",
    scale: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
    singleton: str = "raw",
    gate: Tensor | None = None,  # [N]
    weights: Tensor | None = None,  # [N]
    process_group: Any = None,
) -> Tensor:
    """Advantage of each trajectory relative to its group (GRPO, Dr. GRPO, RLOO and their relatives).

    Args:
        rewards: float ``[N]``, where they are counted finite and of a magnitude of at most 2^126 (2^480 in float64), so
            that no square overflows. Checked on the CPU; elsewhere what overflows gives a group that is not finite.
            With eps 0 rewards of a group that differ must do so by 2^-126 (2^-480 in float64), so that none vanishes.
        group_ids: int64 or int32 ``[N]``, any values in any order; equal ids are one group, of any size.
        baseline: what is subtracted: the group's "mean", the mean of the others ("leave_one_out"), or "none".
        scale: divide by "std" + eps, or "none". Where std + eps is 0 the divisor is 1.
        ddof: 1 for the unbiased variance, 0 for the population's.
        eps: added to the standard deviation, 0 or a positive number that float32 and its reciprocals hold (float64's
            for float64 rewards).
        singleton: advantage of a trajectory alone in its group (W <= 1): "raw" gives
            r / (1 + eps) with scale "std" and r with "none"; "zero" gives 0. With neither baseline nor scale it is r.
        gate: bool ``[N]``; a False trajectory gets 0, enters no statistic, and its reward is not read: it may be the
            NaN of what could not be scored. Applied before the singleton rule.
        weights: float or integer ``[N]``, at least 0: frequencies, as if trajectory i stood w_i times. 0 acts like a
            False gate; above 2**64 none is taken.
        process_group: of torch.distributed, over whose ranks the groups' trajectories are spread, any number or none of
            them on a rank; equal ids are one group on all ranks. Every rank must make the call. Each group's count,
            largest reward, sum and sum of squares travel, and the ids; no gradient. A group with a backend for the CPU
            (torch's default, gloo beside NCCL) exchanges the number of each rank's trajectories by it; one with NCCL
            alone waits for the GPU, once.

    Returns:
        ``[N]`` float32 (float64 for float64 rewards). A constant group is exactly 0 with a baseline. Differentiable
        once, in the rewards alone; a constant group's standard deviation counts as constant.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Source: GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740); conventions as in verl and TRL.
    """
    check_tensor("rewards", rewards, dtypes=FLOATS, ndim=1)
    shape, device = tuple(rewards.shape), rewards.device
    check_tensor("group_ids", group_ids, dtypes=INTEGERS, device=device)
    check_shape("group_ids", group_ids, shape, "one id a reward")
    baseline = check_choice("baseline", baseline, BASELINES)
    scale = check_choice("scale", scale, SCALES)
    singleton = check_choice("singleton", singleton, SINGLETONS)
    ddof = check_choice("ddof", ddof, (0, 1))
    eps = check_number("eps", eps, low=0, dtype=accumulator(rewards))
    if gate is not None:
        check_tensor("gate", gate, dtypes=(torch.bool,), device=device)
        check_shape("gate", gate, shape, "one flag a reward")
    if weights is not None:
        check_tensor("weights", weights, dtypes=(*FLOATS, *INTEGERS), device=device)
        check_shape("weights", weights, shape, "one weight a reward")
    options: dict[str, Any] = {"baseline": baseline, "scale": scale, "ddof": ddof, "eps": eps, "singleton": singleton}
    if process_group is not None:
        check_process_group("process_group", process_group)
        if rewards.requires_grad:
            raise ValueError("rewards must not require a gradient with process_group, which gives none")
        _check_values(rewards, gate, weights)
        return _rank_moments.group_advantages(
            rewards, group_ids, gate=gate, weights=weights, ranks=process_group, **options
        )
    if _backends.wants_reference("advantage", rewards):
        _check_values(rewards, gate, weights)
        return _backends.reference().group_advantages(rewards, group_ids, gate=gate, weights=weights, **options)
    r = _accumulated(rewards)
    rows = laid_out(group_ids, torch.int64), laid_out(gate, torch.bool), laid_out(weights, r.dtype)
    rule = BASELINES.index(baseline), SCALES.index(scale), float(ddof), float(eps), SINGLETONS.index(singleton)
    return applied(_GroupAdvantages, r, rows, rule)


def _check_values(rewards: Tensor, gate: Tensor | None, weights: Tensor | None) -> None:
    """On the reference route; the launchers check what they can read for nothing."""
    if readable(rewards):
        check_rewards(rewards, gate, weights)


@recorded
def discounted_returns(
    rewards: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N+1]
    *,
    gamma: float = 1.0,
    mask: Tensor | None = None,  # [T]
) -> Tensor:
    """Discounted sum of the rewards from each token on: G_t = r_t + gamma G_next, restarting in each trajectory.

    Args:
        rewards: float ``[T]``.
        cu_seqlens: int64 or int32 ``[N+1]``, from 0 to T, never decreasing (checked on the CPU).
        gamma: discount per unmasked token, in [0, 1].
        mask: bool ``[T]``; a False token (an observation) takes no part: its reward is not read, the discount passes
            over it and its return is 0.

    Returns:
        ``[T]`` float32 (float64 for float64 rewards), differentiable once, in the rewards.
    """
    _check_scan(rewards, cu_seqlens, mask)
    gamma = check_number("gamma", gamma, low=0, high=1)
    if _backends.wants_reference("advantage", rewards):
        return _backends.reference().discounted_returns(rewards, cu_seqlens, gamma=gamma, mask=mask)
    mask = laid_out(mask, torch.bool)
    return applied(_GAE, _accumulated(rewards), None, laid_out(cu_seqlens, torch.int64), None, mask, float(gamma), 1.0)


@recorded
def gae(
    rewards: Tensor,  # [T]
    values: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N+1]
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,  # [N]
    mask: Tensor | None = None,  # [T]
) -> GAE:
    """Generalised advantage estimation on packed trajectories.

        delta_t = r_t + gamma V_next - V_t        A_t = delta_t + gamma lam A_next        returns = A + V

    "next" is the trajectory's next unmasked token; behind the last one V_next is ``bootstrap`` (0 if absent).

    Args:
        rewards, values: float ``[T]``.
        cu_seqlens: int64 or int32 ``[N+1]``, from 0 to T, never decreasing (checked on the CPU).
        gamma, lam: discount and trace decay, in [0, 1].
        bootstrap: float ``[N]``, the value of the state behind each trajectory's last token (for truncated ones).
        mask: bool ``[T]``; a False token (an observation) takes no part and gets 0.

    Returns:
        :class:`GAE` of ``[T]``, float32 (float64 for float64 rewards), differentiable once, in rewards, values and
        bootstrap.

    Source: Schulman et al., arXiv 1506.02438; the masked form as verl's for multi-turn rollouts.
    """
    _check_scan(rewards, cu_seqlens, mask)
    gamma, lam = (check_number(name, x, low=0, high=1) for name, x in (("gamma", gamma), ("lam", lam)))
    check_tensor("values", values, dtypes=FLOATS, device=rewards.device)
    check_shape("values", values, tuple(rewards.shape), "one value a token")
    if bootstrap is not None:
        check_tensor("bootstrap", bootstrap, dtypes=FLOATS, device=rewards.device)
        check_shape("bootstrap", bootstrap, (cu_seqlens.shape[0] - 1,), "one value a trajectory")
    if _backends.wants_reference("advantage", rewards):
        return _backends.reference().gae(
            rewards, values, cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap, mask=mask
        )
    r = _accumulated(rewards)
    v = laid_out(values, r.dtype)
    last = laid_out(bootstrap, r.dtype)
    mask = laid_out(mask, torch.bool)
    advantages = applied(_GAE, r, v, laid_out(cu_seqlens, torch.int64), last, mask, float(gamma), float(lam))
    return GAE(advantages, advantages + (v if mask is None else torch.where(mask, v, 0)))


def _check_scan(rewards: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> None:
    check_tensor("rewards", rewards, dtypes=FLOATS, ndim=1)
    check_boundaries("cu_seqlens", cu_seqlens, rewards.device)
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), device=rewards.device)
        check_shape("mask", mask, tuple(rewards.shape), "one flag a token")
    if _backends.wants_reference("advantage", rewards) and readable(cu_seqlens):
        check_cu_seqlens(cu_seqlens, rewards.shape[0])


@recorded
def whiten(
    x: Tensor,  # [T]
    *,
    mask: Tensor | None = None,  # [T]
    shift_mean: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
    process_group: Any = None,
) -> Tensor:
    """Scale the unmasked values to mean 0 and variance 1: (x - mean) / sqrt(var + eps).

    Args:
        x: float ``[T]``; in float64 the squares of the differences from the mean must not overflow, which is an error
            on the CPU and gives NaN elsewhere.
        mask: bool ``[T]``; a False value is not read and gives 0.
        shift_mean: False adds the mean back.
        ddof: 1 for the unbiased variance, 0 for the population's; the variance of no more than ddof values is 0.
        eps: added to the variance, a positive number that float32 and its reciprocals hold (float64's for float64).
        process_group: of torch.distributed, over whose ranks mean and variance are taken, any number of values or none
            on each. Every rank must make the call. Counts, sums and squares travel; no gradient.

    Returns:
        ``[T]`` float32 (float64 for float64), differentiable once.
    """
    check_tensor("x", x, dtypes=FLOATS, ndim=1)
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), device=x.device)
        check_shape("mask", mask, tuple(x.shape), "one flag a value")
    shift_mean, ddof = check_flag("shift_mean", shift_mean), check_choice("ddof", ddof, (0, 1))
    eps = check_number("eps", eps, above=0, dtype=accumulator(x))
    if process_group is not None:
        check_process_group("process_group", process_group)
        if x.requires_grad:
            raise ValueError("x must not require a gradient with process_group, which gives none")
        options: dict[str, Any] = {"shift_mean": shift_mean, "ddof": ddof, "eps": eps}
        return _rank_moments.whiten(x, mask=mask, ranks=process_group, **options)
    if _backends.wants_reference("advantage", x):
        return _backends.reference().whiten(x, mask=mask, shift_mean=shift_mean, ddof=ddof, eps=eps)
    return applied(_Whiten, _accumulated(x), laid_out(mask, torch.bool), shift_mean, ddof, float(eps))
