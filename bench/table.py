"""The results as Markdown: every time, the other packages, how cost grows, and what was promised."""

from __future__ import annotations

from typing import Any

from trajkern._bench import bare
from trajkern._bench.case import BARE, COMPILED, OURS

NO_SUCH_OP = "has no such op"
ABOUT_BARE = (
    "The bare pass is torch's own sum, copy or matrix product over the same data. It computes nothing of the op, and "
    "is no bound."
)


def markdown(report: dict[str, Any]) -> str:
    columns = ("op", "work", "input", *contenders_of(report), "of copy bandwidth", "peak memory")
    parts = [heading(report), ABOUT_BARE, table(columns, time_rows(report)), "\n".join(less_lines(report))]
    if names := peers_of(report):
        parts.append(table(("op", "work", "input", *(f"{n} {report['peers'][n]}" for n in names)), peer_rows(report)))
    parts.append(absent_peers(report))
    if sweeps := report.get("growth"):
        parts.append(table(("op", "over", "from", "to", "time grows by the power"), growth_rows(sweeps)))
    if failures := failure_rows(report):
        parts.append("Gate failed, so not timed:\n\n" + table(("case", "contender", "why"), failures))
    if targets := target_rows(report):
        parts.append(f"{target_counts(report)}:\n\n" + table(TARGET_COLUMNS, targets))
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(report: dict[str, Any]) -> str:
    machine, versions, ceilings = report["machine"], report["versions"], report["ceilings"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['instruction_set']}, {machine['threads']} threads"
    rate = next(
        f"{v / 1e12:.3g} TFLOP/s ({k.removesuffix('_flop_per_second').replace('_', ' ')})"
        for k, v in ceilings.items()
        if k.endswith("flop_per_second")
    )
    ungated = "" if report.get("gated", True) else " Nothing was compared with float64 (--ungated)."
    return (
        f"{where}; torch {versions['torch']}, trajkern {versions['trajkern']}; {report['date']}; "
        f"load average before: {machine['load_average_before']:.1f}. "
        f"Measured here: copy {ceilings['copy_bytes_per_second'] / 1e9:.4g} GB/s, {rate}, "
        f"smallest call {seconds(ceilings['launch_seconds'])}, empty call {seconds(ceilings['empty_call_seconds'])}."
        f"{ungated}"
    )


TARGET_COLUMNS = ("op", "work", "input", "measured", "target", "")


def contenders_of(report: dict[str, Any]) -> tuple[str, ...]:
    """Who stands in the table of times; packages have one of their own."""
    return OURS, *report.get("own", ()), "eager", COMPILED, BARE


def less_lines(report: dict[str, Any]) -> list[str]:
    """Where trajkern takes less time than the bare pass, and why: a line a reason."""
    reasons: dict[str, list[str]] = {}
    for case in report["cases"]:
        if why := bare.why_less(case):
            times = case["seconds"][BARE]["median"] / case["seconds"][OURS]["median"]
            name = f"{case['op']}, {case['work']}, {case['shape']} ({times:.2f} ×)"
            reasons.setdefault(why, []).append(name)
    return [f"- Less than the bare pass, for {why}: {'; '.join(names)}." for why, names in reasons.items()]


def target_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    said = {True: "met", False: "**not met**", None: "not measured"}
    return [
        (f"`{case['op']}`", case["work"], case["shape"], *target_text(target, case), said[target["met"]])
        for case in report["cases"]
        for target in case["targets"]
    ]


def target_counts(report: dict[str, Any]) -> str:
    """Such as "Targets: 14 met, 12 not met, 1 not measured"."""
    met = [target["met"] for case in report["cases"] for target in case["targets"]]
    said = ((True, "met"), (False, "not met"), (None, "not measured"))
    return "Targets: " + ", ".join(f"{met.count(value)} {name}" for value, name in said if value in met)


