"""The policy loss of packed trajectories: loss, gradient and metrics, in two launches without a host read.

The tokens lie in pieces of one trajectory each, so that trajectories of any length fill the GPU, and programs take them
by turns: at most MOST_PROGRAMS, each of which leaves a row of sums. A piece finds by itself what it needs of its whole
trajectory. What the loss divides by is known when all rows are there: the second launch adds them up, in every program
and in the same order, multiplies the gradients by it, and adds the derivative in a trajectory's mean to its tokens'.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trajkern.losses.inputs import LossInputs, fill_without_tokens
from trajkern.losses.kinds import METRICS, SAMPLER_BAND

from .configs import FLAT, MOST_PROGRAMS, PIECES
from .policy_loss_options import Options, bits, computed_metrics, launch_numbers, switches
from .policy_loss_streams import Streams, Units, kl_terms, stream_slopes, supervised_terms
from .policy_loss_terms import (
    Coefficients,
    Pack,
    Place,
    load_mask,
    load_rollouts,
    token_loss,
)
from .policy_loss_trajectories import falls_in_share, first_piece, span, trajectory, trajectory_of
from .primitives import KEEP_NAN, exp, exp_excess

# the columns of a program's sums: the metrics (of effective_sample_size the squares, of a KL with own weights the
# weighted estimates), then what else is added up
CLIP_FRACTION, CLIP_LOW, CLIP_HIGH, APPROX_KL, RATIO_MEAN, RATIO_MAX, ENTROPY, KL_MEAN = map(tl.constexpr, range(8))
SAMPLER_KL, SAMPLER_OUTSIDE, EFFECTIVE_SAMPLE_SIZE, NUM_TOKENS = map(tl.constexpr, range(8, 12))
LOSS, SAMPLER_RATIO, SCORED, TRAJECTORIES, FALLS, SUPERVISED, SUPERVISED_COUNT, KL_COUNT = map(
    tl.constexpr, range(len(METRICS), len(METRICS) + 8)
)
COLUMNS = tl.constexpr(32)  # of which the rest are 0
COUNT = tl.constexpr(len(METRICS))
# of the metrics, those of each reduction; the others are means
LARGEST, SUMS, EFFECTIVE = (
    tl.constexpr(bits(metric.reduction == name for metric in METRICS.values()))
    for name in ("largest", "sum", "effective_share")
)
SAMPLER_LOW, SAMPLER_HIGH = map(tl.constexpr, SAMPLER_BAND)


@triton.jit
def _row(loss, w, keep, count, BRANCH: tl.constexpr, SAMPLER: tl.constexpr):
    """Sums over a piece, and its largest ratio."""
    clipped, ratio = tl.where(keep, loss.clipped, 0.0), tl.where(keep, loss.ratio, 0.0)
    largest = tl.max(ratio, 0)
    log_ratio, entropy, kl = loss.log_ratio, loss.entropy, loss.kl
    if BRANCH:
        log_ratio, ratio, entropy, kl = log_ratio * count, ratio * count, entropy * count, kl * count
    ratio_sum = tl.sum(ratio, 0)
    column = tl.arange(0, COLUMNS)
    row = tl.where(column == LOSS, tl.sum(tl.where(keep, loss.value, 0.0), 0) * w, 0.0)
    row = tl.where(column == CLIP_FRACTION, tl.sum(clipped, 0), row)
    row = tl.where(column == CLIP_LOW, tl.sum(loss.below, 0), row)
    row = tl.where(column == CLIP_HIGH, tl.sum(loss.above, 0), row)
    row = tl.where(column == APPROX_KL, -tl.sum(log_ratio, 0), row)
    row = tl.where(column == RATIO_MEAN, ratio_sum, row)
    row = tl.where(column == ENTROPY, tl.sum(entropy, 0), row)
    row = tl.where(column == KL_MEAN, tl.sum(kl, 0), row)
    row = tl.where(column == NUM_TOKENS, tl.sum(count, 0), row)
    if SAMPLER:
        sampler_ratio = exp(loss.log_w)
        outside = (sampler_ratio < SAMPLER_LOW) | (sampler_ratio > SAMPLER_HIGH)
        row = tl.where(column == SAMPLER_KL, tl.sum(count * exp_excess(loss.log_w), 0), row)
        row = tl.where(column == SAMPLER_OUTSIDE, tl.sum(tl.where(outside, count, 0.0), 0), row)
        row = tl.where(column == SAMPLER_RATIO, tl.sum(count * sampler_ratio, 0), row)
        row = tl.where(column == EFFECTIVE_SAMPLE_SIZE, tl.sum(count * sampler_ratio * sampler_ratio, 0), row)
    return row.to(tl.float64), tl.where(ratio_sum == ratio_sum, largest, ratio_sum)


@triton.jit
def _with_streams(row, streams, at, inside, KL: tl.constexpr):
    """A piece's sums, with those of the terms that have weights of their own."""
    column = tl.arange(0, COLUMNS)
    if streams.kl_weights is not None:
        count, kl = kl_terms(streams, at, inside, KL)
        row = tl.where(column == KL_MEAN, tl.sum(kl, 0).to(tl.float64), row)
        row = tl.where(column == KL_COUNT, count.to(tl.float64), row)
    if streams.supervised_weights is not None:
        count, weighted = supervised_terms(streams, at, inside)
        row = tl.where(column == SUPERVISED, tl.sum(weighted, 0).to(tl.float64), row)
        row = tl.where(column == SUPERVISED_COUNT, count.to(tl.float64), row)
    return row


