"""Some cases of one target, drawn and shrunk by hypothesis."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, strategies

from tests.fuzz.examine import TARGETS, Undecided, examined, is_refused
from tests.fuzz.problem import Options

SETTINGS = hypothesis.settings(
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.quiet,
)


class Failed(Exception):
    pass


@dataclass
class Drawn:
    """What came of a chunk."""

    held: Counter[str] = field(default_factory=Counter)  # how often each property was tried
    cases: int = 0
    shares: list[float] = field(default_factory=list)  # of each case's budget
    failure: tuple[Options, int, dict[str, str]] | None = None  # the smallest: options, seed, faults


def draw(target: str, seed: int, count: int, announce: Callable[[Options, int], None]) -> Drawn:
    """Up to ``count`` cases, of which the first that fails is made smaller and ends the chunk.

    ``announce`` is told each case before it runs.
    """
    done = Drawn()
    options = strategies.fixed_dictionaries(
        {name: strategies.sampled_from(values) for name, values in TARGETS[target].factors.items()}
    ).filter(lambda chosen: not is_refused(target, chosen))

    @hypothesis.seed(seed)
    @hypothesis.settings(SETTINGS, max_examples=count)
    @hypothesis.given(options, strategies.integers(0, 2**31 - 1))
    def case(options: Options, number: int) -> None:
        announce(options, number)
        try:
            found, share = examined(target, options, number)
        except Undecided:
            hypothesis.reject()
        except Exception as error:
            share = math.inf
            found = {"a result": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        if done.failure is None:
            done.cases += 1
            done.shares.append(share)
            done.held.update(found.keys())
        if faults := {name: fault for name, fault in found.items() if fault}:
            done.failure = options, number, faults
            raise Failed(next(iter(faults)))

    try:
        case()
    except Failed:
        pass
    return done
