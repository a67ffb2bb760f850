"""``pytest bench --benchmark-only``: the benchmark's cases under pytest-benchmark, to ``--benchmark-compare`` versions.

The gate is the same: a contender that is wrong fails and has no time. ``trajkern bench`` compares contenders better: it
takes them in turns.
"""

from __future__ import annotations

import pytest

from trajkern._bench.__main__ import FAMILIES
from trajkern._bench.case import OURS, TimedCase
from trajkern._bench.memory import hold
from trajkern._bench.run import gate, release

CASES = [case for cases in FAMILIES.values() for case in cases if "cpu" in case.devices]


@pytest.fixture(scope="module", autouse=True)
def steady_memory() -> None:
    hold()


@pytest.mark.parametrize("name", [OURS, "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_time(case: TimedCase, name: str, benchmark) -> None:
    problem = case.make("cpu")
    if name not in problem.functions:
        pytest.skip(f"{name} is no contender")
    verdict = gate(problem, name)
    assert verdict["passed"], verdict["why"]
    benchmark.group = case.name
    benchmark(problem.step(name))
    release()
