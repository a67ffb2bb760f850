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
from trajkern._tiles.tiles import Kernels, PairTerms

from .configs import MAP_STEPS, row_warps
from .logprob import MAP_LOADS, NEGLIGIBLE, _columns, _fold, _launch, _load, _map_launch, _merge
from .policy_loss import policy_loss
from .primitives import KEEP_NAN, LN_2, LOG2_E, exp, expm1, log1p


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
    MOMENTS: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr,
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
    old_m, old_rest = tl.load(state).to(tl.float32), tl.load(state + 1).to(tl.float32)
    old_eu, old_ee = tl.load(state + 2).to(tl.float32), tl.load(state + 3).to(tl.float32)
    m, rest, eu, ee = _join(s, old_m, old_rest, old_eu, old_ee, m, rest, moment * LN_2, square - 1)
    tl.store(state, m)
    tl.store(state + 1, rest)
    tl.store(state + 2, eu)
    tl.store(state + 3, ee)


class RowPairs(NamedTuple):
    """A row's pairs, begin:end, and pointers to all pairs' values; a target's column is counted from ``first``."""

    begin: tl.tensor
    end: tl.tensor
    targets: tl.tensor
    logprobs: tl.tensor
    grad_logprobs: tl.tensor
    first: tl.tensor


class Upstream(NamedTuple):
    """What a row's gradient is made from."""

    grad_logprobs: tl.tensor  # the sum of its pairs'
    grad_entropy: tl.tensor  # likewise
    entropy: tl.tensor
    scale: tl.tensor  # 1 / temperature


@triton.jit
def _place(grad, x, columns, pairs, upstream, gain, softcap, SOFTCAP: tl.constexpr):
    """Columns that are targets, from log p itself. Pairs of one target are neighbours: the last one has their sum."""
    total, h = upstream.grad_logprobs, upstream.grad_entropy
    target_sum, previous = 0.0, tl.full([], -1, tl.int64)
    for i in range(pairs.begin, pairs.end):
        target = tl.load(pairs.targets + i) - pairs.first
        target_sum = tl.where(target == previous, target_sum, 0.0) + tl.load(pairs.grad_logprobs + i)
        previous = target
        logp = tl.load(pairs.logprobs + i)
        others = (total - target_sum) + h * (tl.maximum(logp, NEGLIGIBLE, KEEP_NAN) + upstream.entropy)
        slope = -upstream.scale * (target_sum * expm1(logp) + exp(logp) * others) * gain
        if SOFTCAP:
            value = slope * (softcap - x) * (softcap + x)
        else:
            value = tl.zeros_like(x) + slope
        grad = tl.where(columns == target, value, grad)
    return grad


@triton.jit(do_not_specialize=["first", "stride", "grad_stride", "vectors"])
def gradient_kernel(
    grad, z,  # [rows, columns], may be the same
    norm, scale, offsets,  # [rows, 2], [rows], [rows + 1]
    targets, logprobs, grad_logprobs, entropy, grad_entropy,  # [pairs], the last two may be None
    first, softcap, gain, stride, grad_stride, vectors,
    SOFTCAP: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """grad z_j = gain (softcap^2 - z_j^2) s (sum of g over j's pairs - p_j (sum of g + h (log p_j + H)))."""
    row = tl.program_id(0)
    z += tl.multiple_of(row.to(tl.int64) * stride, VECTOR)
    grad += tl.multiple_of(row.to(tl.int64) * grad_stride, VECTOR)
    size = vectors * VECTOR
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    total, h, row_entropy = 0.0, 0.0, 0.0
    for i in range(begin, end):
        total += tl.load(grad_logprobs + i)
        if grad_entropy is not None:
            h += tl.load(grad_entropy + i)
            row_entropy = tl.load(entropy + i)
    m, rest = tl.load(norm + 2 * row.to(tl.int64)), tl.load(norm + 2 * row.to(tl.int64) + 1)
    s = tl.load(scale + row).to(tl.float32)
    log_sum, share = log1p(rest), tl.div_rn(1.0, 1 + rest)
    pairs = RowPairs(begin, end, targets, logprobs, grad_logprobs, first)
    upstream = Upstream(total, h, row_entropy, s)
    STEP: tl.constexpr = MAP_LOADS * THREADS * WIDTH
    columns = _columns(THREADS, WIDTH, VECTOR)[None, :, :] + tl.arange(0, MAP_LOADS)[:, None, None] * (THREADS * WIDTH)
    part = tl.program_id(1) * (STEPS * STEP)
    for start in range(part, tl.minimum(part + STEPS * STEP, size), STEP):
        x = _load(z + start, columns, size - start)
        t = (x - m) * (s * LOG2_E)
        slope = total + h * row_entropy
        if grad_entropy is not None:
            t = tl.maximum(t, NEGLIGIBLE, KEEP_NAN)
            slope += h * (LN_2 * t - log_sum)
        values = -s * share * tl.exp2(t) * slope * gain
        if SOFTCAP:
            values *= (softcap - x) * (softcap + x)
        values = _place(values, x, columns + start, pairs, upstream, gain, softcap, SOFTCAP)
        tl.store(grad + start + columns, values.to(grad.dtype.element_ty), mask=columns < size - start)


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def fold(
    z: Tensor,  # [R, columns]
    scale: Tensor,  # [R]
    state: Tensor,  # [R, 4]
    moments: bool,
) -> None:
    """See trajkern/_native/head.py, also for :func:`gradient`."""
    if z.numel():
        with torch.cuda.device_of(z):
            fold_kernel[(z.shape[0],)](
                z, scale, state, z.stride(0), MOMENTS=moments, **_launch(row_warps(z.shape[1]), z)
            )


def gradient(
    grad: Tensor,  # [R, columns]
    z: Tensor,  # [R, columns]
    first: int,
    norm: Tensor,  # [R, 2]
    scale: Tensor,  # [R]
    offsets: Tensor,  # [R+1]
    terms: PairTerms,
    softcap: float,
    logit_scale: float,
) -> None:
    if not z.numel():
        return
    launch = _map_launch(z, grad)
    part = MAP_STEPS * MAP_LOADS.value * launch["THREADS"] * launch["WIDTH"]
    gain = logit_scale / softcap**2 if softcap else logit_scale
    with torch.cuda.device_of(z):
        gradient_kernel[(z.shape[0], triton.cdiv(z.shape[1], part))](
            grad,
            z,
            norm,
            scale,
            offsets,
            *terms,
            first,
            softcap,
            gain,
            z.stride(0),
            grad.stride(0),
            SOFTCAP=bool(softcap),
            **launch,
        )


_KERNELS = Kernels(empty, fold, gradient, policy_loss)


def linear_token_stats(*args: Any) -> list[Tensor]:
    return tiles.linear_token_stats(_KERNELS, *args)


def linear_token_stats_backward(*args: Any) -> list[Tensor]:
    return tiles.linear_token_stats_backward(_KERNELS, *args)


def linear_policy_loss(*args: Any) -> list[Tensor]:
    return tiles.linear_policy_loss(_KERNELS, *args)
