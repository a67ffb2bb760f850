"""Arithmetic that numpy lacks, rounded once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
SPLIT = 134217729.0  # 2**27 + 1
HALF_OF_FLOAT32 = np.int64(0x10000000)  # the bits of a float64 that a float32 lacks, where they stand for one half
# where no step of the exact product and sum below over- or underflows
SMALLEST, LARGEST = 2.0**-480, 2.0**480


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once."""
    if a.dtype == np.float64:
        return _fma64(a, b, c)
    a, b, c, narrow = a.astype(np.float64), b.astype(np.float64), c.astype(np.float64), a.dtype
    product = a * b  # exact
    total = product + c
    if narrow == np.float32:  # a sum that ends in one half is rounded wrongly if it was rounded before
        rest = np.atleast_1d(total).view(np.int64) & np.int64(0x1FFFFFFF)
        if not (rest == HALF_OF_FLOAT32).any() and not (np.abs(total) < 2.0**-125).any():
            return total.astype(narrow)
    return _to_odd(*_two_sum(product, c)).astype(narrow)


def _fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008; rationals where exponents are extreme."""
    a, b, c = np.broadcast_arrays(a, b, c)
    high = a * b
    low = _product_error(a, b, high)
    carry_high, carry_low = _two_sum(c, low)
    sum_high, sum_low = _two_sum(high, carry_high)
    result = sum_high + _to_odd(*_two_sum(carry_low, sum_low))
    usual = np.ones(a.shape, bool)
    for x in (a, b, c, high):
        usual &= (x == 0) | (np.abs(x) > SMALLEST) & (np.abs(x) < LARGEST)
    if usual.all():
        return np.where(result == 0, high + c, result)  # the sign of a zero
    result = np.where(usual & (result != 0), result, high + c)
    for i in np.flatnonzero(~usual & np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        result[i] = _rational(float(a[i]), float(b[i]), float(c[i]))
    return result


def _rational(a: float, b: float, c: float) -> float:
    total = Fraction(a) * Fraction(b) + Fraction(c)
    if total == 0:
        return a * b + c if a == 0 or b == 0 else 0.0
    try:
        return float(total)
    except OverflowError:
        return float("inf") if total > 0 else float("-inf")


def _product_error(a: np.ndarray, b: np.ndarray, product: np.ndarray) -> np.ndarray:
    """What a * b lacks, by Veltkamp and Dekker."""
    a1, b1 = a * SPLIT, b * SPLIT
    a1, b1 = a1 - (a1 - a), b1 - (b1 - b)
    a2, b2 = a - a1, b - b1
    return a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a + b, what it lacks), by Knuth."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def _to_odd(total: np.ndarray, error: np.ndarray) -> np.ndarray:
    """total + error: cut off, its last bit set where that was not exact."""
    inexact = (error != 0) & np.isfinite(total)
    cut = np.where((error < 0) == (total > 0), np.nextafter(total, 0.0), total)
    bits = np.where(inexact, np.atleast_1d(cut).view(np.int64) | np.int64(1), np.atleast_1d(total).view(np.int64))
    return bits.view(np.float64)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; a / 0 has no defined result."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    return (a - np.fmod(a, safe)) // safe


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def shift_left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    return _shifted(np.left_shift, a, count, a.dtype.type(0))


def shift_right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Filled up with the sign where there is one."""
    sign = a >> a.dtype.type(8 * a.dtype.itemsize - 1) if a.dtype.kind == "i" else a.dtype.type(0)
    return _shifted(np.right_shift, a, count, sign)


def _shifted(shift: np.ufunc, a: np.ndarray, count: np.ndarray, empty: np.ndarray) -> np.ndarray:
    width = 8 * a.dtype.itemsize
    return np.where(count < width, shift(a, np.minimum(count, width - 1).astype(a.dtype)), empty)


def high_half(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the whole product."""
    if a.dtype.itemsize == 8:
        return (a.astype(object) * b.astype(object) >> 64).astype(a.dtype)
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return (a.astype(wide) * b.astype(wide) >> wide(8 * a.dtype.itemsize)).astype(a.dtype)


def leading_zeros(a: np.ndarray) -> np.ndarray:
    width = 8 * a.dtype.itemsize
    a = a.view(UNSIGNED[a.dtype.itemsize])
    high = (a >> a.dtype.type(32)) if width == 64 else np.zeros_like(a)
    part = np.where(high != 0, high, a & a.dtype.type(0xFFFFFFFF))
    length = np.frexp(part.astype(np.float64))[1] + np.where(high != 0, 32, 0)  # exact below 2**53
    return (width - length).astype(np.uint32)


def bit_field(a: np.ndarray, begin: np.ndarray, count: np.ndarray) -> np.ndarray:
    """``count`` bits from bit ``begin`` on, both of 8 bits, as PTX's bfe of an unsigned type."""
    begin, count = (begin & np.uint32(0xFF)), (count & np.uint32(0xFF))
    low = shift_right(a, begin)
    mask = shift_left(np.ones_like(low), count) - a.dtype.type(1)
    return low & np.where(count >= 8 * a.dtype.itemsize, ~a.dtype.type(0), mask)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of a float32 rounded to the nearest, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 values as zeros of their sign (.ftz)."""
    small = np.abs(x) < np.float32(2.0**-126)
    return np.where(small, np.copysign(np.float32(0), x), x)


def permuted_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Each byte one of the eight of b a, as a selector of four bits says, whose bit 3 asks for its sign eight times."""
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    out = np.uint64(0)
    for k in range(4):
        choice = selector.astype(np.uint64) >> np.uint64(4 * k) & np.uint64(15)
        byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(choice > 7, (byte >> np.uint64(7)) * np.uint64(255), byte)
        out = out | byte << np.uint64(8 * k)
    return np.atleast_1d(out).astype(np.uint32)
