"""How cost grows: trajkern's time and memory over sizes that double or quadruple, and the exponent fitted to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trajkern._bench import advantage, head, logprob, policy_loss, span, tree
from trajkern._bench.case import OURS, Problem
from trajkern._bench.memory import peak_bytes
from trajkern._bench.timing import Clock, Summary, race

ROUNDS = (3, 30)


@dataclass(frozen=True)
class Sweep:
    """One op over one size.

    Args:
        size: what grows, by its letter and name.
        values: of that size, by device.
        make: value -> the maker of a problem, device -> problem.
    """

    op: str
    size: str
    values: dict[str, tuple[int, ...]]
    make: Callable[[int], Callable[[str], Problem]]


def _powers(first: int, count: int, cuda: int, by: int = 4) -> dict[str, tuple[int, ...]]:
    """``count`` sizes, each ``by`` times the one before; on a GPU ``cuda`` times as large."""
    cpu = tuple(first * by**i for i in range(count))
    return {"cpu": cpu, "cuda": tuple(cuda * x for x in cpu)}


def _logits(rows: int, vocabulary: int) -> Callable[[str], Problem]:
    return logprob.problem("token_stats", rows, vocabulary, torch.float32, backward=True)


SWEEPS = (
    Sweep("token_stats", "T, rows of 32,768 logits", _powers(16, 4, 8), lambda n: _logits(n, 32_768)),
    Sweep("token_stats", "V, vocabulary of 64 rows", _powers(4096, 4, 1), lambda n: _logits(64, n)),
    Sweep(
        "linear_policy_loss",
        "T, rows of 256 × 8,192",
        _powers(64, 4, 8),
        lambda n: head.loss_problem(n, 256, 8192, torch.float32),
    ),
    Sweep(
        "policy_loss",
        "T, tokens of 1,024 trajectories",
        _powers(65_536, 4, 1),
        lambda n: policy_loss.problem(n, 1024, backward=True),
    ),
    Sweep("group_advantages", "N, trajectories, groups of 8", _powers(16_384, 4, 1), lambda n: advantage.groups(n, 8)),
    Sweep("span_reduce", "T, tokens in spans of 40", _powers(262_144, 4, 1), lambda n: span.problem("mean", n)),
    Sweep("subtree_reduce", "M, nodes of a tree", _powers(65_536, 4, 1), lambda n: tree.reduce_problem(n)),
)


def measure(
    device: str, clock: Clock, seconds: float, ops: set[str], said: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The points of every sweep of these ops: sizes, medians, spreads, peak bytes, and the exponent of time."""
    results = []
    for sweep in SWEEPS:
        if sweep.op not in ops:
            continue
        result: dict[str, Any] = {"op": sweep.op, "size": sweep.size, "points": []}
        for value in sweep.values[device]:
            call = sweep.make(value)(device).step(OURS)
            peak = peak_bytes(call, device)
            summary = Summary.of(race({OURS: call}, clock, seconds=seconds, rounds=ROUNDS)[OURS])
            point = {"value": value, "seconds": summary.median, "spread": summary.spread, "peak_bytes": peak}
            result["points"].append(point)
        result["exponent"] = exponent([(p["value"], p["seconds"]) for p in result["points"]])
        said(f"{sweep.op} over {sweep.size}: time grows by the power {result['exponent']:.2f}")
        results.append(result)
    return results


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of a line through the points' logarithms, by least squares."""
    xs, ys = ([math.log(v) for v in axis] for axis in zip(*points, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)
