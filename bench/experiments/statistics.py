"""What paired differences over few seeds show: Student's t in closed form, Holm's correction, a verdict by one rule.

The probability of Student's t is that of Abramowitz & Stegun (26.7.3, 26.7.4), exact for whole degrees of freedom.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.05


class Paired(NamedTuple):
    """Differences of so many ``pairs``: their mean, its interval at 95 %, and the two-sided p that it is 0."""

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def paired(differences: Sequence[float]) -> Paired:
    """Student's t for the mean of ``differences``: one difference tells nothing, none has no mean.

    Differences without any spread have an interval of one point, and p = 0 unless they are all 0.
    """
    count = len(differences)
    if count < 2:
        return Paired(differences[0] if count else math.nan, -math.inf, math.inf, 1.0, count)
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(count)
    reach = t_quantile(1 - LEVEL, count - 1) * error
    if error == 0:
        p = float(mean == 0)
    else:
        p = max(0.0, 1 - t_within(abs(mean) / error, count - 1))
    return Paired(mean, mean - reach, mean + reach, p, count)


def t_within(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t with ``freedom`` degrees of freedom, a whole number of at least 1."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for step in range(1 + odd, freedom, 2):  # the powers of the cosine, up to freedom - 2
        total += term
        term *= math.cos(angle) ** 2 * step / (step + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(within: float, freedom: int) -> float:
    """The t with P(|T| <= t) = ``within``, in [0, 1)."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < within:
        high *= 2
    for _ in range(100):  # halvings, more than a float can tell apart
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < within else (low, middle)
    return high


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's corrected p of each of a family of tests, in their order.

    The i-th smallest of m is multiplied by m - i + 1; none is smaller than one before it, nor above 1.
    """
    corrected, most = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = max(most, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = most
    return corrected


class Finding(NamedTuple):
    """A hypothesis and what the seeds say: ``sign`` is 1 where higher is better, ``seeds`` how many there should be."""

    difference: Paired
    corrected: float
    sign: int
    matters: float | None
    seeds: int

    @property
    def holds(self) -> bool:
        """The direction is the claimed one, and the corrected p below 0.05, on every seed."""
        found = self.difference
        return found.pairs == self.seeds and self.sign * found.mean > 0 and self.corrected < LEVEL

    @property
    def fails(self) -> bool:
        """The interval lies wholly on the other side, or below the smallest difference that would matter."""
        found = self.difference
        best = max(self.sign * found.low, self.sign * found.high)
        return best < (self.matters or 0.0)


def verdict(findings: Sequence[Finding]) -> str:
    """ "reproduces" where every hypothesis holds, "does not" where one fails, else "cannot be told"."""
    if findings and all(finding.holds for finding in findings):
        return "reproduces"
    return "does not" if any(finding.fails for finding in findings) else "cannot be told"
