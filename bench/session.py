"""Cases measured one after the other, the machine's ceilings before and after, and what is left told on the way."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any

from trajkern._bench import ceilings
from trajkern._bench.case import OURS, TimedCase
from trajkern._bench.run import Settings, clocks, release, run, shares
from trajkern._bench.table import seconds

SHOWN = 44  # letters of a case's name, so that a line fits 80 columns


class Progress:
    """Lines such as ``[14/49] about 3 min left  gae, forward, 1,048,576 tokens: 3.1 ms`` on stderr."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total, self.done, self.clock = total, 0, clock
        self.began = clock()

    def begin(self, name: str) -> None:
        done, digits = self.done, len(str(self.total))
        left = (self.clock() - self.began) / done * (self.total - done) if done else 0.0
        text = f" about {duration(left)} left" if done else ""
        shown = textwrap.shorten(name, SHOWN, placeholder=" …")
        print(f"[{done + 1:>{digits}}/{self.total}]{text}  {shown}: ", end="", file=sys.stderr, flush=True)

    def end(self, result: dict[str, Any]) -> None:
        self.done += 1
        ours = result["seconds"].get(OURS)
        print(seconds(ours["median"]) if ours else "gate failed", file=sys.stderr)


def duration(seconds: float) -> str:
    """In steps of ten seconds below two minutes, else in whole minutes."""
    return f"{max(10, round(seconds, -1)):.0f} s" if seconds < 115 else f"{seconds / 60:.0f} min"


def measure(
    report: dict[str, Any],
    cases: Sequence[TimedCase],
    settings: Settings,
    saved: Callable[[], object] = lambda: None,
    progress: bool = True,
) -> None:
    """Fill the report, and save it after every case."""
    clock = clocks(settings.device)
    before = ceilings.measure(settings.device, clock[False], settings.seconds / 2)
    report["ceilings"] = before
    release()
    told = Progress(len(cases))
    for case in cases:
        if progress:
            told.begin(case.name)
        result = run(case, settings, clock[case.host], before)
        if progress:
            told.end(result)
        report["cases"].append(result)
        saved()
        release()
    after = ceilings.measure(settings.device, clock[False], settings.seconds / 2)
    report["ceilings"] = ceilings.best(before, after)
    for result in report["cases"]:
        result |= shares(result, report["ceilings"])
    report["machine"]["load_average_after"] = os.getloadavg()[0]