def target_text(target: dict[str, Any], case: dict[str, Any]) -> tuple[str, str]:
    """(measured, bound), such as ("1.45 ×", "≤ 1.6 × bare pass")."""
    unit, bound, value = target["unit"], target["bound"], target["value"]
    if unit == "seconds":
        return "–" if value is None else seconds(value), f"≤ {seconds(bound)}"
    measured = "–" if value is None else f"{value:.2f} ×"
    if unit == "memory":
        return measured, f"< {bound:g} × the size of {case['memory_of']['name']}"
    return measured, (f"≥ {bound:g} × as fast as " if unit == "fast" else f"≤ {bound:g} × ") + target["rival"]


def time_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            f"`{case['op']}`",
            case["work"],
            case["shape"],
            *(time_text(case, name) for name in contenders_of(report)),
            f"{case['share_of_copy']:.0%}" if "share_of_copy" in case else "",
            memory_text(case),
        )
        for case in report["cases"]
    ]


def peers_of(report: dict[str, Any]) -> list[str]:
    """The peers that could be used at all."""
    return [name for name, version in report.get("peers", {}).items() if version[:1].isdigit()]


def peer_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of the cases that some peer has: how many times as long as trajkern each takes."""
    return [
        (f"`{case['op']}`", case["work"], case["shape"], *(peer_text(case, name) for name in peers_of(report)))
        for case in report["cases"]
        if set(peers_of(report)) & set(case["gate"])
    ]


def timed(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases whose time is the device's, not the caller's."""
    return [case for case in report["cases"] if OURS in case["seconds"] and not case["host"]]


def raced(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that somebody else can do as well."""
    names = {"eager", COMPILED, *peers_of(report)}
    return [case for case in timed(report) if names & set(case["seconds"])]


def overview(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of those one an op: that of most contenders, and among them the one that moves most bytes."""
    best: dict[str, dict[str, Any]] = {}
    for case in raced(report):
        known = best.setdefault(case["op"], case)
        if (len(case["seconds"]), case["bytes"]) > (len(known["seconds"]), known["bytes"]):
            best[case["op"]] = case
    return list(best.values())


def tiny(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of a few numbers, whose time is what the call costs its caller."""
    return [case for case in report["cases"] if OURS in case["seconds"] and case["host"]]


def absent_peers(report: dict[str, Any]) -> str:
    """Which peers could not be used, and why."""
    absent = [f"{name} ({why})" for name, why in report.get("peers", {}).items() if name not in peers_of(report)]
    return f"Not compared: {'; '.join(absent)}." if absent else ""


def peer_text(case: dict[str, Any], name: str) -> str:
    if name not in case["seconds"] or OURS not in case["seconds"]:
        why = case["unable"].get(name, NO_SUCH_OP)
        return "gate failed" if name in case["gate"] else "–" if why == NO_SUCH_OP else f"– {why}"
    times = case["seconds"][name]["median"] / case["seconds"][OURS]["median"]
    return f"{times:.2f} ×" if times >= 1 else f"**{times:.2f} ×**"


def growth_rows(sweeps: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    def end(point: dict[str, Any]) -> str:
        return f"{point['value']:,}: {seconds(point['seconds'])}"

    return [
        (f"`{s['op']}`", s["size"], end(s["points"][0]), end(s["points"][-1]), f"{s['exponent']:.2f}") for s in sweeps
    ]


def time_text(case: dict[str, Any], name: str) -> str:
    measured = case["seconds"].get(name)
    if measured is None:
        return "gate failed" if name in case["gate"] else "–"
    return f"{seconds(measured['median'])} (min {seconds(measured['minimum'])}, ± {measured['spread']:.0%})"


def memory_text(case: dict[str, Any]) -> str:
    size = case.get("memory_of", {}).get("bytes")
    return ", ".join(f"{name} {peak / size:.2f} ×" for name, peak in case["peak_bytes"].items()) if size else ""


def failure_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (f"`{case['op']}`, {case['work']}, {case['shape']}", name, verdict["why"].replace("|", "\\|"))
        for case in report["cases"]
        for name, verdict in case["gate"].items()
        if not verdict["passed"]
    ]


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table whose source is aligned, or nothing where there are no rows."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(columns), line(tuple("-" * width for width in widths)), *map(line, rows)])


def seconds(value: float) -> str:
    """Three digits, in the unit that keeps them before the exponent."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value / size < 999.5 else f"{value / size:.0f} {unit}"
    return f"{value * 1e9:.3g} ns"
