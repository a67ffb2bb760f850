"""Log-probs and softmax statistics of tokens from logits: one program a row forward, and it reads the row once.

Powers are of two: t = (z - m) log2(e) / temperature. Each thread keeps the largest logit it has met, m, and the sums
relative to it of everything but that one logit, since a token that is almost certain needs the mass of the others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import MAP_STEPS, MAP_WARPS, VECTOR_BYTES, fitted, lanes_of, row_warps
from .primitives import KEEP_NAN, LN_2, LOG2_E, exp, expm1, log1p

MAP_LOADS = tl.constexpr(2)  # in flight at once per thread of the backward; the forward has four
NEGLIGIBLE = tl.constexpr(-1000.0)  # a power of two that is 0, and whose product with that 0 is not NaN


@triton.jit
def _row_start(row, inner, stride_outer, stride_inner, VECTOR: tl.constexpr):
    start = (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    return tl.multiple_of(start, VECTOR)


@triton.jit
def _scales(temperatures, temperature, row):
    """What turns a difference of logits into one of natural and of base-2 logarithms."""
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
    temperature = tl.where((temperature > 0) & (temperature < float("inf")), temperature, float("nan"))
    return tl.div_rn(1.0, temperature), tl.div_rn(LOG2_E, temperature)


@triton.jit
def _columns(THREADS: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of a tile, [THREADS, WIDTH]: a thread's own lie side by side where it may load them as one vector."""
    thread, element = tl.arange(0, THREADS)[:, None], tl.arange(0, WIDTH)[None, :]
    if VECTOR > 1:
        columns = thread * WIDTH + element
    else:
        columns = element * THREADS + thread
    return columns


@triton.jit
def _load(logits, columns, size):
    return tl.load(logits + columns, mask=columns < size, other=float("-inf")).to(tl.float32)


@triton.jit
def _power(x, reference, scale, FINITE: tl.constexpr):
    t = (x - reference) * scale
    if FINITE:
        t = tl.maximum(t, NEGLIGIBLE, KEEP_NAN)
    return tl.exp2(t), t


@triton.jit
def _finite(m):
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _sum_but_largest(x, largest, p, largest_p):
    """[A, B] -> [A]: the sum of p without one of the elements whose x is the largest. Its ties stay in."""
    total = tl.sum(p, 1)
    below = tl.sum(tl.where(x < largest[:, None], p, 0.0), 1)
    return tl.where(total - below < 1.5 * largest_p, below, total - largest_p)


@triton.jit
def _fold(z0, z1, z2, z3, scale, m, rest, moment, square, MOMENT: tl.constexpr, SQUARE: tl.constexpr):
    """Add four tiles to each thread's sums relative to m: of p but the largest, of p t, of p^2."""
    # a tournament: what loses a comparison is certainly not the one element to leave out
    first, second = tl.maximum(z0, z1), tl.maximum(z2, z3)
    winner = tl.maximum(first, second)
    lost0, lost1 = tl.minimum(z0, z1, KEEP_NAN), tl.minimum(z2, z3, KEEP_NAN)
    lost2 = tl.minimum(first, second)
    winner_m = tl.max(winner, 1)
    new_m = tl.maximum(m, winner_m, KEEP_NAN)
    reference = _finite(new_m)
    p, t = _power(winner, reference[:, None], scale, MOMENT)
    p0, t0 = _power(lost0, reference[:, None], scale, MOMENT)
    p1, t1 = _power(lost1, reference[:, None], scale, MOMENT)
    p2, t2 = _power(lost2, reference[:, None], scale, MOMENT)
    old_p, old_t = _power(m, reference, scale, True)
    winner_p, _ = _power(winner_m, reference, scale, True)
    if MOMENT:
        moment = old_p * (moment + old_t * (1 + rest)) + tl.sum(p * t + p0 * t0 + (p1 * t1 + p2 * t2), 1)
    if SQUARE:
        square = old_p * old_p * square + tl.sum(p * p + p0 * p0 + (p1 * p1 + p2 * p2), 1)
    others = _sum_but_largest(winner, winner_m, p, winner_p) + tl.sum(p0 + p1 + p2, 1)
    return new_m, rest * old_p + tl.minimum(old_p, winner_p, KEEP_NAN) + others, moment, square


@triton.jit
def _merge(s, scale, m, rest, moment, square):
    """The sums of all threads, relative to the row's maximum."""
    row_m = tl.max(m, 0)
    p, t = exp((m - _finite(row_m)) * s), tl.maximum((m - _finite(row_m)) * scale, NEGLIGIBLE, KEEP_NAN)
    moment = tl.sum(p * (moment + t * (1 + rest)), 0)
    square = tl.sum(p * p * square, 0)
    others = _sum_but_largest(m[None, :], tl.full([1], 0.0, tl.float32) + row_m, p[None, :], 1.0)
    return row_m, tl.sum(p * rest, 0) + tl.sum(others, 0), moment, square


