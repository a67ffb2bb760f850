"""What surrounds the head's products, a block of rows at a time: their states, results and gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import log1p


@triton.jit
def add_residual(residual, added, FIRST: tl.constexpr):
    """To a row's residual what rounding added to its d logits; FIRST: of the first slice of the vocabulary."""
    before = 0.0
    if not FIRST:
        before = tl.load(residual)
    tl.store(residual, before + tl.sum(tl.sum(tl.sum(added, 2), 1), 0))


@triton.jit(do_not_specialize=["width", "stride"])
def gather_kernel(
    states, hidden,  # [rows, width], [T, width]
    row, idle,  # [rows]
    width, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """An idle row's states are 0: what it would read may be NaN."""
    slot = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(hidden + tl.load(row + slot) * stride + column, mask=inside & (tl.load(idle + slot) == 0), other=0.0)
    tl.store(states + slot.to(tl.int64) * width + column, x, mask=inside)


@triton.jit(do_not_specialize=["rows", "columns", "stride", "first"])
def pick_kernel(
    picked, z, offsets, pair, targets,  # [pairs], [rows, columns], [rows + 1], [pairs], [P]
    rows, columns, stride, first,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The logits of a block's targets, of those in this slice of the vocabulary."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(offsets + row, mask=row < rows, other=0), tl.load(offsets + row + 1, mask=row < rows, other=0)
    for i in range(0, tl.max(end - begin, 0)):
        mine = begin + i < end
        column = tl.load(targets + tl.load(pair + begin + i, mask=mine, other=0), mask=mine, other=-1) - first
        mine &= (column >= 0) & (column < columns)
        x = tl.load(z + row.to(tl.int64) * stride + column, mask=mine, other=0.0)
        tl.store(picked + begin + i, x.to(tl.float32), mask=mine)


@triton.jit(do_not_specialize=["rows", "last", "vocabulary"])
def write_kernel(
    state, total, scale, offsets, key,  # [rows, 4], [rows] or None, [rows], [rows + 1], [rows]
    pair, picked,  # [pairs]
    norm, logprobs, entropy, sum_sq_probs, is_top1, mean_logit,  # [last + 1, 2], [P], all but the first two may be None
    rows, last, vocabulary,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's results from its rows' statistics; an idle row, whose key is ``last``, has none."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    state += 4 * row.to(tl.int64)
    m, rest = tl.load(state, mask=inside, other=0.0), tl.load(state + 1, mask=inside, other=0.0)
    eu, ee = tl.load(state + 2, mask=inside, other=0.0), tl.load(state + 3, mask=inside, other=0.0)
    rest += m - m  # NaN where the maximum is not finite
    log_sum = log1p(rest)
    s = tl.load(scale + row, mask=inside, other=0.0)
    place = tl.load(key + row, mask=inside, other=0)
    tl.store(norm + 2 * place, m, mask=inside & (place < last))
    tl.store(norm + 2 * place + 1, rest, mask=inside & (place < last))
    begin, end = tl.load(offsets + row, mask=inside, other=0), tl.load(offsets + row + 1, mask=inside, other=0)
    for i in range(0, tl.max(end - begin, 0)):
        mine = begin + i < end
        at = tl.load(pair + begin + i, mask=mine, other=0)
        z = tl.load(picked + begin + i, mask=mine, other=0.0)
        tl.store(logprobs + at, (z - m) * s - log_sum, mask=mine)
        if entropy is not None:
            tl.store(entropy + at, log_sum - tl.div_rn(eu, 1 + rest), mask=mine)
        if sum_sq_probs is not None:
            exact = 1 + rest.to(tl.float64)
            square = (1 + ee.to(tl.float64)) / (exact * exact)
            tl.store(sum_sq_probs + at, square.to(tl.float32), mask=mine)
        if is_top1 is not None:
            tl.store(is_top1 + at, (z >= m) & (rest >= 0), mask=mine)
        if mean_logit is not None:
            mean = tl.div_rn(tl.load(total + row, mask=mine, other=0.0), vocabulary.to(tl.float32))
            tl.store(mean_logit + at, mean, mask=mine)


@triton.jit(do_not_specialize=["width"])
def scatter_kernel(
    hidden, grad,  # [T + 1, width], [rows, width]
    row, idle,  # [rows], no row twice among those that are not idle
    residual, common, power,  # [rows], [width], [], see _tiles/tiles.py; None where grad is exact
    width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < width) & (tl.load(idle + slot) == 0)
    x = tl.load(grad + slot.to(tl.int64) * width + column, mask=inside, other=0.0)
    if residual is not None:
        x -= tl.load(residual + slot) * tl.load(common + column, mask=inside, other=0.0)
    if power is not None:
        x = tl.div_rn(x, tl.load(power))
    hidden += tl.load(row + slot) * width + column
    x += tl.load(hidden, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden, x.to(hidden.dtype.element_ty), mask=inside)
