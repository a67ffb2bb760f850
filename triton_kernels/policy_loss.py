"""The policy loss of packed trajectories: loss, gradient and metrics.

Four launches: counts and means of each trajectory; the weight of a token; the tokens; the sum of what their programs
found. The tokens are one flat range where each one's gradient depends on itself alone, so that trajectories of any
length fill the GPU, and a program a trajectory where the ratio is a mean over it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import (
    SINGLE_BLOCK,
    SINGLE_WARPS,
    TOKEN_BLOCK,
    TOKEN_WARPS,
    TRAJECTORY_BLOCK,
    TRAJECTORY_WARPS,
)
from .primitives import KEEP_NAN, exp, exp_excess, expm1

CLIP, CISPO, SAPO, REINFORCE, DPPO_TV, DPPO_KL, KL_COV, GMPO, VESPO = map(tl.constexpr, range(9))
K1, K2, K3, K3_CORRECTED = map(tl.constexpr, range(1, 5))
TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_SUM, SEQ_MEAN_TOKEN_SUM_NORM, SEQ_MEAN_TOKEN_MEAN = map(tl.constexpr, range(5))
NO_CORRECTION, TIS, ICEPOP, SEQUENCE_MASK = map(tl.constexpr, range(4))
LOG_RATIO_BOUND = tl.constexpr(20.0)
COLUMNS = tl.constexpr(4)  # of a trajectory's means: log-ratio; its sum or gmpo's ratio; gmpo's advantage; gmpo's slope


@triton.jit
def _log_ratio(x, y, at, keep):
    """The clamped difference of two log-probs, and where its derivative is 1."""
    d = tl.load(x + at, mask=keep, other=0.0) - tl.load(y + at, mask=keep, other=0.0)
    return tl.clamp(d, -LOG_RATIO_BOUND, LOG_RATIO_BOUND, KEEP_NAN), tl.abs(d) <= LOG_RATIO_BOUND


@triton.jit
def _advantage(advantages, at, n, keep, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        a = tl.load(advantages + at, mask=keep, other=0.0)
    else:
        a = tl.load(advantages + n, mask=keep, other=0.0)
    return a


@triton.jit
def _bounded(log_ratio, a, low, high):
    """gmpo's log-ratio, bounded in the direction of the advantage, and where the bound lets it through."""
    bounded = tl.where(a > 0, tl.minimum(log_ratio, high, KEEP_NAN), tl.maximum(log_ratio, -low, KEEP_NAN))
    free = ((a > 0) & (log_ratio <= high)) | ((a < 0) & (log_ratio >= -low))
    return tl.where(a == 0, 0.0, bounded), free


@triton.jit
def _span(cu_seqlens, n, tokens):
    """Where trajectory n starts and ends, inside the pack whatever cu_seqlens holds."""
    start = tl.maximum(tl.load(cu_seqlens + n), 0)
    return start, tl.minimum(tl.load(cu_seqlens + n + 1), tokens)


@triton.jit
def _kept(mask, at, inside):
    keep = inside
    if mask is not None:
        keep = tl.load(mask + at, mask=inside, other=0) != 0
    return keep


