"""Tiles of a student's and a teacher's logits: the divergence of each row, and its gradient in the student.

The head's fold gives both softmaxes' sums; then one program reads a row again. See csrc/cpu/divergence.cpp for the
terms, which are of second order where both distributions are close.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trajkern._tiles import divergence as tiles
from trajkern._tiles.tiles import Narrowing

from . import head
from .configs import row_warps
from .head_rows import add_residual
from .logprob import MAP_LOADS, _columns, _launch, _load, _map_launch
from .primitives import KEEP_NAN, _series, exp, log1p

SAVED = tl.constexpr(tiles.SAVED)
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _row(scale, state_s, state_t):
    """What a place is made from: the maxima, 1 / temperature, the shares of a maximum, log sum t - log sum s."""
    m_s, rest_s = tl.load(state_s).to(tl.float32), tl.load(state_s + 1).to(tl.float32)
    m_t, rest_t = tl.load(state_t).to(tl.float32), tl.load(state_t + 1).to(tl.float32)
    rest_s, rest_t = rest_s + (m_s - m_s), rest_t + (m_t - m_t)  # NaN where the maximum is not finite
    shift = log1p(rest_t) - log1p(rest_s)
    return m_s, m_t, tl.load(scale).to(tl.float32), tl.div_rn(1.0, 1 + rest_s), tl.div_rn(1.0, 1 + rest_t), shift


@triton.jit
def _place(x_s, x_t, m_s, m_t, scale, share_s, share_t, shift):
    """s, t and d = log s - log t."""
    u_s, u_t = (x_s - m_s) * scale, (x_t - m_t) * scale
    return exp(u_s) * share_s, exp(u_t) * share_t, (u_s - u_t) + shift


@triton.jit
def _artanh_rest(z):
    """2 artanh z - 2 z for abs(z) <= 0.47."""
    z2 = z * z
    series = 0.10526315789473684 * z2 + 0.11764705882352941  # 2/19, 2/17
    series = series * z2 + 0.13333333333333333
    series = series * z2 + 0.15384615384615385
    series = series * z2 + 0.18181818181818182
    series = series * z2 + 0.2222222222222222
    series = series * z2 + 0.2857142857142857
    series = series * z2 + 0.4
    series = series * z2 + 0.6666666666666666
    return series * z2 * z


@triton.jit
def _mixture(s, t, d, of_s, of_t):
    """log(s / m) and the term of both divergences from m."""
    above = d > 0
    larger, of_larger, of_other = tl.where(above, s, t), tl.where(above, of_s, of_t), tl.where(above, of_t, of_s)
    gap = tl.minimum(tl.abs(d), 1e4)
    e, near = exp(-gap), gap < 1
    bend = _series(-gap)
    fall = bend - gap  # e - 1, precisely where it is near 0
    w = tl.where(near, of_other * fall, 0.0)
    z = tl.div_rn(w, 2 + w)  # m / larger = 1 + w = (1 + z) / (1 - z)
    cubic = _artanh_rest(z)
    y = tl.maximum(of_larger + of_other * e, SMALLEST)
    log_m = tl.where(near, 2 * z + cubic, tl.log(y))  # log(m / larger)
    close = of_other * (-bend - gap * fall) - (w * z + cubic * (1 + w))
    term = larger * tl.where(near, close, -y * log_m - of_other * e * gap)
    return tl.where(above, -log_m, -log_m - gap), tl.where(larger == 0, 0.0, term)


@triton.jit
def _log_ratio(s, t, d, of_s, of_t, KIND: tl.constexpr):
    """Of s to what it is measured against: t, or the mixture."""
    if KIND == "mixture":
        d, _ = _mixture(s, t, d, of_s, of_t)
    else:
        tl.static_assert(KIND == "reverse", f"no divergence {KIND} with a log-ratio")
    return d


@triton.jit
def _kl(a, b, d):
    """The term of KL(a || b), d = log b - log a: b - a - a d, far from 0 in two parts."""
    near = tl.abs(d) < 1
    part = tl.where(a == 0, 0.0, tl.where(near, a * _series(d), -a * d))
    return part, tl.where(near, 0.0, b - a)


@triton.jit(do_not_specialize=["stride_s", "stride_t", "vectors"])
def divergence_kernel(
    student, teacher, scale, state_s, state_t,  # [rows, V], [rows], [rows, 4]
    divergence, saved,  # [rows], [rows, SAVED]
    of_s, of_t, stride_s, stride_t, vectors,
    KIND: tl.constexpr, VECTOR: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += tl.multiple_of(row * stride_s, VECTOR)
    teacher += tl.multiple_of(row * stride_t, VECTOR)
    size = vectors * VECTOR
    m_s, m_t, unit, share_s, share_t, shift = _row(scale + row, state_s + 4 * row, state_t + 4 * row)
    TILE: tl.constexpr = THREADS * WIDTH
    columns = _columns(THREADS, WIDTH, VECTOR)
    anchor = tl.full([], 0.0, tl.float32)
    if KIND != "forward":
        at_top = tl.full([THREADS], float("-inf"), tl.float32)  # the teacher's logit at the student's largest
        for start in range(0, size, TILE):
            x_s, x_t = _load(student + start, columns, size - start), _load(teacher + start, columns, size - start)
            at_top = tl.maximum(at_top, tl.max(tl.where(x_s >= m_s, x_t, float("-inf")), 1))
        top_s, top_t, top_d = _place(m_s, tl.max(at_top, 0), m_s, m_t, unit, share_s, share_t, shift)
        anchor = _log_ratio(top_s, top_t, top_d, of_s, of_t, KIND)
    total = tl.zeros([THREADS], tl.float32)
    masses, center = tl.zeros_like(total), tl.zeros_like(total)
    for start in range(0, size, TILE):
        x_s, x_t = _load(student + start, columns, size - start), _load(teacher + start, columns, size - start)
        s, t, d = _place(x_s, x_t, m_s, m_t, unit, share_s, share_t, shift)
        if KIND == "forward":
            part, mass = _kl(t, s, d)
            masses += tl.sum(mass, 1)
        elif KIND == "reverse":
            part, mass = _kl(s, t, -d)
            masses += tl.sum(mass, 1)
            center += tl.sum(tl.where(s == 0, 0.0, s * (d - anchor)), 1)
        elif KIND == "mixture":
            ratio, part = _mixture(s, t, d, of_s, of_t)
            center += tl.sum(tl.where(s == 0, 0.0, s * (ratio - anchor)), 1)
        else:
            tl.static_assert(False, f"no divergence {KIND}")
        total += tl.sum(part, 1)
    result = tl.sum(total, 0) + tl.sum(masses, 0)
    tl.store(divergence + row, tl.where(result < 0, 0.0, result))
    saved += SAVED * row
    for k in tl.static_range(2):
        tl.store(saved + k, tl.load(state_s + 4 * row + k))
        tl.store(saved + 2 + k, tl.load(state_t + 4 * row + k))
    tl.store(saved + 4, anchor)
    tl.store(saved + 5, tl.sum(center, 0))


@triton.jit(do_not_specialize=["grad_stride", "stride_s", "stride_t", "vectors"])
def slope_kernel(
    grad, student, teacher,  # [rows, columns], the first two may be the same
    scale, saved, upstream,  # [rows], saved [rows, SAVED]
    residual, power,  # [rows], [], None where grad is not narrow; power in fp16 only
    of_s, of_t, softcap, logit_scale, grad_stride, stride_s, stride_t, vectors,
    KIND: tl.constexpr, SOFTCAP: tl.constexpr, NARROW: tl.constexpr, FIRST: tl.constexpr,
    VECTOR: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """A narrow gradient lies as in the head's gradient_kernel; with a softcap ``student`` holds the tanh alone."""
    row = tl.program_id(0).to(tl.int64)
    grad += tl.multiple_of(row * grad_stride, VECTOR)
    student += tl.multiple_of(row * stride_s, VECTOR)
    teacher += tl.multiple_of(row * stride_t, VECTOR)
    size = vectors * VECTOR
    saved += SAVED * row
    m_s, m_t, unit, share_s, share_t, shift = _row(scale + row, saved, saved + 2)
    anchor, center = tl.load(saved + 4).to(tl.float32), tl.load(saved + 5).to(tl.float32)
    gain = tl.load(upstream + row).to(tl.float32) * unit * logit_scale
    if KIND == "mixture":
        gain *= of_s
    if power is not None:
        gain *= tl.load(power)
    STEP: tl.constexpr = MAP_LOADS * THREADS * WIDTH
    columns = _columns(THREADS, WIDTH, VECTOR)[None, :, :] + tl.arange(0, MAP_LOADS)[:, None, None] * (THREADS * WIDTH)
    added = tl.zeros([MAP_LOADS, THREADS, WIDTH], tl.float32)
    for start in range(0, size, STEP):
        x_s, x_t = _load(student + start, columns, size - start), _load(teacher + start, columns, size - start)
        bend = 1.0
        if SOFTCAP:
            bend = (1 - x_s) * (1 + x_s)
            x_s = tl.minimum(
                softcap * x_s, m_s, KEEP_NAN
            )  # rounded as the forward's: the minimum parts it from x_s - m_s
        s, t, d = _place(x_s, x_t, m_s, m_t, unit, share_s, share_t, shift)
        if KIND == "forward":
            slope = tl.where(tl.abs(d) < 1, t * (d + _series(d)), s - t)
        else:
            slope = tl.where(s == 0, 0.0, s * ((_log_ratio(s, t, d, of_s, of_t, KIND) - anchor) - center))
        values = tl.where(gain == 0, 0.0, gain * slope * bend)
        rounded = values.to(grad.dtype.element_ty)
        if residual is not None:
            added += tl.where(columns < size - start, rounded.to(tl.float32) - values, 0.0)
        if NARROW:
            tl.debug_barrier()
        tl.store(grad + start + columns, rounded, mask=columns < size - start)
    if residual is not None:
        add_residual(residual + row, added, FIRST)