@triton.jit(do_not_specialize=["inner", "stride_outer", "stride_inner", "vectors"])
def stats_kernel(
    logits,  # [rows, V]
    targets, temperatures, temperature, mask,  # [rows], the optional ones may be None here and below
    logprobs, norm, entropy, sum_sq_probs, is_top1,  # [rows], norm [rows, 2]
    inner, stride_outer, stride_inner, vectors,
    VECTOR: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += _row_start(row, inner, stride_outer, stride_inner, VECTOR)
    size = vectors * VECTOR  # so the compiler sees that no vector straddles the row's end
    keep = tl.full([], True, tl.int1)
    if mask is not None:
        keep = tl.load(mask + row)
    s, scale = _scales(temperatures, temperature, row)
    TILE: tl.constexpr = THREADS * WIDTH
    columns = _columns(THREADS, WIDTH, VECTOR)
    m = tl.full([THREADS], float("-inf"), tl.float32)
    rest, moment, square = tl.zeros_like(m), tl.zeros_like(m), tl.zeros_like(m)
    for start in range(0, tl.where(keep, size, 0), 4 * TILE):
        z0 = _load(logits + start, columns, size - start)
        z1 = _load(logits + start, columns + TILE, size - start)
        z2 = _load(logits + start, columns + 2 * TILE, size - start)
        z3 = _load(logits + start, columns + 3 * TILE, size - start)
        m, rest, moment, square = _fold(
            z0, z1, z2, z3, scale, m, rest, moment, square, entropy is not None, sum_sq_probs is not None
        )
    m, rest, moment, square = _merge(s, scale, m, rest, moment, square)

    target = tl.load(targets + row)
    inside = keep & (target >= 0) & (target < size)
    z_target = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    top1 = (z_target >= m) & (rest == rest) & (m > float("-inf"))
    rest = tl.where(inside & (m > float("-inf")), rest, float("nan"))
    log_sum = log1p(rest)
    tl.store(logprobs + row, tl.where(keep, (z_target - m) * s - log_sum, 0.0))
    norm += 2 * row.to(tl.int64)
    tl.store(norm, tl.where(keep, tl.where(inside, m, float("nan")), 0.0))
    tl.store(norm + 1, tl.where(keep, log_sum, 0.0))
    total = 1 + rest
    if entropy is not None:
        tl.store(entropy + row, tl.where(keep, log_sum - LN_2 * tl.div_rn(moment, total), 0.0))
    if sum_sq_probs is not None:
        lost = rest - (total - 1)  # in the rounding of the total
        tl.store(sum_sq_probs + row, tl.where(keep, tl.div_rn(square, total * total + 2 * total * lost), 0.0))
    if is_top1 is not None:
        tl.store(is_top1 + row, keep & top1)


@triton.jit(
    do_not_specialize=[
        "stride_grad_logprobs",
        "stride_grad_entropy",
        "inner",
        "stride_outer",
        "stride_inner",
        "out_outer",
        "out_inner",
        "vectors",
    ]
)
def backward_kernel(
    grad_logits,  # [rows, V]
    grad_logprobs, stride_grad_logprobs, grad_entropy, stride_grad_entropy,  # [rows]
    logits,  # [rows, V]
    targets, temperatures, temperature, mask, logprobs, norm, entropy,  # [rows], norm [rows, 2]
    inner, stride_outer, stride_inner, out_outer, out_inner, vectors,
    VECTOR: tl.constexpr, WIDTH: tl.constexpr, THREADS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """grad z_j = s (g (delta_jt - p_j) - h p_j (log p_j + H)), g and h the gradients of log p_t and the entropy H."""
    row = tl.program_id(0)
    logits += _row_start(row, inner, stride_outer, stride_inner, VECTOR)
    grad_logits += _row_start(row, inner, out_outer, out_inner, VECTOR)
    size = vectors * VECTOR
    STEP: tl.constexpr = MAP_LOADS * THREADS * WIDTH
    columns = _columns(THREADS, WIDTH, VECTOR)[None, :, :] + tl.arange(0, MAP_LOADS)[:, None, None] * (THREADS * WIDTH)
    begin = tl.program_id(1) * (STEPS * STEP)
    end = tl.minimum(begin + STEPS * STEP, size)
    g, h, row_entropy = tl.load(grad_logprobs + row.to(tl.int64) * stride_grad_logprobs), 0.0, 0.0
    live = g != 0
    if grad_entropy is not None:
        h, row_entropy = tl.load(grad_entropy + row.to(tl.int64) * stride_grad_entropy), tl.load(entropy + row)
        live = live | (h != 0)
    if mask is not None:
        live = live & tl.load(mask + row)

    if live:
        target = tl.load(targets + row).to(tl.int32)  # one outside the row has NaN for log p and norm
        logp = tl.load(logprobs + row)
        m, log_sum = tl.load(norm + 2 * row.to(tl.int64)), tl.load(norm + 2 * row.to(tl.int64) + 1)
        s, scale = _scales(temperatures, temperature, row)
        at_target = -s * (g * expm1(logp) + h * exp(logp) * (tl.maximum(logp, NEGLIGIBLE, KEEP_NAN) + row_entropy))
        for start in range(begin, end, STEP):
            t = (_load(logits + start, columns, size - start) - m) * scale - log_sum * LOG2_E
            slope = -s * (g + h * row_entropy)
            if grad_entropy is not None:
                t = tl.maximum(t, NEGLIGIBLE, KEEP_NAN)
                slope -= s * h * LN_2 * t
            grad = tl.where(columns == target - start, at_target, tl.exp2(t) * slope).to(grad_logits.dtype.element_ty)
            tl.store(grad_logits + start + columns, grad, mask=columns < size - start)
    else:
        zero = tl.zeros([MAP_LOADS, THREADS, WIDTH], grad_logits.dtype.element_ty)
        for start in range(begin, end, STEP):
            tl.store(grad_logits + start + columns, zero, mask=columns < size - start)


def token_stats(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    temperatures: Tensor | None,  # [...]
    temperature: float,
    mask: Tensor | None,  # [...]
    outputs: int,
) -> list[Tensor]:
    x, shape = _as_rows(logits), targets.shape

    def empty(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    logprobs, norm = empty(shape), empty((*shape, 2))
    optional = [empty(shape, dtype) if outputs & bit else None for bit, dtype in _OPTIONAL]
    if logprobs.numel():
        with torch.cuda.device_of(x):
            stats_kernel[(logprobs.numel(),)](
                x,
                targets,
                temperatures,
                temperature,
                mask,
                logprobs,
                norm,
                *optional,
                *_row_strides(x),
                **_launch(row_warps(x.shape[-1]), x),
            )
    return [logprobs, norm, *(y for y in optional if y is not None)]


_OPTIONAL = ((1, torch.float32), (2, torch.float32), (4, torch.bool))  # the bits of ``outputs`` and what they ask for


def token_stats_backward(grad_logprobs: Tensor, grad_entropy: Tensor | None, logits: Tensor, *saved) -> Tensor:
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward(_as_rows(grad_logits), grad_logprobs, grad_entropy, _as_rows(logits), *saved)
    return grad_logits


def token_stats_backward_(grad_logprobs: Tensor, grad_entropy: Tensor | None, logits: Tensor, *saved) -> None:
    x = _as_rows(logits)
    _backward(x, grad_logprobs, grad_entropy, x, *saved)
    if x.data_ptr() != logits.data_ptr():
        logits.copy_(x.view(logits.shape))


def _backward(
    grad_logits: Tensor,
    grad_logprobs,
    grad_entropy,
    logits,
    targets,
    temperatures,
    temperature,
    mask,
    logprobs,
    norm,
    entropy,
) -> None:
    if not logits.numel():
        return
    launch = _map_launch(logits, grad_logits)
    part = MAP_STEPS * MAP_LOADS.value * launch["THREADS"] * launch["WIDTH"]
    g, h = _flat(grad_logprobs), _flat(grad_entropy)
    with torch.cuda.device_of(logits):
        backward_kernel[(targets.numel(), triton.cdiv(logits.shape[-1], part))](
            grad_logits,
            g,
            g.stride(0),
            h,
            0 if h is None else h.stride(0),
            logits,
            targets,
            temperatures,
            temperature,
            mask,
            logprobs,
            norm,
            entropy,
            *_row_strides(logits),
            *_row_strides(grad_logits)[1:],
            STEPS=MAP_STEPS,
            **launch,
        )


def _as_rows(x: Tensor) -> Tensor:
    """``x`` with at most two leading dimensions and a contiguous last one; a copy only where strides force it."""
    if x.dtype == torch.float64:
        raise TypeError("logits must have dtype float32, bfloat16 or float16 for the triton backend; got float64")
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x if x.ndim <= 3 else x.flatten(0, -3)


def _row_strides(x: Tensor) -> tuple[int, int, int]:
    """(rows of the inner leading dimension, stride of the outer one, stride of the inner one)."""
    if x.ndim == 3:
        return x.shape[1], x.stride(0), x.stride(1)
    return 1, x.stride(0) if x.ndim == 2 else 0, 0


def _flat(x: Tensor | None) -> Tensor | None:
    """One dimension; an expanded number (the upstream of a sum) stays one number."""
    if x is None or x.ndim == 1:
        return x
    return x.reshape(-1) if any(x.stride()) else x.as_strided((x.numel(),), (0,))


def _launch(warps: int, x: Tensor, *others: Tensor) -> dict[str, int]:
    """Launch options for rows of this length, dtype and alignment."""
    width, length = VECTOR_BYTES // x.element_size(), x.shape[-1]
    aligned = length % width == 0 and all(
        y.data_ptr() % VECTOR_BYTES == 0 and not any(stride % width for stride in y.stride()[:-1]) for y in (x, *others)
    )
    vector = width if aligned else 1
    warps, threads = fitted(warps, lanes_of(x))
    return {
        "vectors": length // vector,
        "VECTOR": vector,
        "WIDTH": width,
        "THREADS": threads,
        "num_warps": warps,
    }


def _map_launch(x: Tensor, *others: Tensor) -> dict[str, int]:
    launch = _launch(min(row_warps(x.shape[-1]), MAP_WARPS), x, *others)
    if launch["VECTOR"] == 1:  # every element has an address in registers
        launch["WIDTH"] //= 2
    return launch