@triton.jit
def _gmpo_means(logprobs, old_logprobs, advantages, mask, means, n, start, end, length, log_ratio, low, high,
                SEQUENCE: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Stores exp(mean of the bounded log-ratios), the mean advantage, and the share of tokens the bounds let through."""
    bounded_sum, advantage_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    free_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        keep = _kept(mask, at, at < end)
        a = _advantage(advantages, at, tl.full([BLOCK], 0, tl.int32) + n, keep, PER_TOKEN)
        if SEQUENCE:
            bounded, free = _bounded(log_ratio, a, low, high)
        else:
            bounded, free = _bounded(_log_ratio(logprobs, old_logprobs, at, keep)[0], a, low, high)
        bounded_sum += bounded
        free_sum += free.to(tl.float32)
        advantage_sum += a
    tl.store(means + 1, exp(tl.div_rn(tl.sum(bounded_sum, 0), length)))
    tl.store(means + 2, tl.div_rn(tl.sum(advantage_sum, 0), length))
    tl.store(means + 3, tl.div_rn(tl.sum(free_sum, 0), length))


@triton.jit(do_not_specialize=["tokens"])
def means_kernel(
    logprobs, old_logprobs, advantages, cu_seqlens, mask, sampler_logprobs,  # [T], cu_seqlens [N+1]
    counts, means,  # [N], [N, COLUMNS] or None
    tokens, sampler_low, sampler_high, c0, c1,
    FORM: tl.constexpr, SEQUENCE: tl.constexpr, CORRECTION: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts a trajectory's unmasked tokens, 0 if the correction removes it; and its means where the loss has any."""
    n = tl.program_id(0)
    start, end = _span(cu_seqlens, n, tokens)
    counted = tl.zeros([BLOCK], tl.int32)
    sampler_sum, ratio_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        keep = _kept(mask, at, at < end)
        counted += keep.to(tl.int32)
        if CORRECTION == SEQUENCE_MASK:
            sampler_sum += _log_ratio(old_logprobs, sampler_logprobs, at, keep)[0]
        if means is not None:
            ratio_sum += _log_ratio(logprobs, old_logprobs, at, keep)[0]
    count = tl.sum(counted, 0)
    length = tl.maximum(count, 1).to(tl.float32)
    if CORRECTION == SEQUENCE_MASK:
        w = exp(tl.div_rn(tl.sum(sampler_sum, 0), length))
        count = tl.where((w >= sampler_low) & (w <= sampler_high), count, 0)
    tl.store(counts + n, count)
    if means is not None:
        means += n.to(tl.int64) * COLUMNS
        log_ratio = tl.div_rn(tl.sum(ratio_sum, 0), length)
        tl.store(means, log_ratio)
        if FORM == VESPO:
            tl.store(means + 1, tl.clamp(tl.sum(ratio_sum, 0), -LOG_RATIO_BOUND, LOG_RATIO_BOUND, KEEP_NAN))
        if FORM == GMPO:
            _gmpo_means(logprobs, old_logprobs, advantages, mask, means, n, start, end, length, log_ratio, c0, c1,
                        SEQUENCE, PER_TOKEN, BLOCK)  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "trajectories"])
