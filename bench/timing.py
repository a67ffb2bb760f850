"""Times of several calls, taken in turns so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]

FLUSH_BYTES = 2**30  # several times any L2 cache; writing it keeps a GPU busy while the host enqueues the call


class Clock(Protocol):
    """Measures the seconds of one call, from ``repeats`` in a row."""

    sample_seconds: float  # a sample repeats a shorter call until it lasts about this long

    def __call__(self, call: Call, repeats: int) -> float: ...


@dataclass(frozen=True)
class Summary:
    """Seconds of one call over the rounds."""

    median: float
    minimum: float
    spread: float  # half the range that holds the middle half of the samples, as a share of the median
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Summary:
        low, middle, high = quartiles(samples)
        return cls(middle, min(samples), (high - low) / 2 / middle if middle else 0.0, len(samples))


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """First quartile, median and third; of a single sample, it three times."""
    if len(samples) == 1:
        return (samples[0],) * 3
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def ratio(samples: list[float], rival: list[float]) -> float:
    """How many times as long the first call takes as the second: the median over the rounds, each against itself."""
    return statistics.median(a / b for a, b in zip(samples, rival, strict=True))


class WallClock:
    """By the host's clock: on a GPU what a call costs its caller, with one wait a sample."""

    sample_seconds = 2e-3

    def __init__(self, synchronize: Call = lambda: None) -> None:
        self.synchronize = synchronize

    def __call__(self, call: Call, repeats: int) -> float:
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.synchronize()
        return (time.perf_counter() - start) / repeats


class DeviceClock:
    """By CUDA events, behind a write that empties the L2 cache and hides the time the host takes to enqueue."""

    sample_seconds = 0.0

    def __init__(self) -> None:
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats


def race(calls: dict[str, Call], clock: Clock, *, seconds: float, rounds: tuple[int, int]) -> dict[str, list[float]]:
    """Samples of each call. A round takes one of each, starting with another one every time.

    The number of rounds fills ``seconds``, within the bounds ``rounds``. Every call has run before the first of them.
    """
    order = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in order}
    with _no_collection():
        fastest = {name: _fastest(call, clock) for name, call in calls.items()}
        repeats = {name: max(1, math.ceil(clock.sample_seconds / x)) for name, x in fastest.items()}
        count = round(seconds / sum(fastest[name] * repeats[name] for name in order))
        for i in range(min(max(count, rounds[0]), rounds[1])):
            turn = i % len(order)
            for name in order[turn:] + order[:turn]:
                samples[name].append(clock(calls[name], repeats[name]))
    return samples


def _fastest(call: Call, clock: Clock) -> float:
    """Of a few calls, lest an interruption passes for a long one; of one that is long anyway, the first time."""
    fastest = math.inf
    for _ in range(5):
        fastest = min(fastest, clock(call, 1))
        if fastest > 10 * clock.sample_seconds:
            break
    return max(fastest, 1e-9)


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
