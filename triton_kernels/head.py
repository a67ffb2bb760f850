"""Tiles of the head's logits: folded into their rows' statistics, and turned into their gradient.

A program folds a row's columns as the log-prob kernels do, then adds what the row had before; statistics are of
everything but one place of the maximum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trajkern._tiles import head as tiles
from trajkern._tiles.head import Folded, Stats
from trajkern._tiles.pairs import Pairs
from trajkern._tiles.tiles import Block, BlockTerms, Kernels, Narrowing

from .configs import STATES, WRITING, row_warps
from .head_rows import add_residual, gather_kernel, pick_kernel, scatter_kernel, write_kernel
from .logprob import MAP_LOADS, NEGLIGIBLE, _columns, _fold, _launch, _load, _map_launch, _merge
from .policy_loss import policy_loss
from .primitives import KEEP_NAN, LN_2, LOG2_E, exp, expm1, log1p

BEHIND = tl.constexpr(1 << 62)  # a column that no row has


@triton.jit
def _join(s, old_m, old_rest, old_eu, old_ee, m, rest, eu, ee):
    """Both parts' sums, measured from the larger maximum; the other maximum becomes one of the rest."""
    top = tl.maximum(old_m, m)
    old_is_top = old_m >= m
    lost = tl.where(old_is_top, m, old_m)
    u = (lost - tl.where(top == float("-inf"), 0.0, top)) * s
    e = exp(u)
    lost_rest, lost_eu = tl.where(old_is_top, rest, old_rest), tl.where(old_is_top, eu, old_eu)
    lost_ee = tl.where(old_is_top, ee, old_ee)
    moment = tl.where(e == 0, 0.0, e * (lost_eu + tl.maximum(u, NEGLIGIBLE, KEEP_NAN) * (lost_rest + 1)))
    return (
        top,
        tl.where(old_is_top, old_rest, rest) + e * (lost_rest + 1),
        tl.where(old_is_top, old_eu, eu) + moment,
        tl.where(old_is_top, old_ee, ee) + e * e * (lost_ee + 1),
    )