def rows(
    student: Tensor,  # [R, V]
    teacher: Tensor,  # [R, V]
    scale: Tensor,  # [R]
    beta: float,
    divergence: Tensor,  # [R]
    saved: Tensor,  # [R, 6]
) -> None:
    """See trajkern/_native/divergence.py, also for :func:`gradient`."""
    states = [scale.new_empty(student.shape[0], 4) for _ in range(2)]
    for z, state in zip((student, teacher), states, strict=True):
        head.fold_rows(z, scale, state, moments=False, is_first=True)
    with torch.cuda.device_of(student):
        divergence_kernel[(student.shape[0],)](
            student,
            teacher,
            scale,
            *states,
            divergence,
            saved,
            1 - beta,
            beta,
            student.stride(0),
            teacher.stride(0),
            KIND=_kind(beta),
            **_launch(row_warps(student.shape[1]), student, teacher),
        )


def gradient(
    grad: Tensor,  # [R, columns]
    student: Tensor,  # [R, columns]
    teacher: Tensor,  # [R, columns]
    scale: Tensor,  # [R]
    beta: float,
    saved: Tensor,  # [R, 6]
    upstream: Tensor,  # [R]
    first: int,
    softcap: float,
    logit_scale: float,
    narrowing: Narrowing | None,
) -> None:
    launch = _map_launch(student, teacher, grad)
    with torch.cuda.device_of(student):
        slope_kernel[(student.shape[0],)](
            grad,
            student,
            teacher,
            scale,
            saved,
            upstream,
            None if narrowing is None else narrowing.residual,
            None if narrowing is None else narrowing.gain,
            1 - beta,
            beta,
            softcap,
            logit_scale,
            grad.stride(0),
            student.stride(0),
            teacher.stride(0),
            KIND=_kind(beta),
            SOFTCAP=bool(softcap),
            NARROW=grad.element_size() < student.element_size(),
            FIRST=first == 0,
            **launch,
        )


def _kind(beta: float) -> str:
    return {0.0: "forward", 1.0: "reverse"}.get(beta, "mixture")


_KERNELS = tiles.Kernels(head._KERNELS, rows, gradient)


def linear_divergence(*args: Any) -> list[Tensor]:
    return tiles.linear_divergence(_KERNELS, *args)


def linear_divergence_backward(*args: Any) -> list[Tensor]:
    return tiles.linear_divergence_backward(_KERNELS, *args)