@triton.jit(do_not_specialize=["tokens", "trajectories", "pieces", "share", "steps", "stride"])
def tokens_kernel(
    logprobs, old_logprobs, advantages, cu_seqlens, mask, sampler_logprobs, ref_logprobs, entropy, selected,
    supervised_weights, kl_weights,
    grad_logprobs, grad_entropy, shares, mean_slopes, partials,  # [T], [T], [T], [pieces], [programs, COLUMNS] float64
    tokens, trajectories, pieces, share, steps, stride,
    kl_coef, entropy_coef, sampler_low, sampler_high, c0, c1, c2, c3,
    FORM: tl.constexpr, SEQUENCE: tl.constexpr, KL: tl.constexpr, CORRECTION: tl.constexpr, PER_TOKEN: tl.constexpr,
    AGGREGATE: tl.constexpr, MEANS: tl.constexpr, BRANCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients and sums of ``share`` pieces, but for what the whole batch divides them by."""
    BY_TRAJECTORY: tl.constexpr = AGGREGATE != "token_mean" and AGGREGATE != "token_sum"
    WALK: tl.constexpr = MEANS or CORRECTION == "sequence_mask" or (BY_TRAJECTORY and mask is not None)
    numbers, coefficients = (c0, c1, c2, c3), Coefficients(kl_coef, entropy_coef, sampler_low, sampler_high)
    stride = stride.to(tl.int64)
    OF_MASK: tl.constexpr = KL if kl_weights is None else "none"
    streams = Streams(logprobs, ref_logprobs, supervised_weights, kl_weights)
    pack = Pack(logprobs, old_logprobs, advantages, stride, mask, ref_logprobs, sampler_logprobs, entropy, selected)
    column = tl.arange(0, COLUMNS)
    total, largest = tl.zeros([COLUMNS], tl.float64), tl.full([], 0.0, tl.float32)
    first = tl.program_id(0) * share
    n = trajectory_of(cu_seqlens, first, tokens, trajectories, steps, BLOCK)
    for piece in range(first, tl.minimum(first + share, pieces)):
        behind = (n + 1 < trajectories) & (first_piece(cu_seqlens, n + 1, tokens, BLOCK) <= piece)
        n = tl.where(behind, n + 1, n)
        of = trajectory(
            pack, n, span(cu_seqlens, n, tokens), coefficients, numbers,
            FORM, SEQUENCE, CORRECTION, PER_TOKEN, MEANS, WALK, BLOCK,
        )  # fmt: skip
        offset = piece - first_piece(cu_seqlens, n, tokens, BLOCK)
        at = of.start + offset.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = (at >= of.start) & (at < of.end)
        keep = load_mask(mask, at, inside)
        if CORRECTION == "sequence_mask":
            keep = keep & (of.count > 0)
        counted, count = tl.sum(keep.to(tl.int32), 0), tl.where(keep, 1.0, 0.0)
        place = Place(at, tl.zeros([BLOCK], tl.int32) + n, keep)
        if BRANCH:  # a token counts as often as it has rollouts
            up, down, level = load_rollouts(advantages, stride, place, PER_TOKEN)
            count = up + down + level
            place = Place(at, place.n, keep & (count > 0))
        loss = token_loss(
            pack, place, of.means, coefficients, numbers, FORM, SEQUENCE, OF_MASK, CORRECTION, PER_TOKEN, BRANCH
        )
        keep, w = place.keep, tl.full([], 1.0, tl.float32)
        if AGGREGATE == "seq_mean_token_mean":
            w = of.inverse
        if grad_logprobs is not None:
            tl.store(grad_logprobs + at, tl.where(keep, w * loss.slope, 0.0), mask=inside)
        if mean_slopes is not None:
            tl.store(mean_slopes + piece, tl.sum(tl.where(keep, w * loss.mean_slope, 0.0), 0) * of.inverse)
            tl.store(shares + at, keep & loss.share, mask=inside)
        if grad_entropy is not None:
            tl.store(grad_entropy + at, tl.where(keep, -entropy_coef * loss.leaves * w, 0.0), mask=inside)
        row, ratio = _row(loss, w, keep, count, BRANCH, sampler_logprobs is not None)
        row = tl.where(column == SCORED, counted.to(tl.float64), row)
        row = tl.where(column == TRAJECTORIES, tl.where((of.count > 0) & (offset == 0), 1.0, 0.0), row)
        total += _with_streams(row, streams, at, inside, KL)
        largest = tl.maximum(largest, ratio, KEEP_NAN)
    total = tl.where(column == RATIO_MAX, largest.to(tl.float64), total)
    total = tl.where(column == FALLS, falls_in_share(cu_seqlens, trajectories, BLOCK).to(tl.float64), total)
    tl.store(partials + tl.program_id(0) * COLUMNS + column, total)


@triton.jit
def _column(partials, column, programs, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    return tl.load(partials + row * COLUMNS + column, mask=row < programs, other=0.0)


@triton.jit
def _unit(partials, column, normalizer, programs, ROWS: tl.constexpr):
    """1 / the normalizer, or / what the column counts where there is none.

    A normalizer that is not positive makes it NaN, but where nothing is counted it is 0.
    """
    units = tl.sum(_column(partials, column, programs, ROWS), 0)
    if normalizer is not None:
        n = tl.load(normalizer)
        unit = tl.where(units == 0, 0.0, tl.div_rn(1.0, tl.where(n > 0, n, float("nan"))))
    else:
        unit = tl.div_rn(1.0, tl.maximum(units, 1.0).to(tl.float32))
    return unit


@triton.jit
def _unit_weight(partials, normalizer, programs, AGGREGATE: tl.constexpr, ROWS: tl.constexpr):
    """What the tokens' or the trajectories' losses are multiplied with."""
    w = tl.full([], 1.0, tl.float32)
    if AGGREGATE == "token_mean":
        w = _unit(partials, SCORED, normalizer, programs, ROWS)
    elif AGGREGATE != "token_sum":
        w = _unit(partials, TRAJECTORIES, normalizer, programs, ROWS)
    return w


@triton.jit
def _report(partials, w, streams, units, loss, metrics, programs, COMPUTED: tl.constexpr, ROWS: tl.constexpr):
    """The loss, and each metric by its reduction: NaN where it is not among those COMPUTED."""
    value = tl.sum(_column(partials, LOSS, programs, ROWS), 0) * w
    if streams.kl_weights is not None:
        value += tl.sum(_column(partials, KL_MEAN, programs, ROWS), 0) * units.kl * units.kl_coef
    if streams.supervised_weights is not None:
        supervised = -tl.sum(_column(partials, SUPERVISED, programs, ROWS), 0) * units.supervised
        tl.store(metrics + COUNT, supervised.to(tl.float32))
        value += supervised
    tl.store(loss, value.to(tl.float32))
    count = tl.sum(_column(partials, NUM_TOKENS, programs, ROWS), 0)
    for column in tl.static_range(0, COUNT):
        if (COMPUTED >> column) & 1:
            found = _column(partials, column, programs, ROWS)
            total = tl.sum(found, 0)
            if (LARGEST >> column) & 1:
                result = tl.where(total == total, tl.max(found, 0), total)
            elif column == KL_MEAN and streams.kl_weights is not None:
                result = total * units.kl
            elif (SUMS >> column) & 1:
                result = total
            elif (EFFECTIVE >> column) & 1:
                ratios = tl.sum(_column(partials, SAMPLER_RATIO, programs, ROWS), 0)
                result = ratios * ratios / tl.where(count > 0, count * total, 1.0)
            else:
                result = total / tl.maximum(count, 1.0)
            tl.store(metrics + column, result.to(tl.float32))
        else:
            tl.store(metrics + column, float("nan"))


@triton.jit
def _slope(grad, streams, units, at, inside, KL: tl.constexpr, BLOCK: tl.constexpr):
    """A gradient in log p, with that of the terms that have weights of their own."""
    if streams.logprobs is not None:
        grad += stream_slopes(streams, units, at, inside, KL, BLOCK)
    return grad


@triton.jit
def _spread(pointers, w, tokens, trajectories, pieces, steps, streams, units, KL: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the derivative of a trajectory's loss in its mean to the gradients of the tokens that make up the mean."""
    grad_logprobs, shares, mean_slopes, cu_seqlens = pointers
    piece = tl.program_id(0)
    n = trajectory_of(cu_seqlens, piece, tokens, trajectories, steps, BLOCK)
    start, end = span(cu_seqlens, n, tokens)
    first = first_piece(cu_seqlens, n, tokens, BLOCK)
    last = tl.minimum(first_piece(cu_seqlens, n + 1, tokens, BLOCK), pieces)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(first, last, BLOCK):
        q = begin + tl.arange(0, BLOCK)
        total += tl.load(mean_slopes + q, mask=q < last, other=0.0)
    each = tl.sum(total, 0)
    at = start + (piece - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (at >= start) & (at < end)
    share = tl.load(shares + at, mask=inside, other=0) != 0
    grad = tl.load(grad_logprobs + at, mask=inside, other=0.0)
    grad = _slope(tl.where(share, grad + each, grad) * w, streams, units, at, inside, KL, BLOCK)
    tl.store(grad_logprobs + at, grad, mask=inside)


@triton.jit(do_not_specialize=["tokens", "trajectories", "pieces", "programs", "steps"])
def finish_kernel(
    partials, cu_seqlens, normalizer, loss, metrics, grad_logprobs, grad_entropy, shares, mean_slopes,
    logprobs, ref_logprobs, supervised_weights, supervised_normalizer, kl_weights, kl_normalizer,
    tokens, trajectories, pieces, programs, steps, divisor, kl_coef,
    AGGREGATE: tl.constexpr, KL: tl.constexpr, COMPUTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows' sums, and the gradients times what a token weighs: NaN where cu_seqlens does not cut up the pack.

    Log-probs are there where a term has weights of its own, whose gradient they are added to.
    """
    streams = Streams(logprobs, ref_logprobs, supervised_weights, kl_weights)
    one = tl.full([], 1.0, tl.float32)
    units = Units(
        one if supervised_weights is None else _unit(partials, SUPERVISED_COUNT, supervised_normalizer, programs, ROWS),
        one if kl_weights is None else _unit(partials, KL_COUNT, kl_normalizer, programs, ROWS),
        kl_coef,
    )
    w = _unit_weight(partials, normalizer, programs, AGGREGATE, ROWS)
    if AGGREGATE == "seq_mean_token_sum_norm":
        w = tl.div_rn(w, divisor)
    elif AGGREGATE == "token_mean" or AGGREGATE == "token_sum":
        pass
    else:
        tl.static_assert(
            AGGREGATE == "seq_mean_token_sum" or AGGREGATE == "seq_mean_token_mean", f"no aggregate {AGGREGATE}"
        )
    ends = (tl.load(cu_seqlens) == 0) & (tl.load(cu_seqlens + trajectories) == tokens)
    w = tl.where(ends & (tl.sum(_column(partials, FALLS, programs, ROWS), 0) == 0), w, float("nan"))
    if tl.program_id(0) == 0:
        _report(partials, w, streams, units, loss, metrics, programs, COMPUTED, ROWS)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    if mean_slopes is not None:
        pointers = (grad_logprobs, shares, mean_slopes, cu_seqlens)
        _spread(pointers, w, tokens, trajectories, pieces, steps, streams, units, KL, BLOCK)
        unfit = at < tl.where(w == w, 0, tokens)  # a piece may not be there then
        tl.store(grad_logprobs + at, tl.full([BLOCK], float("nan"), tl.float32), mask=unfit)
    elif grad_logprobs is not None:
        grad = tl.load(grad_logprobs + at, mask=inside, other=0.0) * w
        tl.store(grad_logprobs + at, _slope(grad, streams, units, at, inside, KL, BLOCK), mask=inside)
    if grad_entropy is not None:
        tl.store(grad_entropy + at, tl.load(grad_entropy + at, mask=inside, other=0.0) * w, mask=inside)


@triton.jit(do_not_specialize=["size", "second_size"])
def scale_kernel(first, second, scale, size, second_size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale)
    changed = at < tl.where(factor == 1, 0, size)
    tl.store(first + at, tl.load(first + at, mask=changed, other=0.0) * factor, mask=changed)
    if second is not None:
        changed = at < tl.where(factor == 1, 0, second_size)
        tl.store(second + at, tl.load(second + at, mask=changed, other=0.0) * factor, mask=changed)


def policy_loss(
    logprobs: Tensor,  # [T]
    entropy: Tensor | None,  # [T]
    selected: Tensor | None,  # [T]
    *inputs: Any,
) -> list[Tensor]:
    """``inputs``: those of :class:`LossInputs`, of which ``options`` has all of kinds.OPTIONS."""
    x = LossInputs(*inputs)
    wanted, (tokens, trajectories) = Options.of(tuple(x.options)), _check(logprobs, x.cu_seqlens)
    new = logprobs.new_empty
    loss, metrics = new(()), new(len(x.metrics))
    grad_logprobs = new(tokens) if wanted.need_logprobs else None
    grad_entropy = new(tokens) if wanted.need_entropy else None
    results = [x for x in (loss, metrics, grad_logprobs, grad_entropy) if x is not None]
    if tokens == 0:
        loss.zero_()
        given = {"ref_logprobs": x.ref_logprobs, "sampler_logprobs": x.sampler_logprobs}
        fill_without_tokens(metrics, entropy=entropy, **given)
        return results
    computed = computed_metrics(entropy is not None, x.ref_logprobs is not None, x.sampler_logprobs is not None)
    pieces = trajectories + tokens // PIECES["BLOCK"]
    share = _ceil_div(pieces, MOST_PROGRAMS)
    programs = _ceil_div(pieces, share)
    partials, shares, mean_slopes = new(programs * COLUMNS.value, dtype=torch.float64), None, None
    if wanted.spreads:
        shares, mean_slopes = new(tokens, dtype=torch.bool), new(pieces)
    steps, divisor, numbers = (
        trajectories.bit_length(),
        x.parameter("max_length"),
        launch_numbers(wanted.form, tuple(x.params)),
    )
    of_streams = (logprobs, x.ref_logprobs) if x.has_streams else (None, None)
    blocks = 1 if len(results) == 2 else pieces if wanted.spreads else _ceil_div(tokens, PIECES["BLOCK"])
    with torch.cuda.device_of(logprobs):
        tokens_kernel[(programs,)](
            logprobs, x.old_logprobs, x.advantages, x.cu_seqlens, x.mask, x.sampler_logprobs, x.ref_logprobs, entropy,
            selected, x.supervised_weights, x.kl_weights, grad_logprobs, grad_entropy, shares, mean_slopes, partials,
            tokens, trajectories, pieces, share, steps, x.advantages.shape[-1], *numbers,
            BRANCH=x.advantages.ndim == 2, **switches(wanted), **PIECES,
        )  # fmt: skip
        finish_kernel[(blocks,)](
            partials, x.cu_seqlens, x.normalizer, loss, metrics, grad_logprobs, grad_entropy, shares, mean_slopes,
            *of_streams, x.supervised_weights, x.supervised_normalizer, x.kl_weights, x.kl_normalizer,
            tokens, trajectories, pieces, programs, steps, divisor, numbers[0],
            AGGREGATE=wanted.aggregate, KL=wanted.kl if x.has_streams else "none", COMPUTED=bits(computed),
            ROWS=MOST_PROGRAMS, **PIECES,
        )  # fmt: skip
    return results


def _ceil_div(x: int, y: int) -> int:
    """triton.cdiv would take ten times as long."""
    return -(-x // y)


def _check(logprobs: Tensor, cu_seqlens: Tensor) -> tuple[int, int]:
    if logprobs.dtype != torch.float32:
        raise TypeError(
            f"logprobs must have dtype float32 for the triton backend; got {str(logprobs.dtype).removeprefix('torch.')}"
        )
    tokens, trajectories = logprobs.shape[0], cu_seqlens.shape[0] - 1
    if tokens and trajectories < 1:
        raise ValueError(f"cu_seqlens must run from 0 to the {tokens} tokens; it holds no trajectory")
    return tokens, trajectories


def scale_gradients_(first: Tensor, second: Tensor | None, scale: Tensor) -> None:
    """x *= scale for each; where scale is 1 nothing is read or written."""
    sizes = first.numel(), 0 if second is None else second.numel()
    if longest := max(sizes):
        with torch.cuda.device_of(first):
            scale_kernel[(_ceil_div(longest, FLAT["BLOCK"]),)](first, second, scale, *sizes, **FLAT)
