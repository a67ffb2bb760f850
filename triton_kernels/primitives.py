"""The device maths that the kernels share. NaN goes through every function; float32 in, float32 out."""

from __future__ import annotations

import triton
import triton.language as tl

KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_HIGH = tl.constexpr(0.693359375)  # 9 bits: times an exponent it is exact
LN_2_LOW = tl.constexpr(-2.1219444005469057e-4)


@triton.jit
def _series(x):
    """e^x - 1 - x for abs(x) <= 1, to 4e-9 of itself."""
    series = 2.505210838544172e-8 * x + 2.755731922398589e-7  # 1/11! x + 1/10!
    series = series * x + 2.7557319223985893e-6
    series = series * x + 2.48015873015873e-5
    series = series * x + 1.984126984126984e-4
    series = series * x + 1.388888888888889e-3
    series = series * x + 8.333333333333333e-3
    series = series * x + 4.1666666666666664e-2
    series = series * x + 1.6666666666666666e-1
    return (series * x + 0.5) * x * x


@triton.jit
def _power_of_two(exponent):
    """2^exponent from its bits, for whole numbers in [-126, 127]; the hardware's exp2 need not be exact."""
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """e^x to about one unit in the last place; tl.exp loses the bits that x has before its binary point."""
    x = tl.clamp(x, -104.0, 104.0, KEEP_NAN)  # 0 and infinity
    exponent = tl.floor(x * LOG2_E + 0.5)
    rest = (x - exponent * LN_2_HIGH) - exponent * LN_2_LOW
    half = tl.floor(0.5 * exponent)
    return (1 + (rest + _series(rest))) * _power_of_two(half) * _power_of_two(exponent - half)


@triton.jit
def exp_excess(x):
    """e^x - 1 - x, without cancellation where x is small."""
    return tl.where(tl.abs(x) <= 1, _series(x), exp(x) - 1 - x)


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) <= 1, x + _series(x), exp(x) - 1)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: the rounding of 1 + x is undone by the exact quotient x / ((1 + x) - 1)."""
    y = 1 + x
    quotient = tl.div_rn(x, tl.where(y == 1, 1.0, y - 1))
    return tl.where(y == 1, x, tl.log(y) * quotient)