def weight_kernel(
    counts, cu_seqlens, normalizer, weight,  # [N], [N+1], [] or None, []
    tokens, trajectories, divisor,
    AGGREGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What a token weighs in the loss, up to its trajectory's length; NaN where cu_seqlens does not cut up the pack."""
    counted, some = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    falls = tl.zeros([BLOCK], tl.int32)
    for first in range(0, trajectories, BLOCK):
        n = first + tl.arange(0, BLOCK)
        count = tl.load(counts + n, mask=n < trajectories, other=0)
        counted += count
        some += (count > 0).to(tl.int64)
        start = tl.load(cu_seqlens + n, mask=n < trajectories, other=0)
        falls += (start > tl.load(cu_seqlens + n + 1, mask=n < trajectories, other=0)).to(tl.int32)
    w = 1.0
    if AGGREGATE != TOKEN_SUM:
        if normalizer is not None:
            w = tl.div_rn(1.0, tl.load(normalizer))
        else:
            units = tl.sum(counted if AGGREGATE == TOKEN_MEAN else some, 0)
            w = tl.div_rn(1.0, tl.maximum(units, 1).to(tl.float32))
        if AGGREGATE == SEQ_MEAN_TOKEN_SUM_NORM:
            w = tl.div_rn(w, divisor)
    ends = (tl.load(cu_seqlens) == 0) & (tl.load(cu_seqlens + trajectories) == tokens)
    tl.store(weight, tl.where(ends & (tl.sum(falls, 0) == 0), w, float("nan")))


@triton.jit
def _clip_term(a, r, chosen, low, high, dual):
    bounded = tl.clamp(r, low, high, KEEP_NAN)
    value, clipped = tl.maximum(-r * a, -bounded * a, KEEP_NAN), r * a > bounded * a
    slope = tl.where(clipped, 0.0, -r * a)
    if chosen is not None:
        value, slope, clipped = tl.where(chosen, 0.0, value), tl.where(chosen, 0.0, slope), clipped | chosen
    over = (a < 0) & (value > -dual * a)
    return tl.where(over, -dual * a, value), tl.where(over, 0.0, slope), clipped | over


@triton.jit
def _sapo_term(a, r, tau):
    y = tau * (r - 1)
    e = exp(-tl.abs(y))
    sigmoid = tl.where(y >= 0, 1.0, e) / (1 + e)
    return -a * (4 / tau) * sigmoid, -4 * a * r * e / ((1 + e) * (1 + e))


@triton.jit
def _dppo_valid(a, new, old, low, high, FORM: tl.constexpr):
    """Whether the token's probability p has not yet moved past the threshold in the direction A pushes it."""
    p, q = exp(new), exp(old)
    if FORM == DPPO_TV:
        valid = tl.where(a > 0, p - q <= high, p - q >= -low)
    else:
        divergence = q * (old - new) + (1 - q) * tl.log(tl.div_rn(1 - q + 1e-8, 1 - p + 1e-8))
        valid = tl.where(a > 0, (divergence <= high) | (p <= q), (divergence <= low) | (p >= q))
    return valid


@triton.jit
def _policy_term(a, new, old, log_ratio, r, chosen, means, c0, c1, c2, c3, FORM: tl.constexpr):
    """A token's loss; its derivative in the log-ratio (gmpo: in the trajectory's mean) and in log p; whether clipped."""
    value, slope, direct, clipped = a, tl.zeros_like(a), tl.zeros_like(a), a != a
    if FORM == CLIP:
        value, slope, clipped = _clip_term(a, r, chosen, c0, c1, c2)
    elif FORM == KL_COV:
        value = -r * a + tl.where(chosen, c0 * tl.abs(log_ratio), 0.0)
        sign = (log_ratio > 0).to(tl.float32) - (log_ratio < 0).to(tl.float32)
        slope, clipped = -r * a + tl.where(chosen, c0 * sign, 0.0), chosen
    elif FORM == SAPO:
        value, slope = _sapo_term(a, r, tl.where(a > 0, c0, c1))
    elif FORM == GMPO:
        value = -tl.load(means + 2) * tl.load(means + 1)
        slope = value
        clipped = ((a > 0) & (log_ratio > c1)) | ((a < 0) & (log_ratio < -c0))
    else:
        if FORM == REINFORCE:
            direct = -a
        elif FORM == CISPO:
            bounded = tl.clamp(r, c0, c1, KEEP_NAN)
            direct, clipped = -bounded * a, bounded != r
        elif FORM == VESPO:
            log_w, decay = tl.load(means + 1), tl.where(a >= 0, c1, c3)
            direct = -exp(decay + tl.where(a >= 0, c0, c2) * log_w - decay * exp(log_w)) * a
        else:
            valid = _dppo_valid(a, new, old, c0, c1, FORM)
            direct, clipped = tl.where(valid, -a * tl.minimum(r, 20.0, KEEP_NAN), 0.0), ~valid
        value = direct * new
    return value, slope, direct, clipped


@triton.jit
def _kl_term(d, r, KL: tl.constexpr):
    """An estimate of the KL divergence; its derivative in the log-ratio and in log p."""
    value, slope, direct = d, tl.zeros_like(d), tl.full(d.shape, 1.0, tl.float32)
    if KL == K2:
        value, direct = 0.5 * d * d, d
    if KL == K3 or KL == K3_CORRECTED:
        bounded = tl.clamp(d, -LOG_RATIO_BOUND, LOG_RATIO_BOUND, KEEP_NAN)
        value = exp_excess(-bounded)
        direct = tl.where(tl.abs(d) <= LOG_RATIO_BOUND, -expm1(-bounded), 0.0)
        if KL == K3_CORRECTED:
            value, slope, direct = r * value, r * value, r * direct
    return value, slope, direct
