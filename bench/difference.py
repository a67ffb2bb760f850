"""What changed from one file of results to another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trajkern._bench.case import OURS
from trajkern._bench.table import seconds
from trajkern._bench.text import wrapped

Case = dict[str, Any]


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A few lines: for each case of both, trajkern's two medians, and which changes exceed the two runs' spreads."""
    return "\n".join(_lines(before, after)) + "\n"


def _lines(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for letter, report in (("A", before), ("B", after)):
        yield from wrapped(f"{letter}: {_title(report)}", "")
    if _machine(before) != _machine(after):
        yield from wrapped("! A and B are of different machines: their times say nothing of the code", "")
    old, new = ({_key(case): case for case in report["cases"]} for report in (before, after))
    moved = {1: 0, 0: 0, -1: 0}
    op = ""
    for key in (key for key in old if key in new):
        if key[0] != op:
            op = key[0]
            yield from ("", op)
        yield from wrapped(f"{key[1]}: {key[2]}", "  ")
        said, way = _change(old[key], new[key])
        moved[way] += 1
        yield from wrapped(said, "    ")
    yield ""
    yield f"{moved[-1]} faster, {moved[1]} slower, {moved[0]} within the spreads"
    for letter, here, there in (("A", old, new), ("B", new, old)):
        if only := [", ".join(key) for key in here if key not in there]:
            yield from wrapped(f"only in {letter}: {'; '.join(only)}", "")


def _change(old: Case, new: Case) -> tuple[str, int]:
    """(what trajkern takes in each, 1 where it is slower, -1 where it is faster, 0 where neither can be told)."""
    a, b = old["seconds"].get(OURS), new["seconds"].get(OURS)
    if a is None or b is None:
        failed = " and ".join(letter for letter, x in (("A", a), ("B", b)) if x is None)
        return f"gate failed in {failed}", 0
    ratio, noise = b["median"] / a["median"], a["spread"] + b["spread"]
    way = 0 if abs(ratio - 1) <= noise else 1 if ratio > 1 else -1
    verdict = {1: ", slower", 0: "", -1: ", faster"}[way]
    return (
        f"{seconds(a['median'])} ± {a['spread']:.0%} -> {seconds(b['median'])} ± {b['spread']:.0%}: "
        f"{ratio:.2f} ×{verdict}{_rivals(old, new)}"
    ), way


def _rivals(old: Case, new: Case) -> str:
    """Eager's change beside it: where that moved as much, the machine did."""
    a, b = old["seconds"].get("eager"), new["seconds"].get("eager")
    return f" (eager {b['median'] / a['median']:.2f} ×)" if a and b else ""


def _key(case: Case) -> tuple[str, str, str]:
    return case["op"], case["work"], case["shape"]


def _machine(report: dict[str, Any]) -> tuple[Any, ...]:
    machine = report["machine"]
    return machine.get("gpu"), machine["cpu"], machine["threads"]


def _title(report: dict[str, Any]) -> str:
    where, cpu, threads = _machine(report)
    versions = report["versions"]
    return (
        f"{where or f'{cpu}, {threads} threads'}; {report['date'][:16]}, trajkern {versions['trajkern']}, torch "
        f"{versions['torch']}{', --quick' * report['quick']}"
    )
