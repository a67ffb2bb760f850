"""In which order lanes run that nothing orders."""

from __future__ import annotations

from typing import Protocol

import numpy as np

WARP = 32


class Order(Protocol):
    """Who goes on, where several could."""

    def turns(self, present: np.ndarray) -> np.ndarray:
        """The places at which lanes stand, the one to run first."""

    def some(self, lanes: np.ndarray) -> np.ndarray:
        """Those of the lanes at one place that go on."""

    def blocks(self, count: int) -> np.ndarray:
        """The blocks of a launch, which run in groups."""

    def stays(self) -> bool:
        """Whether lanes go on beyond a shuffle before others have their turn."""


class Lowest:
    """Whoever is furthest behind, all together: few, wide steps."""

    def turns(self, present: np.ndarray) -> np.ndarray:
        return present

    def some(self, lanes: np.ndarray) -> np.ndarray:
        return lanes

    def blocks(self, count: int) -> np.ndarray:
        return np.arange(count)

    def stays(self) -> bool:
        return True


class Random(Lowest):
    """Any place at which lanes stand, for any half of the warps."""

    def __init__(self, seed: int, together: float = 0.5) -> None:
        self._random, self._together = np.random.default_rng(seed), together

    def turns(self, present: np.ndarray) -> np.ndarray:
        return present if self._random.random() < self._together else self._random.permutation(present)

    def some(self, lanes: np.ndarray) -> np.ndarray:
        if self._random.random() < self._together:
            return lanes
        chosen = self._random.random(lanes[-1] // WARP + 1) < 0.5
        half = lanes[chosen[lanes // WARP]]
        return half if half.size else lanes

    def blocks(self, count: int) -> np.ndarray:
        return self._random.permutation(count)

    def stays(self) -> bool:
        return bool(self._random.random() < 0.75)
