"""The policy loss of packed trajectories: loss, gradient and metrics, in four launches without a host read.

The counts and means of each trajectory; what a token weighs; the tokens, as one flat range so that trajectories of any
length fill the GPU; the sum of what their programs found. Where the loss depends on a trajectory's mean, a fifth
launch sums its derivative over the trajectory and spreads it over the tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trajkern.losses.inputs import LossInputs
from trajkern.losses.kinds import METRICS

from .configs import ALONE, ALONG, FLAT, SUMMING
from .policy_loss_forms import bound_log_ratio
from .policy_loss_options import Options, form_numbers
from .policy_loss_terms import (
    Coefficients,
    Pack,
    Place,
    clamp_log_ratio,
    load_advantage,
    load_log_ratio,
    load_mask,
    load_rollouts,
    token_loss,
)
from .primitives import KEEP_NAN, exp

COLUMNS = tl.constexpr(4)  # of a trajectory's means: log-ratio; its sum or gmpo's ratio; gmpo's advantage; gmpo's slope


class Trajectory(NamedTuple):
    """One of the pack: its tokens start:end, of which ``length`` count, as float32 and at least 1."""

    n: tl.tensor
    start: tl.tensor
    end: tl.tensor
    length: tl.tensor


@triton.jit
def _span(cu_seqlens, n, tokens):
    """Where trajectory n starts and ends, inside the pack whatever cu_seqlens holds."""
    start = tl.maximum(tl.load(cu_seqlens + n), 0)
    return start, tl.minimum(tl.load(cu_seqlens + n + 1), tokens)


@triton.jit
def _gmpo_means(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    means,
    trajectory,
    log_ratio,
    bounds,
    SEQUENCE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores exp(mean bounded log-ratio), the mean advantage, and the share of tokens that the bounds let through."""
    bounded_sum, advantage_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    free_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(trajectory.start, trajectory.end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        keep = load_mask(mask, at, at < trajectory.end)
        n = tl.full([BLOCK], 0, tl.int32) + trajectory.n
        a = load_advantage(advantages, Place(at, n, keep), PER_TOKEN)
        if SEQUENCE:
            token_log_ratio = tl.zeros([BLOCK], tl.float32) + log_ratio
        else:
            token_log_ratio = load_log_ratio(logprobs, old_logprobs, at, keep)
        bounded, free = bound_log_ratio(token_log_ratio, a, bounds[0], bounds[1])
        bounded_sum += bounded
        free_sum += free.to(tl.float32)
        advantage_sum += a
    tl.store(means + 1, exp(tl.div_rn(tl.sum(bounded_sum, 0), trajectory.length)))
    tl.store(means + 2, tl.div_rn(tl.sum(advantage_sum, 0), trajectory.length))
    tl.store(means + 3, tl.div_rn(tl.sum(free_sum, 0), trajectory.length))


@triton.jit(do_not_specialize=["tokens"])
def means_kernel(
    logprobs, old_logprobs, advantages, cu_seqlens, mask, sampler_logprobs,  # [T], cu_seqlens [N+1]
    counts, inverses, means,  # [N], [N], [N, COLUMNS] or None
    tokens, sampler_low, sampler_high, c0, c1,
    FORM: tl.constexpr, SEQUENCE: tl.constexpr, CORRECTION: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A trajectory's unmasked tokens, none if the correction removes it; 1 / their number, or 0; its means, if any."""
    n = tl.program_id(0)
    start, end = _span(cu_seqlens, n, tokens)
    counted = tl.zeros([BLOCK], tl.int32)
    sampler_sum, ratio_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        keep = load_mask(mask, at, at < end)
        counted += keep.to(tl.int32)
        if CORRECTION == "sequence_mask":
            sampler_sum += load_log_ratio(old_logprobs, sampler_logprobs, at, keep)
        if means is not None:
            ratio_sum += load_log_ratio(logprobs, old_logprobs, at, keep)
    count = tl.sum(counted, 0)
    length = tl.maximum(count, 1).to(tl.float32)
    if CORRECTION == "sequence_mask":
        w = exp(tl.div_rn(tl.sum(sampler_sum, 0), length))
        count = tl.where((w >= sampler_low) & (w <= sampler_high), count, 0)
    tl.store(counts + n, count)
    tl.store(inverses + n, tl.where(count > 0, tl.div_rn(1.0, length), 0.0))
    if means is not None:
        means += n.to(tl.int64) * COLUMNS
        log_ratio = tl.div_rn(tl.sum(ratio_sum, 0), length)
        tl.store(means, log_ratio)
        if FORM == "vespo":
            tl.store(means + 1, clamp_log_ratio(tl.sum(ratio_sum, 0)))
        if FORM == "gmpo":
            trajectory = Trajectory(n, start, end, length)
            _gmpo_means(
                logprobs,
                old_logprobs,
                advantages,
                mask,
                means,
                trajectory,
                log_ratio,
                (c0, c1),
                SEQUENCE,
                PER_TOKEN,
                BLOCK,
            )


@triton.jit
def _unit_weight(normalizer, units):
    """1 / the normalizer, or / the sum of the units that are there where there is none."""
    if normalizer is not None:
        w = tl.div_rn(1.0, tl.load(normalizer))
    else:
        w = tl.div_rn(1.0, tl.maximum(tl.sum(units, 0), 1).to(tl.float32))
    return w


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
    if AGGREGATE == "token_sum":
        w = 1.0
    elif AGGREGATE == "token_mean":
        w = _unit_weight(normalizer, counted)
    elif AGGREGATE == "seq_mean_token_sum_norm":
        w = tl.div_rn(_unit_weight(normalizer, some), divisor)
    elif AGGREGATE == "seq_mean_token_sum" or AGGREGATE == "seq_mean_token_mean":
        w = _unit_weight(normalizer, some)
    else:
        tl.static_assert(False, f"no aggregate {AGGREGATE}")
    ends = (tl.load(cu_seqlens) == 0) & (tl.load(cu_seqlens + trajectories) == tokens)
    tl.store(weight, tl.where(ends & (tl.sum(falls, 0) == 0), w, float("nan")))


@triton.jit
def _store_partial(partials, loss, w, keep, count, BRANCH: tl.constexpr):
    """One row of sums over a program's tokens: loss, clipped, -log-ratio, ratio, its largest, entropy, KL, tokens."""
    clipped, largest = tl.where(keep, loss.clipped, 0.0), tl.where(keep, loss.ratio, 0.0)
    log_ratio, ratio, entropy, kl = loss.log_ratio, largest, loss.entropy, loss.kl
    if BRANCH:
        log_ratio, ratio, entropy, kl = log_ratio * count, ratio * count, entropy * count, kl * count
    partials += tl.program_id(0).to(tl.int64) * 8
    value, ratio_sum = tl.where(keep, loss.value * w, 0.0), tl.sum(ratio, 0)
    tl.store(partials, tl.sum(value, 0))
    tl.store(partials + 1, tl.sum(clipped, 0))
    tl.store(partials + 2, -tl.sum(log_ratio, 0))
    tl.store(partials + 3, ratio_sum)
    tl.store(partials + 4, tl.where(ratio_sum == ratio_sum, tl.max(largest, 0), ratio_sum))
    tl.store(partials + 5, tl.sum(entropy, 0))
    tl.store(partials + 6, tl.sum(kl, 0))
    tl.store(partials + 7, tl.sum(count, 0))


@triton.jit
def _trajectory_of(cu_seqlens, at, trajectories, steps):
    """The trajectory of each token, by bisection: the first that ends behind it."""
    low = tl.zeros(at.shape, tl.int32)
    high = low + (trajectories - 1)
    for _ in range(steps):
        middle = (low + high) // 2
        behind = tl.load(cu_seqlens + middle + 1) <= at
        low, high = tl.where(behind, middle + 1, low), tl.where(behind, high, middle)
    return tl.minimum(low, trajectories - 1)


@triton.jit(do_not_specialize=["tokens", "trajectories", "steps", "stride"])
def tokens_kernel(
    logprobs, old_logprobs, advantages, cu_seqlens, mask, sampler_logprobs, ref_logprobs, entropy, selected,
    inverses, means, weight,  # [N], [N, COLUMNS], []
    grad_logprobs, grad_entropy, mean_slopes, shares, partials,  # [T] or None; partials [programs, 8]
    tokens, trajectories, steps, stride, kl_coef, entropy_coef, sampler_low, sampler_high, c0, c1, c2, c3,
    FORM: tl.constexpr, SEQUENCE: tl.constexpr, KL: tl.constexpr, CORRECTION: tl.constexpr, PER_TOKEN: tl.constexpr,
    AGGREGATE: tl.constexpr, BRANCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = _trajectory_of(cu_seqlens, at, trajectories, steps)
    keep = load_mask(mask, at, at < tokens)
    if CORRECTION == "sequence_mask":
        keep = keep & (tl.load(inverses + n) > 0)
    count = tl.where(keep, 1.0, 0.0)
    stride = stride.to(tl.int64)
    if BRANCH:  # a token counts as often as it has rollouts
        up, down, level = load_rollouts(advantages, stride, Place(at, n, keep), PER_TOKEN)
        count = up + down + level
        keep = keep & (count > 0)
    if means is not None:
        means += n.to(tl.int64) * COLUMNS
    pack = Pack(logprobs, old_logprobs, advantages, stride, ref_logprobs, sampler_logprobs, entropy, selected)
    place, numbers = Place(at, n, keep), (c0, c1, c2, c3)
    coefficients = Coefficients(kl_coef, entropy_coef, sampler_low, sampler_high)
    loss = token_loss(pack, place, means, coefficients, numbers, FORM, SEQUENCE, KL, CORRECTION, PER_TOKEN, BRANCH)
    w, inside = tl.load(weight), at < tokens
    if AGGREGATE == "seq_mean_token_mean":
        w *= tl.load(inverses + n)
    if grad_logprobs is not None:
        tl.store(grad_logprobs + at, tl.where(keep, w * loss.slope, 0.0), mask=inside)
    if mean_slopes is not None:
        tl.store(mean_slopes + at, tl.where(keep, w * loss.mean_slope, 0.0), mask=inside)
        tl.store(shares + at, keep & loss.share, mask=inside)
    if grad_entropy is not None:
        tl.store(grad_entropy + at, tl.where(keep, -entropy_coef * loss.leaves * w, 0.0), mask=inside)
    _store_partial(partials, loss, w, keep, count, BRANCH)


@triton.jit(do_not_specialize=["tokens"])
def spread_kernel(
    grad_logprobs, mean_slopes, shares, cu_seqlens, inverses,  # [T], cu_seqlens [N+1], inverses [N]
    tokens,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the derivative of a trajectory's loss in its mean to the gradients of the tokens that make up the mean."""
    n = tl.program_id(0)
    start, end = _span(cu_seqlens, n, tokens)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(mean_slopes + at, mask=at < end, other=0.0)
    each = tl.sum(total, 0) * tl.load(inverses + n)
    for first in range(start, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        share = tl.load(shares + at, mask=at < end, other=0) != 0
        grad = tl.load(grad_logprobs + at, mask=at < end, other=0.0)
        tl.store(grad_logprobs + at, tl.where(share, grad + each, grad), mask=at < end)


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(partials, loss, metrics, programs, BLOCK: tl.constexpr):
    """Adds up the programs' rows in a fixed order: the loss, means of the metrics, the largest ratio, the tokens."""
    column = tl.arange(0, 8)[None, :]
    total, largest = tl.zeros([BLOCK, 8], tl.float64), tl.zeros([BLOCK, 8], tl.float32)
    for first in range(0, programs, BLOCK):
        row = first + tl.arange(0, BLOCK)[:, None]
        x = tl.load(partials + row.to(tl.int64) * 8 + column, mask=row < programs, other=0.0)
        total += x
        largest = tl.maximum(largest, x, KEEP_NAN)
    total, largest = tl.sum(total, 0), tl.max(largest, 0)
    column = tl.arange(0, 8)
    count = tl.sum(tl.where(column == 7, total, 0.0), 0)
    result = tl.where((column == 0) | (column == 7), total, total / tl.maximum(count, 1.0)).to(tl.float32)
    result = tl.where((column == 4) & (total == total), largest, result)
    tl.store(loss + column, result, mask=column == 0)
    tl.store(metrics + column - 1, result, mask=column > 0)


@triton.jit(do_not_specialize=["size"])
def scale_kernel(x, scale, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    changed = at < tl.where(factor == 1, 0, size)
    tl.store(x + at, tl.load(x + at, mask=changed, other=0.0) * factor, mask=changed)


def policy_loss(
    logprobs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    selected: Tensor | None,  # [T]
    *inputs: Any,
) -> list[Tensor]:
    """``inputs``: those of :class:`LossInputs`, of which ``options`` has all of kinds.OPTIONS."""
    x = LossInputs(*inputs)
    wanted, (tokens, trajectories) = Options.of(tuple(x.options)), _check(logprobs, x.cu_seqlens)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logprobs.device)

    loss, metrics, partials = empty(), empty(len(METRICS)), empty(triton.cdiv(tokens, FLAT["BLOCK"]), 8)
    gradients = [empty(tokens) if need else None for need in (wanted.need_logprobs, wanted.need_entropy)]
    results = [loss, metrics, *(gradient for gradient in gradients if gradient is not None)]
    if tokens == 0:
        loss.zero_(), metrics.zero_()
        return results
    counts, inverses, weight = empty(trajectories, dtype=torch.int32), empty(trajectories), empty()
    means = empty(trajectories, COLUMNS.value) if wanted.reads_means else None
    in_mean = (empty(tokens), empty(tokens, dtype=torch.bool)) if wanted.spreads else (None, None)
    pack = (logprobs, x.old_logprobs, x.advantages, x.cu_seqlens, x.mask, x.sampler_logprobs)
    numbers = [x.parameter("sampler_low"), x.parameter("sampler_high"), *form_numbers(wanted.form, x)]
    switches = wanted.switches()
    with torch.cuda.device_of(logprobs):
        means_kernel[(trajectories,)](*pack, counts, inverses, means, tokens, *numbers[:4], **switches, **ALONG)
        sizes = (tokens, trajectories, x.parameter("max_length"))
        weight_kernel[(1,)](counts, x.cu_seqlens, x.normalizer, weight, *sizes, AGGREGATE=wanted.aggregate, **ALONE)
        tokens_kernel[(partials.shape[0],)](
            *pack,
            x.ref_logprobs,
            entropy,
            selected,
            inverses,
            means,
            weight,
            *gradients,
            *in_mean,
            partials,
            tokens,
            trajectories,
            trajectories.bit_length(),
            x.advantages.shape[-1],
            x.parameter("kl_coef"),
            x.parameter("entropy_coef"),
            *numbers,
            **switches,
            KL=wanted.kl,
            AGGREGATE=wanted.aggregate,
            BRANCH=x.advantages.ndim == 2,
            **FLAT,
        )
        if wanted.spreads:
            spread_kernel[(trajectories,)](gradients[0], *in_mean, x.cu_seqlens, inverses, tokens, **ALONG)
        sum_kernel[(1,)](partials, loss, metrics, partials.shape[0], **SUMMING)
    return results


def _check(logprobs: Tensor, cu_seqlens: Tensor) -> tuple[int, int]:
    if logprobs.dtype != torch.float32:
        raise TypeError(
            f"logprobs must have dtype float32 for the triton backend; got {str(logprobs.dtype).removeprefix('torch.')}"
        )
    tokens, trajectories = logprobs.shape[0], cu_seqlens.shape[0] - 1
    if tokens and trajectories < 1:
        raise ValueError(f"cu_seqlens must run from 0 to the {tokens} tokens; it holds no trajectory")
    return tokens, trajectories


def scale_gradient_(x: Tensor, scale: Tensor) -> None:
    """x *= scale; where scale is 1 nothing is read or written."""
    if x.numel():
        with torch.cuda.device_of(x):
            scale_kernel[(triton.cdiv(x.numel(), FLAT["BLOCK"]),)](x, scale, x.numel(), **FLAT)