@triton.jit(do_not_specialize=["stride", "vectors"])
def fold_kernel(
    z,  # [rows, columns]
    scale, state,  # [rows], [rows, 4]
    stride, vectors,
    MOMENTS: tl.constexpr, FIRST: tl.constexpr,
    VECTOR: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z += tl.multiple_of(row.to(tl.int64) * stride, VECTOR)
    size = vectors * VECTOR
    s = tl.load(scale + row).to(tl.float32)
    s2 = s * LOG2_E
    TILE: tl.constexpr = THREADS * WIDTH
    columns = _columns(THREADS, WIDTH, VECTOR)
    m = tl.full([THREADS], float("-inf"), tl.float32)
    rest, moment, square = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    for start in range(0, size, 4 * TILE):
        z0 = _load(z + start, columns, size - start)
        z1 = _load(z + start, columns + TILE, size - start)
        z2 = _load(z + start, columns + 2 * TILE, size - start)
        z3 = _load(z + start, columns + 3 * TILE, size - start)
        m, rest, moment, square = _fold(z0, z1, z2, z3, s2, m, rest, moment, square, MOMENTS, MOMENTS)
    m, rest, moment, square = _merge(s, s2, m, rest, moment, square)
    state += 4 * row.to(tl.int64)
    old_m, old_rest, old_eu, old_ee = float("-inf"), 0.0, 0.0, 0.0
    if not FIRST:
        old_m, old_rest = tl.load(state).to(tl.float32), tl.load(state + 1).to(tl.float32)
        old_eu, old_ee = tl.load(state + 2).to(tl.float32), tl.load(state + 3).to(tl.float32)
    m, rest, eu, ee = _join(s, old_m, old_rest, old_eu, old_ee, m, rest, moment * LN_2, square - 1)
    tl.store(state, m)
    tl.store(state + 1, rest)
    tl.store(state + 2, eu)
    tl.store(state + 3, ee)


class RowPairs(NamedTuple):
    """The end of a row's pairs, and pointers to all pairs' values; a target's column is counted from ``first``."""

    end: tl.tensor
    pair: tl.tensor
    targets: tl.tensor
    logprobs: tl.tensor
    grad_logprobs: tl.tensor
    first: tl.tensor


class Upstream(NamedTuple):
    """What a row's gradient is made from."""

    grad_logprobs: tl.tensor  # what p is multiplied by at targets: the sum of its pairs', or the row's factor
    grad_entropy: tl.tensor  # likewise
    entropy: tl.tensor
    scale: tl.tensor  # 1 / temperature


@triton.jit
def _bend(x, softcap):
    """The softcap's slope times its square; a token that the row was not sampled from, at -inf, has none."""
    x = tl.maximum(x, -softcap, KEEP_NAN)
    return (softcap - x) * (softcap + x)


@triton.jit
def _target(pairs, i):
    """The column of a row's pair ``i``, behind all others where there is none."""
    at = tl.load(pairs.pair + i, mask=i < pairs.end, other=0)
    return tl.load(pairs.targets + at, mask=i < pairs.end, other=BEHIND) - pairs.first


@triton.jit
def _place(grad, x, columns, limit, i, pairs, upstream, gain, softcap, SOFTCAP: tl.constexpr):
    """Columns below ``limit`` that are targets, from log p itself; pairs are in their order, from ``i`` on.

    Pairs of one target are neighbours: the last one has their sum.
    """
    total, h = upstream.grad_logprobs, upstream.grad_entropy
    target_sum, previous, target = tl.full([], 0.0, tl.float32), tl.full([], -1, tl.int64), _target(pairs, i)
    while target < limit:
        at = tl.load(pairs.pair + i)
        target_sum = tl.where(target == previous, target_sum, 0.0) + tl.load(pairs.grad_logprobs + at)
        previous = target
        logp = tl.load(pairs.logprobs + at)
        others = (total - target_sum) + h * (tl.maximum(logp, NEGLIGIBLE, KEEP_NAN) + upstream.entropy)
        slope = -upstream.scale * (target_sum * expm1(logp) + exp(logp) * others) * gain
        if SOFTCAP:
            value = slope * _bend(x, softcap)
        else:
            value = tl.zeros_like(x) + slope
        grad = tl.where(columns == target, value, grad)
        i += 1
        target = _target(pairs, i)
    return grad, i


@triton.jit(do_not_specialize=["first", "stride", "grad_stride", "vectors"])
def gradient_kernel(
    grad, z,  # [rows, columns], in the same memory or apart
    norm, factors, key, scale, offsets,  # [keys, 2], [keys, 2] or None, [rows], [rows], [rows + 1]
    pair, targets, logprobs, grad_logprobs, entropy, grad_entropy,  # [pairs], the last two may be None
    residual, power,  # [rows], [], None where grad is not narrow; power in fp16 only
    first, softcap, gain, stride, grad_stride, vectors,
    SOFTCAP: tl.constexpr, NARROW: tl.constexpr, FIRST: tl.constexpr,
    VECTOR: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """grad z_j = gain (softcap^2 - z_j^2) s (sum of g over j's pairs - p_j (sum of g + h (log p_j + H))).

    Factors stand for the sum of g, one at j that are targets and one at all others, whose p_j ``norm`` then gives.
    A narrow gradient lies in the first half of its row's own memory: what a step writes has been read by it or before.
    """
    row = tl.program_id(0)
    z += tl.multiple_of(row.to(tl.int64) * stride, VECTOR)
    grad += tl.multiple_of(row.to(tl.int64) * grad_stride, VECTOR)
    size = vectors * VECTOR
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    total, h, row_entropy = 0.0, 0.0, 0.0
    for i in range(begin, end):
        at = tl.load(pair + i)
        total += tl.load(grad_logprobs + at)
        if grad_entropy is not None:
            h += tl.load(grad_entropy + at)
            row_entropy = tl.load(entropy + at)
    place = 2 * tl.load(key + row)
    m, rest = tl.load(norm + place), tl.load(norm + place + 1)
    at_targets, at_others = total, total
    if factors is not None:
        at_targets, at_others = tl.load(factors + place), tl.load(factors + place + 1)
    s = tl.load(scale + row).to(tl.float32)
    if power is not None:
        gain *= tl.load(power)
    log_sum, share = log1p(rest), tl.div_rn(1.0, 1 + rest)
    pairs = RowPairs(end, pair, targets, logprobs, grad_logprobs, first)
    upstream = Upstream(at_targets, h, row_entropy, s)
    STEP: tl.constexpr = MAP_LOADS * THREADS * WIDTH
    columns = _columns(THREADS, WIDTH, VECTOR)[None, :, :] + tl.arange(0, MAP_LOADS)[:, None, None] * (THREADS * WIDTH)
    added = tl.zeros([MAP_LOADS, THREADS, WIDTH], tl.float32)
    for start in range(0, size, STEP):
        x = _load(z + start, columns, size - start)
        t = (x - m) * (s * LOG2_E)
        slope = at_others + h * row_entropy
        if grad_entropy is not None:
            t = tl.maximum(t, NEGLIGIBLE, KEEP_NAN)
            slope += h * (LN_2 * t - log_sum)
        values = -s * share * tl.exp2(t) * slope * gain
        if SOFTCAP:
            values *= _bend(x, softcap)
        limit = start + STEP
        values, begin = _place(values, x, columns + start, limit, begin, pairs, upstream, gain, softcap, SOFTCAP)
        rounded = values.to(grad.dtype.element_ty)
        if residual is not None:
            added += tl.where(columns < size - start, rounded.to(tl.float32) - values, 0.0)
        if NARROW:
            tl.debug_barrier()
        tl.store(grad + start + columns, rounded, mask=columns < size - start)
    if residual is not None:
        add_residual(residual + row, added, FIRST)


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def gather(
    hidden: Tensor,  # [T, H]
    row: Tensor,  # [R]
    idle: Tensor,  # [R]
) -> Tensor:
    """See trajkern/_native/head.py, also for what follows."""
    states = hidden.new_empty(row.shape[0], hidden.shape[1])
    with torch.cuda.device_of(hidden):
        gather_kernel[_states_grid(states)](states, hidden, row, idle, hidden.shape[1], hidden.stride(0), **STATES)
    return states


def _states_grid(states: Tensor) -> tuple[int, int]:
    return states.shape[0], triton.cdiv(states.shape[1], STATES["BLOCK"])


def fold(
    z: Tensor,  # [R, columns]
    first: int,
    block: Block,
    state: Tensor,  # [R, 4]
    picked: Tensor,  # [P']
    pairs: Pairs,
    local: Tensor,  # [P]
    moments: bool,
) -> None:
    fold_rows(z, block.scale, state, moments, first == 0)
    pick(z, first, block, picked, pairs, local)


def pick(
    z: Tensor,  # [R, columns]
    first: int,
    block: Block,
    picked: Tensor,  # [P']
    pairs: Pairs,
    local: Tensor,  # [P]
) -> None:
    offsets = pairs.offsets[block.lo : block.hi + 1]
    with torch.cuda.device_of(z):
        pick_kernel[(triton.cdiv(z.shape[0], WRITING["BLOCK"]),)](
            picked, z, offsets, pairs.pair, local, *z.shape, z.stride(0), first, **WRITING
        )


def fold_rows(
    z: Tensor,  # [R, columns]
    scale: Tensor,  # [R]
    state: Tensor,  # [R, 4]
    moments: bool,
    is_first: bool,
) -> None:
    with torch.cuda.device_of(z):
        fold_kernel[(z.shape[0],)](
            z, scale, state, z.stride(0), MOMENTS=moments, FIRST=is_first, **_launch(row_warps(z.shape[1]), z)
        )


def write(stats: Stats, pairs: Pairs, block: Block, folded: Folded, vocabulary: int) -> None:
    rows = block.hi - block.lo
    with torch.cuda.device_of(stats.norm):
        write_kernel[(triton.cdiv(rows, WRITING["BLOCK"]),)](
            folded.state,
            folded.total,
            block.scale,
            pairs.offsets[block.lo :],
            pairs.key[block.lo :],
            pairs.pair,
            folded.picked,
            stats.norm,
            *stats[:1],
            *stats[2:],
            rows,
            stats.norm.shape[0] - 1,
            vocabulary,
            **WRITING,
        )


def terms(
    local: Tensor,  # [P]
    stats: Stats,
    pairs: Pairs,
    block: Block,
    grad_logprobs: Tensor,  # [P]
    grad_entropy: Tensor | None,  # [P]
    factors: Tensor | None,  # [keys + 1, 2]
) -> BlockTerms:
    entropy = None if grad_entropy is None else stats.entropy
    of_pairs = local, stats.logprobs, grad_logprobs, entropy, grad_entropy
    offsets, key = pairs.offsets[block.lo : block.hi + 1], pairs.key[block.lo : block.hi]
    return BlockTerms(offsets, pairs.pair, key, *of_pairs, stats.norm, factors)


def gradient(
    grad: Tensor,  # [R, columns]
    z: Tensor,  # [R, columns]
    first: int,
    scale: Tensor,  # [R]
    terms: BlockTerms,
    softcap: float,
    logit_scale: float,
    narrowing: Narrowing | None,
) -> None:
    launch = _map_launch(z, grad)
    with torch.cuda.device_of(z):
        gradient_kernel[(z.shape[0],)](
            grad,
            z,
            terms.norm,
            terms.factors,
            terms.key,
            scale,
            terms.offsets,
            terms.pair,
            *terms[3:8],
            None if narrowing is None else narrowing.residual,
            None if narrowing is None else narrowing.gain,
            first,
            softcap,
            logit_scale / softcap**2 if softcap else logit_scale,
            z.stride(0),
            grad.stride(0),
            SOFTCAP=bool(softcap),
            NARROW=grad.element_size() < z.element_size(),
            FIRST=first == 0,
            **launch,
        )


def scatter(
    hidden: Tensor,  # [T+1, H]
    grad: Tensor,  # [R, H]
    pairs: Pairs,
    block: Block,
    narrowing: Narrowing | None,
) -> None:
    row, idle = pairs.row[block.lo : block.hi], pairs.idle[block.lo : block.hi]
    if not pairs.distinct_rows:
        exact = grad if narrowing is None else narrowing.undone(grad)
        hidden.index_put_((torch.where(idle, hidden.shape[0] - 1, row),), exact, accumulate=True)
        return
    with torch.cuda.device_of(hidden):
        scatter_kernel[_states_grid(grad)](
            hidden, grad, row, idle, *(narrowing or (None, None, None)), grad.shape[1], **STATES
        )


_KERNELS = Kernels(False, empty, gather, fold, write, terms, gradient, scatter, policy_loss)


def linear_token_stats(*args: Any) -> list[Tensor]:
    return tiles.linear_token_stats(_KERNELS, *args)


def linear_token_stats_backward(*args: Any) -> list[Tensor]:
    return tiles.linear_token_stats_backward(_KERNELS, *args)


def linear_policy_loss(*args: Any) -> list[Tensor]:
    return tiles.linear_policy_loss(_KERNELS, *args)
