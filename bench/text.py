"""The results for a terminal of 80 columns: a few lines a case."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from trajkern._bench import bare
from trajkern._bench.case import BARE, OURS
from trajkern._bench.table import (
    ABOUT_BARE,
    NO_SUCH_OP,
    absent_peers,
    growth_rows,
    heading,
    peers_of,
    seconds,
    target_text,
)

WIDTH = 80


def text(report: dict[str, Any]) -> str:
    lines = [*wrapped(heading(report), ""), *wrapped(ABOUT_BARE, "")]
    op = None
    for case in report["cases"]:
        if case["op"] != op:
            op = case["op"]
            lines += ["", op]
        lines += case_lines(case, peers_of(report))
    if sweeps := report.get("growth"):
        lines += ["", "growth: the power of the size by which the time grows"]
        lines += [f"  {power:<6}{name.strip('`')} over {size}" for name, size, _, _, power in growth_rows(sweeps)]
    if absent := absent_peers(report):
        lines += ["", *textwrap.wrap(absent, WIDTH)]
    return "\n".join(lines) + "\n"


def case_lines(case: dict[str, Any], usable: list[str]) -> Iterator[str]:
    """What trajkern takes; how many times as long everybody else; who is faster; which targets it meets."""
    yield from textwrap.wrap(f"{case['work']}: {case['shape']}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    ours = case["seconds"].get(OURS)
    if ours is None:
        yield from _entries([f"gate failed: {case['gate'][OURS]['why']}"])
        return
    yield f"    trajkern {seconds(ours['median'])} ± {ours['spread']:.0%}{_shares(case)}"
    others = {name: s["median"] / ours["median"] for name, s in case["seconds"].items() if name != OURS}
    if others:
        yield from _wrapped([f"{name} {times:.2f} ×" for name, times in others.items()])
    if why := bare.why_less(case):
        yield from wrapped(f"bare pass: {bare.what(case)}; trajkern takes less: {why}.", "    ")
    if behind := [name for name, times in others.items() if times < 1 and name != BARE]:
        yield f"    ! slower than {', '.join(behind)}"
    yield from _entries(f"{name}: gate failed, {g['why']}" for name, g in case["gate"].items() if not g["passed"])
    unable = {name: why for name, why in case["unable"].items() if why != NO_SUCH_OP and name in usable}
    yield from _entries(f"{name} – {why}" for name, why in unable.items())
    for target in case["targets"]:
        measured, bound = target_text(target, case)
        said = {True: "met", False: "NOT MET", None: "not measured"}[target["met"]]
        yield f"    target {bound}: {measured}, {said}"


def _shares(case: dict[str, Any]) -> str:
    parts = []
    if "share_of_gemm" in case:
        parts.append(f"{case['share_of_gemm']:.0%} of the matrix product's rate")
    elif "share_of_copy" in case:
        parts.append(f"{case['share_of_copy']:.0%} of copy bandwidth")
    if OURS in case["peak_bytes"]:
        peak = case["peak_bytes"][OURS]
        parts.append(f"peak {size(peak)}" if peak >= 2**20 else "peak under 1 MiB")
    return "".join(f", {x}" for x in parts)


def size(count: float) -> str:
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count:.0f} B"


def _entries(items: Any) -> Iterator[str]:
    for item in items:
        yield from wrapped(item, "    ")


def wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _wrapped(items: list[str]) -> list[str]:
    """Items side by side, none of them broken."""
    joined = "   ".join(item.replace(" ", "\0") for item in items)
    lines = textwrap.wrap(joined, WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
    return [line.replace("\0", " ") for line in lines]
