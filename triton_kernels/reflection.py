"""Reflection rewards: a program a group finds each token's deviation, then a program a rollout writes what is its own.

The arithmetic is float64, whatever the log-probs are. Nothing here waits for the device: the grids are as large as if
every rollout were a group of its own, and the programs of groups that do not exist end at once. A group whose
references differ in length gives NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import ROLLOUTS, TOKENS
from .primitives import KEEP_NAN


class Pack(NamedTuple):
    """Where the rollouts lie: pointers to cu_seqlens [N+1] and to their order by group [N]; the tokens of all."""

    cu_seqlens: tl.tensor
    order: tl.tensor
    tokens: tl.tensor


class Group(NamedTuple):
    """The rollouts order[first:last], none if it is absent; where the first one starts, and the length of each."""

    first: tl.tensor
    last: tl.tensor
    start: tl.tensor
    length: tl.tensor


class Grads(NamedTuple):
    """Pointers to the gradients of the rewards [N], the weights [P] and the deviations [P], or None."""

    rewards: tl.tensor | None
    weights: tl.tensor | None
    std: tl.tensor | None


@triton.jit
def _span(cu_seqlens, n, tokens):
    """Where rollout n starts and how many tokens it has, inside the pack whatever cu_seqlens holds."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + n), 0), tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1), start), tokens)
    return start, end - start


@triton.jit
def _members(pack, first, last, ROWS: tl.constexpr):
    """The rollouts order[first:first + ROWS] of a group that ends at last, where they start, and their lengths."""
    at = first + tl.arange(0, ROWS)
    inside = at < last
    n = tl.load(pack.order + at, mask=inside, other=0)
    start, length = _span(pack.cu_seqlens, n, pack.tokens)
    return n, start, tl.where(inside, length, 0), inside


@triton.jit
def _tile(x, start, length, column):
    """[ROWS, BLOCK] of rows that start there and are so long, as float64; 0 outside."""
    inside = column[None, :] < length[:, None]
    return tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float64), inside


@triton.jit
def _columns(x, pack, group, column, shares, ROWS: tl.constexpr):
    """Of BLOCK columns, measured from the group's first rollout: its log-probs, the mean, the standard deviation."""
    length = group.length
    origin = tl.load(x + group.start + column, mask=column < length, other=0.0).to(tl.float64)
    total, squares = tl.zeros(column.shape, tl.float64), tl.zeros(column.shape, tl.float64)
    for row in range(group.first, group.last, ROWS):
        _, starts, lengths, _ = _members(pack, row, group.last, ROWS)
        value, inside = _tile(x, starts, tl.minimum(lengths, length), column)
        total += tl.sum(tl.where(inside, value - origin[None, :], 0.0), 0)
    mean = total * shares[0]
    for row in range(group.first, group.last, ROWS):
        _, starts, lengths, _ = _members(pack, row, group.last, ROWS)
        value, inside = _tile(x, starts, tl.minimum(lengths, length), column)
        centred = tl.where(inside, (value - origin[None, :]) - mean[None, :], 0.0)
        squares += tl.sum(centred * centred, 0)
    return origin, mean, tl.sqrt(squares * shares[1])


@triton.jit
def _group(pack, bounds, ddof, ROWS: tl.constexpr):
    """The program's group, its shares, its poison.

    The shares are 1 / K and 1 / (K - ddof). The poison, added to every result, is NaN where the lengths differ and else
    0.
    """
    g = tl.program_id(0)
    first, last = tl.load(bounds + g), tl.load(bounds + g + 1)
    n = tl.load(pack.order + first, mask=first < last, other=0)
    start, length = _span(pack.cu_seqlens, n, pack.tokens)
    length = tl.where(first < last, length, 0)
    uneven = tl.zeros([ROWS], tl.int32)
    for row in range(first, last, ROWS):
        _, _, lengths, inside = _members(pack, row, last, ROWS)
        uneven |= (inside & (lengths != length)).to(tl.int32)
    poison = tl.where(tl.sum(uneven, 0) > 0, float("nan"), 0.0).to(tl.float64)
    shares = (1.0 / tl.maximum(last - first, 1).to(tl.float64), 1.0 / tl.maximum(last - first - ddof, 1).to(tl.float64))
    return Group(first, last, start, length), shares, poison


