"""Pictures of a benchmark's results. Text takes the colour of the page around it; lines read on any."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from trajkern._bench import table
from trajkern._bench.case import COMPILED, OURS, RIVAL_BUDGET
from trajkern._bench.run import gemm_rate
from trajkern._bench.table import peers_of

INK = "#808182"  # becomes currentColor
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#ec4899", "#22d3ee", "#a16207")
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "trajkern",
}

Report = dict[str, Any]


def svg(draw: Callable[[Report], Figure | None], report: Report) -> str:
    """The picture as an <svg> element that scales with the page, or nothing where the report has no data for it."""
    with rc_context(STYLE):
        figure = draw(report)
        if figure is None:
            return ""
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def png(draw: Callable[[Report], Figure | None], report: Report) -> bytes:
    """The picture on white; empty where the report has no data for it."""
    ink = {name: "#24292f" for name, value in STYLE.items() if value == INK}
    with rc_context({**STYLE, **ink}):
        figure = draw(report)
        if figure is None:
            return b""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=144, facecolor="white", bbox_inches="tight")
    return file.getvalue()


def _label(case: dict[str, Any]) -> str:
    return f"{case['op']}, {case['work']}\n{case['shape']}"


def ratios(report: Report) -> Figure | None:
    """How many times as long as trajkern everybody else takes, on a logarithmic axis."""
    return _ratios(report, table.raced(report))


def overview(report: Report) -> Figure | None:
    """The same for one case an op."""
    return _ratios(report, table.overview(report))


def _ratios(report: Report, cases: list[dict[str, Any]]) -> Figure | None:
    names = ["eager", COMPILED, *peers_of(report)]
    if not cases:
        return None
    figure = Figure(figsize=(7.2, 0.9 + 0.36 * len(cases)))
    axis = figure.subplots()
    axis.margins(y=0.5 / len(cases))
    for name, colour in zip(names, COLOURS, strict=False):
        rows = [row for row, case in enumerate(cases) if name in case["seconds"]]
        times = [cases[row]["seconds"][name]["median"] / cases[row]["seconds"][OURS]["median"] for row in rows]
        axis.scatter(times, rows, s=26, color=colour, label=name, zorder=3)
    axis.axvline(1, color=INK, linewidth=1.2)
    axis.set_yticks(range(len(cases)), [_label(case) for case in cases], fontsize=7)
    axis.invert_yaxis()
    _log(axis.xaxis, axis.set_xscale)
    axis.grid(axis="y", color=INK, alpha=0.18)
    axis.set_xlabel("times as long as trajkern takes (right of the line: trajkern is faster)")
    axis.legend(ncols=4, loc="lower left", bbox_to_anchor=(-0.4, 1.0), fontsize=8, handletextpad=0.1)
    return figure


def roofline(report: Report) -> Figure | None:
    """Measured time against what the measured copy bandwidth and matrix product rate allow."""
    cases = table.timed(report)
    if not cases:
        return None
    copy, gemm = report["ceilings"]["copy_bytes_per_second"], gemm_rate(report["ceilings"])
    figure = Figure(figsize=(6.2, 4.2))
    axis = figure.subplots()
    ends = []
    for family, colour in zip(dict.fromkeys(case["family"] for case in cases), COLOURS, strict=False):
        members = [case for case in cases if case["family"] == family]
        least = [max(case["bytes"] / copy, case["flops"] / gemm) for case in members]
        took = [case["seconds"][OURS]["median"] for case in members]
        axis.scatter(least, took, s=26, color=colour, label=family, zorder=3)
        ends += [*least, *took]
    line = (min(ends) / 2, max(ends) * 2)
    axis.plot(line, line, color=INK, linewidth=1.2)
    _log(axis.xaxis, axis.set_xscale)
    _log(axis.yaxis, axis.set_yscale)
    axis.set_xlabel("seconds by the roofline: bytes at the copy's rate, FLOP at the product's")
    axis.set_ylabel("seconds measured")
    axis.legend(fontsize=8)
    return figure


def time_growth(report: Report) -> Figure | None:
    return _growth(report, "seconds", "seconds")


def memory_growth(report: Report) -> Figure | None:
    return _growth(report, "peak_bytes", "peak bytes")


def _growth(report: Report, key: str, label: str) -> Figure | None:
    sweeps = [s for s in report.get("growth", []) if any(p[key] > 0 for p in s["points"])]
    if not sweeps:
        return None
    figure = Figure(figsize=(6.2, 4.2))
    axis = figure.subplots()
    for sweep, colour in zip(sweeps, COLOURS, strict=False):
        points = [(p["value"], p[key]) for p in sweep["points"] if p[key] > 0]
        power = f", power {sweep['exponent']:.2f}" if key == "seconds" else ""
        axis.plot(
            *zip(*points, strict=True) if points else ((), ()),
            marker="o",
            markersize=4,
            color=colour,
            label=f"{sweep['op']} over {sweep['size'].partition(',')[0]}{power}",
        )
    _log(axis.xaxis, axis.set_xscale)
    _log(axis.yaxis, axis.set_yscale)
    axis.set_xlabel("size")
    axis.set_ylabel(label)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def errors(report: Report) -> Figure | None:
    """The worst error of each case as a share of trajkern's budget."""
    cases = [case for case in report["cases"] if any(case["gate"].get(OURS, {}).get("shares", {}).values())]
    if not cases:
        return None
    figure = Figure(figsize=(7.2, 0.9 + 0.36 * len(cases)))
    axis = figure.subplots()
    axis.margins(y=0.5 / len(cases))
    for name, colour in zip((OURS, "eager"), COLOURS, strict=False):
        shares = [
            (row, max(case["gate"].get(name, {}).get("shares", {}).values(), default=0.0))
            for row, case in enumerate(cases)
        ]
        scale = 1.0 if name == OURS else RIVAL_BUDGET
        shown = [(row, scale * share) for row, share in shares if share > 0]
        axis.scatter([share for _, share in shown], [row for row, _ in shown], s=26, color=colour, label=name, zorder=3)
    axis.axvline(1, color=INK, linewidth=1.2)
    axis.set_yticks(range(len(cases)), [_label(case) for case in cases], fontsize=7)
    axis.invert_yaxis()
    _log(axis.xaxis, axis.set_xscale)
    axis.grid(axis="y", color=INK, alpha=0.18)
    axis.set_xlabel("worst error against float64, as a share of what trajkern is allowed (the line)")
    axis.legend(ncols=2, loc="lower left", bbox_to_anchor=(-0.4, 1.0), fontsize=8, handletextpad=0.1)
    return figure


def _log(axis: Any, scale: Callable[[str], None]) -> None:
    scale("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


PICTURES: dict[str, tuple[Callable[[Report], Figure | None], str]] = {
    "overview": (overview, "Everybody else's time as a multiple of trajkern's, in one case an op."),
    "ratios": (ratios, "The same in every case."),
    "roofline": (roofline, "How far each case is above the fastest that this machine could be: the line."),
    "time": (time_growth, "Time against size."),
    "memory": (memory_growth, "Peak memory against size."),
    "errors": (errors, "Errors against the float64 reference. Cases without an error are not shown."),
}
