"""Where the trajectories of the policy loss lie, their pieces, and what a piece needs of its whole trajectory."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .policy_loss_forms import Means, bound_log_ratio
from .policy_loss_terms import Place, clamp_log_ratio, load_advantage, load_log_ratio, load_mask
from .primitives import exp


class Trajectory(NamedTuple):
    """The tokens start:end, of which ``count`` take part; 1 / their number, or 0; its means."""

    n: tl.tensor
    start: tl.tensor
    end: tl.tensor
    count: tl.tensor
    inverse: tl.tensor
    means: Means


@triton.jit
def span(cu_seqlens, n, tokens):
    """Where trajectory n starts and ends, inside the pack whatever cu_seqlens holds."""
    start = tl.maximum(tl.load(cu_seqlens + n), 0)
    return start, tl.minimum(tl.load(cu_seqlens + n + 1), tokens)


@triton.jit
def first_piece(cu_seqlens, n, tokens, BLOCK: tl.constexpr):
    """Of trajectory n: it has room for its tokens before that of n + 1, and the last piece is N + T // BLOCK - 1."""
    return n + tl.minimum(tl.maximum(tl.load(cu_seqlens + n), 0), tokens) // BLOCK


@triton.jit
def trajectory_of(cu_seqlens, piece, tokens, trajectories, steps, BLOCK: tl.constexpr):
    """The last trajectory that begins no later, by bisection."""
    low, high = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32) + (trajectories - 1)
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begun = first_piece(cu_seqlens, middle, tokens, BLOCK) <= piece
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle - 1)
    return tl.maximum(low, 0)


@triton.jit
def _gmpo_means(
    pack, n, bounds, length, log_ratio, numbers, SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr
):
    """exp(mean bounded log-ratio), the mean advantage, and the share of tokens that the bounds let through."""
    start, end = bounds
    bounded_sum, advantage_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    free_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        keep = load_mask(pack.mask, at, at < end)
        a = load_advantage(pack.advantages, Place(at, tl.zeros([BLOCK], tl.int32) + n, keep), PER_TOKEN)
        if SEQUENCE:
            token_log_ratio = tl.zeros([BLOCK], tl.float32) + log_ratio
        else:
            token_log_ratio = load_log_ratio(pack.logprobs, pack.old_logprobs, at, keep)
        bounded, free = bound_log_ratio(token_log_ratio, a, numbers[0], numbers[1])
        bounded_sum += bounded
        free_sum += free.to(tl.float32)
        advantage_sum += a
    ratio = exp(tl.div_rn(tl.sum(bounded_sum, 0), length))
    return ratio, tl.div_rn(tl.sum(advantage_sum, 0), length), tl.div_rn(tl.sum(free_sum, 0), length)


@triton.jit
def trajectory(
    pack, n, bounds, coefficients, numbers,
    FORM: tl.constexpr, SEQUENCE: tl.constexpr, CORRECTION: tl.constexpr, PER_TOKEN: tl.constexpr, MEANS: tl.constexpr,
    WALK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Trajectory n, its tokens ``bounds``; where WALK is false all of them count, or nobody asks."""
    start, end = bounds
    counted = tl.zeros([BLOCK], tl.int32)
    sampler_sum, ratio_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    count = tl.maximum(end - start, 0).to(tl.int32)
    if WALK:
        for first in range(start, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            keep = load_mask(pack.mask, at, at < end)
            counted += keep.to(tl.int32)
            if CORRECTION == "sequence_mask":
                sampler_sum += load_log_ratio(pack.old_logprobs, pack.sampler_logprobs, at, keep)
            if MEANS:
                ratio_sum += load_log_ratio(pack.logprobs, pack.old_logprobs, at, keep)
        count = tl.sum(counted, 0)
    length = tl.maximum(count, 1).to(tl.float32)
    if CORRECTION == "sequence_mask":
        w = exp(tl.div_rn(tl.sum(sampler_sum, 0), length))
        count = tl.where((w >= coefficients.sampler_low) & (w <= coefficients.sampler_high), count, 0)
    log_ratio, log_sum = length * 0, length * 0
    ratio, advantage, free = length * 0, length * 0, length * 0
    if MEANS:
        log_ratio = tl.div_rn(tl.sum(ratio_sum, 0), length)
        log_sum = clamp_log_ratio(tl.sum(ratio_sum, 0))
    if FORM == "gmpo":
        ratio, advantage, free = _gmpo_means(pack, n, bounds, length, log_ratio, numbers, SEQUENCE, PER_TOKEN, BLOCK)
    inverse = tl.where(count > 0, tl.div_rn(1.0, length), 0.0)
    return Trajectory(n, start, end, count, inverse, Means(log_ratio, log_sum, ratio, advantage, free))


@triton.jit
def falls_in_share(cu_seqlens, trajectories, BLOCK: tl.constexpr):
    """How often cu_seqlens falls in this program's share of it."""
    share = tl.cdiv(trajectories, tl.num_programs(0))
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, trajectories)
    falls = tl.zeros([BLOCK], tl.int32)
    for begin in range(first, last, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        start = tl.load(cu_seqlens + n, mask=n < last, other=0)
        falls += (start > tl.load(cu_seqlens + n + 1, mask=n < last, other=0)).to(tl.int32)
    return tl.sum(falls, 0)