@triton.jit(do_not_specialize=["tokens", "ddof"])
def deviation_kernel(
    logprobs, cu_seqlens, order, bounds,  # [P], [N+1], [N], [N+1]
    columns, totals, scores,  # [P] float64, of which a group's first rollout is written; [N] float64; [N] or None
    tokens, ddof,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each column's standard deviation, their sum, and the largest."""
    g = tl.program_id(0)
    pack = Pack(cu_seqlens, order, tokens)
    group, shares, poison = _group(pack, bounds, ddof, ROWS)
    total, largest = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for begin in range(0, group.length, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        _, _, std = _columns(logprobs, pack, group, column, shares, ROWS)
        std += poison
        tl.store(columns + group.start + column, std, mask=column < group.length)
        total += std
        largest = tl.maximum(largest, std, KEEP_NAN)
    total = tl.sum(total, 0) + poison
    tl.store(totals + g, total)
    if scores is not None:
        tl.store(scores + g, tl.where(total == total, tl.max(largest, 0), total))


@triton.jit
def _rollout(cu_seqlens, order, rank, bounds, tokens):
    """The program's rollout, its group, where it starts, its length, and where the group's first starts, its length."""
    i = tl.program_id(0)
    g = tl.load(rank + i)
    n, leader = tl.load(order + i), tl.load(order + tl.load(bounds + g))
    start, length = _span(cu_seqlens, n, tokens)
    leader_start, leader_length = _span(cu_seqlens, leader, tokens)
    return n, g, start, length, leader_start, leader_length


@triton.jit
def _divisor(totals, g, NORMALIZE: tl.constexpr):
    """What the deviations are divided by; and NaN where any of them is, else 0."""
    total = tl.load(totals + g)
    divisor = tl.full([], 1.0, tl.float64)
    if NORMALIZE:
        divisor = tl.where(total == 0, divisor, total)
    return divisor, tl.where(total == total, 0.0, total)


@triton.jit(do_not_specialize=["tokens"])
def reward_kernel(
    logprobs, baseline, cu_seqlens, order, rank, bounds, columns, totals,  # baseline [P] or None
    rewards, weights, std,  # [N] or None, [P], [P] or None
    tokens,
    NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, g, start, length, leader, common = _rollout(cu_seqlens, order, rank, bounds, tokens)
    divisor, poison = _divisor(totals, g, NORMALIZE)
    reward = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, length, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < length
        s = tl.load(columns + leader + column, mask=inside & (column < common), other=float("nan"))
        tl.store(weights + start + column, s / divisor, mask=inside)
        if rewards is not None:
            tl.store(std + start + column, s, mask=inside)
            gain = tl.load(logprobs + start + column, mask=inside, other=0.0).to(tl.float64)
            if baseline is not None:
                gain -= tl.load(baseline + start + column, mask=inside, other=0.0).to(tl.float64)
            reward += tl.where(inside, s * gain, 0.0)
    if rewards is not None:
        tl.store(rewards + n, tl.sum(reward, 0) / divisor + poison)


@triton.jit
def _upstream(logprobs, baseline, grads, pack, group, column, ROWS: tl.constexpr):
    """Of BLOCK columns: A_j, what reaches the deviation by way of the weights, and what reaches it directly."""
    weighed, direct = tl.zeros(column.shape, tl.float64), tl.zeros(column.shape, tl.float64)
    for row in range(group.first, group.last, ROWS):
        n, starts, lengths, inside = _members(pack, row, group.last, ROWS)
        lengths = tl.minimum(lengths, group.length)
        if grads.rewards is not None:
            value, _ = _tile(logprobs, starts, lengths, column)
            if baseline is not None:
                value -= _tile(baseline, starts, lengths, column)[0]
            g = tl.load(grads.rewards + n, mask=inside, other=0.0).to(tl.float64)
            weighed += tl.sum(g[:, None] * value, 0)
        if grads.weights is not None:
            weighed += tl.sum(_tile(grads.weights, starts, lengths, column)[0], 0)
        if grads.std is not None:
            direct += tl.sum(_tile(grads.std, starts, lengths, column)[0], 0)
    return weighed, direct


@triton.jit(do_not_specialize=["tokens", "ddof"])
def slope_kernel(
    logprobs, baseline, cu_seqlens, order, bounds,  # baseline [P] or None
    grad_rewards, grad_weights, grad_std,  # [N], [P], [P], or None
    columns, sums, peaks,  # [4, P] float64, of which a group's first rollout is written; [2, N] float64; [N] int64
    tokens, ddof,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each column's deviation, mean, A_j and direct gradient; sum_j s_j and sum_j A_j s_j; where s_j is the largest."""
    g = tl.program_id(0)
    pack = Pack(cu_seqlens, order, tokens)
    group, shares, poison = _group(pack, bounds, ddof, ROWS)
    total, slope = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    largest, peak = tl.full([BLOCK], -1.0, tl.float64), tl.zeros([BLOCK], tl.int64)
    grads = Grads(grad_rewards, grad_weights, grad_std)
    columns += group.start
    for begin in range(0, group.length, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < group.length
        _, mean, std = _columns(logprobs, pack, group, column, shares, ROWS)
        std += poison
        weighed, direct = _upstream(logprobs, baseline, grads, pack, group, column, ROWS)
        tl.store(columns + column, std, mask=inside)
        tl.store(columns + tokens + column, mean, mask=inside)
        tl.store(columns + 2 * tokens + column, weighed, mask=inside)
        tl.store(columns + 3 * tokens + column, direct, mask=inside)
        total += std
        slope += weighed * std
        peak = tl.where(inside & (std > largest), column, peak)
        largest = tl.where(inside & (std > largest), std, largest)
    tl.store(sums + g, tl.sum(total, 0) + poison)
    tl.store(sums + tl.num_programs(0) + g, tl.sum(slope, 0))
    tl.store(peaks + g, tl.min(tl.where(largest == tl.max(largest, 0), peak, tokens), 0))


@triton.jit(do_not_specialize=["tokens", "rollouts", "ddof"])
def gradient_kernel(
    logprobs, cu_seqlens, order, rank, bounds, columns, sums, peaks,
    grad_rewards, grad_scores,  # [N] or None
    grad_logprobs, grad_baseline,  # [P] or None
    tokens, rollouts, ddof,
    NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n, g, start, length, leader, common = _rollout(cu_seqlens, order, rank, bounds, tokens)
    divisor, poison = _divisor(sums, g, NORMALIZE)
    shared = poison
    if NORMALIZE:
        shared += tl.load(sums + rollouts + g) / divisor
    members = tl.load(bounds + g + 1) - tl.load(bounds + g)
    freedom = tl.maximum(members - ddof, 1).to(tl.float64)
    g_reward, g_score = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    if grad_rewards is not None:
        g_reward += tl.load(grad_rewards + n).to(tl.float64)
    if grad_scores is not None:
        g_score += tl.load(grad_scores + g).to(tl.float64)
    peak = tl.load(peaks + g)
    for begin in range(0, length, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < length
        known = inside & (column < common)
        s = tl.load(columns + leader + column, mask=known, other=float("nan"))
        direct = g_reward * (s / divisor)
        if grad_baseline is not None:
            tl.store(grad_baseline + start + column, -direct, mask=inside)
        if grad_logprobs is not None:
            mean = tl.load(columns + tokens + leader + column, mask=known, other=0.0)
            weighed = tl.load(columns + 2 * tokens + leader + column, mask=known, other=0.0)
            ds = (weighed - shared) / divisor + tl.load(columns + 3 * tokens + leader + column, mask=known, other=0.0)
            ds += tl.where(column == peak, g_score, 0.0)
            x = tl.load(logprobs + start + column, mask=inside, other=0.0).to(tl.float64)
            origin = tl.load(logprobs + leader + column, mask=known, other=0.0).to(tl.float64)
            slope = tl.where(s == 0, 0.0, ds / tl.where(s == 0, 1.0, freedom * s))
            tl.store(grad_logprobs + start + column, direct + slope * ((x - origin) - mean), mask=inside)


def reflection_groups(
    group_ids: Tensor,  # [N]
    cu_seqlens: Tensor,  # [N+1]
    tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """By torch's sort; the lengths are the kernels' business."""
    ids, order = group_ids.sort(stable=True)
    rank = torch.zeros_like(ids)
    torch.cumsum(ids[1:] != ids[:-1], 0, out=rank[1:])
    return order, rank, torch.searchsorted(rank, torch.arange(ids.shape[0] + 1, device=ids.device))


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
    rollouts, tokens = order.shape[0], logprobs.shape[0]
    weights, rewards, std, scores = torch.empty_like(logprobs), None, None, None
    if rewarded:
        rewards, scores = (logprobs.new_empty(rollouts) for _ in range(2))
        std = torch.empty_like(logprobs)
    columns, totals = (logprobs.new_empty(size, dtype=torch.float64) for size in (tokens, rollouts))
    if rollouts:
        with torch.cuda.device_of(logprobs):
            deviation_kernel[(rollouts,)](
                logprobs, cu_seqlens, order, bounds, columns, totals, scores, tokens, ddof, **ROLLOUTS
            )
            reward_kernel[(rollouts,)](
                logprobs,
                baseline,
                cu_seqlens,
                order,
                rank,
                bounds,
                columns,
                totals,
                rewards,
                weights,
                std,
                tokens,
                NORMALIZE=normalize,
                **TOKENS,
            )
    return [x for x in (rewards, weights, std, scores) if x is not None]


class Upstream(NamedTuple):
    """Of the backward's op, what does not come from the forward's inputs."""

    grad_rewards: Tensor | None  # [N]
    grad_weights: Tensor | None  # [P]
    grad_std: Tensor | None  # [P]
    grad_scores: Tensor | None  # [N]
    ddof: int
    normalize: bool
    needs: list[bool]  # of logprobs and baseline


def reflection_rewards_backward(
    logprobs: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    order: Tensor,  # [N]
    rank: Tensor,  # [N]
    bounds: Tensor,  # [N+1]
    baseline: Tensor | None,  # [P]
    *upstream: Any,
) -> list[Tensor]:
    """``upstream``: the fields of :class:`Upstream`."""
    x = Upstream(*upstream)
    rollouts, tokens = order.shape[0], logprobs.shape[0]
    gradients = [torch.empty_like(logprobs) if need else None for need in x.needs]
    columns, sums = (logprobs.new_empty(size, dtype=torch.float64) for size in (4 * tokens, 2 * rollouts))
    peaks = torch.empty_like(order)
    if rollouts:
        with torch.cuda.device_of(logprobs):
            slope_kernel[(rollouts,)](
                logprobs,
                baseline,
                cu_seqlens,
                order,
                bounds,
                x.grad_rewards,
                x.grad_weights,
                x.grad_std,
                columns,
                sums,
                peaks,
                tokens,
                x.ddof,
                **ROLLOUTS,
            )
            gradient_kernel[(rollouts,)](
                logprobs,
                cu_seqlens,
                order,
                rank,
                bounds,
                columns,
                sums,
                peaks,
                x.grad_rewards,
                x.grad_scores,
                *gradients,
                tokens,
                rollouts,
                x.ddof,
                NORMALIZE=x.normalize,
                **TOKENS,
            )
    return [gradient for gradient in gradients if gradient is not None]
