"""The hardware's approximate functions: the exact value, and an error drawn within what PTX's manual allows.

The bounds are those of the PTX ISA's floating-point instructions (section 9.7.3 of version 8 and 9). An error is a
function of the input's bits and of the seed, as the hardware's is one of the input: equal inputs give equal results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Bound = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (input, exact result) -> the largest legal error


class Approximation(NamedTuple):
    exact: Callable[..., np.ndarray]  # in float64
    bound: Bound


def _ulps(count: float) -> Bound:
    return lambda x, y: count * np.spacing(np.abs(y).astype(np.float32)).astype(np.float64)


def _relative(log2: float) -> Bound:
    return lambda x, y: 2.0**log2 * np.abs(y)


def _of_logarithm(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 2.0**-22 * np.where((x > 0.5) & (x < 2), 1.0, np.abs(y))


def _of_wave(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if (np.abs(x) > 2 * np.pi).any():
        raise NotImplementedError("sin.approx and cos.approx have no documented error beyond 2 pi")
    return np.where(np.abs(x) <= np.pi, 2.0**-20.5, 2.0**-14.7)


APPROXIMATIONS: dict[str, Approximation] = {
    "ex2": Approximation(np.exp2, _ulps(2)),
    "lg2": Approximation(np.log2, _of_logarithm),
    "rcp": Approximation(lambda x: 1 / x, _ulps(1)),
    "div": Approximation(np.divide, _ulps(2)),  # .approx and .full
    "sqrt": Approximation(np.sqrt, _relative(-23)),
    "rsqrt": Approximation(lambda x: 1 / np.sqrt(x), _relative(-22.9)),
    "tanh": Approximation(np.tanh, _relative(-11)),
    "sin": Approximation(np.sin, _of_wave),
    "cos": Approximation(np.cos, _of_wave),
}


def approximate(name: str, seed: int | None, *inputs: np.ndarray) -> np.ndarray:
    """The function's float32 result; without a seed the exact one, rounded."""
    function, bound = APPROXIMATIONS[name]
    wide = [x.astype(np.float64) for x in inputs]
    exact = function(*wide)
    if seed is None:
        return exact.astype(np.float32)
    # the documented error holds after the result's own rounding
    room = bound(wide[0], exact) - 0.5 * np.spacing(np.abs(exact).astype(np.float32))
    changed = exact + np.maximum(room, 0) * _noise(seed, *inputs)
    special = ~np.isfinite(exact) | (exact == 0) | ~(np.abs(exact) >= 2.0**-126)
    if name in ("ex2", "cos"):  # of zero it is one, by the manual's tables
        special |= wide[0] == 0
    return np.where(special, exact, changed).astype(np.float32)


def _noise(seed: int, *inputs: np.ndarray) -> np.ndarray:
    """Evenly between -1 and 1, by the inputs' bits (the finaliser of splitmix64)."""
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & (1 << 64) - 1)
    for x in inputs:
        key = key ^ np.atleast_1d(x).view(np.uint32).astype(np.uint64)
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        key = key ^ (key >> np.uint64(31))
    return (key >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1
