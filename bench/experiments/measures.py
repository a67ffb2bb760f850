"""What is compared of a run: a figure at its end, or something of its validation's curve, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

SPENT = ("steps", "tokens", "seconds")
_TO = re.compile(r"(steps|tokens|seconds) to (\S+) >= (\S+)")
_MEAN = re.compile(r"mean (\S+)")
_AT = re.compile(r"(\S+) at (\S+) = (\S+)")
_AT_EQUAL = re.compile(r"(\S+) at equal (\S+)")


def measured(result: dict[str, Any], measure: str) -> float | None:
    """The measure of a run, by the names that ``comparisons.Test`` lists; None where the run has none.

    Raises:
        ValueError: a measure of the curve that no validation has.
    """
    curve = result["curve"]
    if parts := _TO.fullmatch(measure):
        at = crossing(column(curve, parts[2]), float(parts[3]))
        return result[parts[1]] if at is None else between(column(curve, parts[1]), at)
    if parts := _MEAN.fullmatch(measure):
        return mean_over(column(curve, "tokens"), column(curve, parts[1]))
    if parts := _AT.fullmatch(measure):
        return _at_level(curve, parts[1], parts[2], float(parts[3]))
    return result[measure] if measure in SPENT else result["after"].get(measure)


def compared(first: dict[str, Any], other: dict[str, Any], measure: str) -> tuple[float | None, float | None]:
    """The measure of each of two runs; "at equal" is a measure of both together.

    Raises:
        ValueError: a measure of the curve that no validation has.
    """
    parts = _AT_EQUAL.fullmatch(measure)
    if parts is None:
        return measured(first, measure), measured(other, measure)
    curves = first["curve"], other["curve"]
    shared = min(max(column(curve, parts[2])) for curve in curves)
    x, y = (_at_level(curve, parts[1], parts[2], shared) for curve in curves)
    return x, y


def _at_level(curve: Sequence[dict[str, Any]], measure: str, over: str, level: float) -> float | None:
    """The measure where ``over`` first reaches ``level``; None where it does not."""
    at = crossing(column(curve, over), level)
    return None if at is None else between(column(curve, measure), at)


def column(curve: Sequence[dict[str, Any]], measure: str) -> list[float]:
    """The measure at each validation."""
    if not curve or any(point.get(measure) is None for point in curve):
        known = ", ".join(curve[0]) if curve else "nothing"
        raise ValueError(f"a measure of the curve must be one of {known}, at every validation; got {measure!r}")
    return [float(point[measure]) for point in curve]


def crossing(values: Sequence[float], level: float) -> float | None:
    """Where the straight lines between ``values`` first reach ``level``: 1.5 is halfway from second to third."""
    if values[0] >= level:
        return 0.0
    for index, (x, y) in enumerate(pairwise(values)):
        if y >= level:
            return index + (level - x) / (y - x)
    return None


def between(values: Sequence[float], at: float) -> float:
    """The straight lines between ``values`` at such a place."""
    index = min(int(at), len(values) - 1)
    rest = at - index
    return values[index] if rest == 0 else values[index] + rest * (values[index + 1] - values[index])


def mean_over(places: Sequence[float], values: Sequence[float]) -> float | None:
    """The mean of the straight lines between ``values`` over ``places``; None of a single place."""
    width = places[-1] - places[0]
    areas = [(b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(zip(places, values, strict=True))]
    return sum(areas) / width if width else None
