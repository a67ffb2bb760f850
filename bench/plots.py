"""Pictures of a benchmark's results. Text takes the colour of the page around it; lines read on any."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from trajkern._bench import table
from trajkern._bench.case import OURS, RIVAL_BUDGET
from trajkern._bench.run import gemm_rate
from trajkern._bench.table import peers_of

INK = "#808182"  # becomes currentColor
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDE, NARROW = 7.2, 3.6  # inches: of a page, of a phone
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
Draw = Callable[[Report, float], Figure | None]  # at a width in inches; None where there is nothing to show


def svg(draw: Draw, report: Report, width: float = WIDE) -> str:
    """The picture as an <svg> element that scales with the page, or nothing where the report has no data for it."""
    with rc_context(STYLE):
        figure = draw(report, width)
        if figure is None:
            return ""
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def png(draw: Draw, report: Report, width: float = WIDE) -> bytes:
    """The picture on white; empty where the report has no data for it."""
    ink = {name: "#24292f" for name, value in STYLE.items() if value == INK}
    with rc_context({**STYLE, **ink}):
        figure = draw(report, width)
        if figure is None:
            return b""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=144, facecolor="white", bbox_inches="tight")
    return file.getvalue()


def ratios(report: Report, width: float) -> Figure | None:
    """How many times as long as trajkern everybody else takes, on a logarithmic axis."""
    return _ratios(report, [*table.raced(report), *table.tiny(report)], width)


def overview(report: Report, width: float) -> Figure | None:
    """The same for one case an op, and for the calls on a few numbers."""
    return _ratios(report, [*table.overview(report), *table.tiny(report)], width)


def _ratios(report: Report, cases: list[dict[str, Any]], width: float) -> Figure | None:
    names = [*table.contenders_of(report)[1:-1], *peers_of(report)]
    if not cases:
        return None
    figure, axis = _rows(cases, width)
    for i, name in enumerate(names):
        rows = [row for row, case in enumerate(cases) if name in case["seconds"]]
        times = [cases[row]["seconds"][name]["median"] / cases[row]["seconds"][OURS]["median"] for row in rows]
        apart = 0.3 * (i / max(1, len(names) - 1) - 0.5)  # lest equal times hide each other
        if rows:
            _scatter(axis, times, [row + apart for row in rows], i, name)
    few = sum(case["host"] for case in cases)
    if 0 < few < len(cases):
        axis.axhline(len(cases) - few - (0.5 if width >= WIDE else 0.83), color=INK, linewidth=0.8, linestyle=":")
    axis.set_xlabel(
        _broken("times as long as trajkern takes (right of the line: trajkern is faster)", width)
        + "\n" * (0 < few < len(cases))
        + _broken("below the dotted line: what a call on a few numbers costs", width) * (0 < few < len(cases))
    )
    _legend(axis, width)
    return figure


def _rows(cases: list[dict[str, Any]], width: float) -> tuple[Figure, Any]:
    """An axis with a line at 1 and a row a case, named beside it or, where it is narrow, above."""
    narrow, count = width < WIDE, len(cases)
    height = 0.55 if narrow else 0.36
    figure = Figure(figsize=(width, 0.9 + height * count))
    axis = figure.subplots()
    axis.set_ylim(count - 0.5, -0.5 - 0.3 * narrow)
    labels = [f"{case['op']}, {case['work']}\n{case['shape']}" for case in cases]
    axis.set_yticks(range(count), [""] * count if narrow else labels, fontsize=7)
    for row, label in enumerate(labels if narrow else ()):
        axis.text(0.01, row - 0.26, label, transform=axis.get_yaxis_transform(), fontsize=6.5, va="bottom")
    axis.axvline(1, color=INK, linewidth=1.2)
    _log(axis.xaxis, axis.set_xscale)
    axis.grid(axis="y", color=INK, alpha=0.18)
    return figure, axis


def _scatter(axis: Any, xs: list[float], ys: list[Any], i: int, name: str) -> None:
    """A contender's points, told from the others by shape and by colour."""
    axis.scatter(xs, ys, s=26, color=COLOURS[i % 8], marker=MARKERS[i % 8], label=name, zorder=3)


def _legend(axis: Any, width: float, columns: int = 4) -> None:
    """Above the axis."""
    narrow = width < WIDE
    left = 0 if narrow else -0.4
    options = {"fontsize": 7 if narrow else 8, "handletextpad": 0.1, "columnspacing": 1.0}
    axis.legend(ncols=3 if narrow else columns, loc="lower left", bbox_to_anchor=(left, 1.0), **options)


def _broken(text: str, width: float) -> str:
    return text if width >= WIDE else "\n".join(textwrap.wrap(text, 46))


def roofline(report: Report, width: float) -> Figure | None:
    """Measured time against what the measured copy bandwidth and matrix product rate allow."""
    cases = table.timed(report)
    if not cases:
        return None
    copy, gemm = report["ceilings"]["copy_bytes_per_second"], gemm_rate(report["ceilings"])
    figure = Figure(figsize=(min(width, 6.2), 4.2))
    axis = figure.subplots()
    ends = []
    for i, family in enumerate(dict.fromkeys(case["family"] for case in cases)):
        members = [case for case in cases if case["family"] == family]
        least = [max(case["bytes"] / copy, case["flops"] / gemm) for case in members]
        took = [case["seconds"][OURS]["median"] for case in members]
        _scatter(axis, least, took, i, family)
        ends += [*least, *took]
    line = (min(ends) / 2, max(ends) * 2)
    axis.plot(line, line, color=INK, linewidth=1.2)
    _log(axis.xaxis, axis.set_xscale)
    _log(axis.yaxis, axis.set_yscale)
    axis.set_xlabel(_broken("seconds by the roofline: bytes at the copy's rate, FLOP at the product's", width))
    axis.set_ylabel("seconds measured")
    axis.legend(fontsize=8)
    return figure


def time_growth(report: Report, width: float) -> Figure | None:
    return _growth(report, "seconds", "seconds", width)


def memory_growth(report: Report, width: float) -> Figure | None:
    return _growth(report, "peak_bytes", "peak bytes", width)


def _growth(report: Report, key: str, label: str, width: float) -> Figure | None:
    """A panel a sweep, each over the size that grows in it."""
    sweeps = [s for s in report.get("growth", []) if any(p[key] > 0 for p in s["points"])]
    if not sweeps:
        return None
    columns = min(len(sweeps), 1 if width < WIDE else 3)
    rows = -(-len(sweeps) // columns)
    figure = Figure(figsize=(width if columns > 1 else NARROW, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(sweeps) :]:
        panel.set_visible(False)
    for i, (sweep, panel) in enumerate(zip(sweeps, panels, strict=False)):
        xs, ys = zip(*((p["value"], p[key]) for p in sweep["points"] if p[key] > 0), strict=True)
        panel.plot(xs, ys, marker=MARKERS[i % 8], markersize=4, color=COLOURS[i % 8])
        _log(panel.xaxis, panel.set_xscale)
        _log(panel.yaxis, panel.set_yscale)
        panel.set_xticks(xs, [_short(x) for x in xs], fontsize=7)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(axis="y", labelsize=7)
        panel.set_xlabel(sweep["size"], fontsize=7)
        panel.set_title(sweep["op"] + f"\npower {sweep['exponent']:.2f}" * (key == "seconds"), fontsize=8)
        if i % columns == 0:
            panel.set_ylabel(label, fontsize=8)
    return figure


def _short(count: int) -> str:
    """16k, 1M: sizes are powers of two."""
    for unit, one in (("M", 2**20), ("k", 2**10)):
        if count >= one:
            return f"{count / one:.3g}{unit}"
    return str(count)


def errors(report: Report, width: float) -> Figure | None:
    """The worst error of each case as a share of trajkern's budget."""
    cases = [case for case in report["cases"] if any(case["gate"].get(OURS, {}).get("shares", {}).values())]
    if not cases:
        return None
    figure, axis = _rows(cases, width)
    for i, name in enumerate((OURS, *report.get("own", ()), "eager")):
        shares = [
            (row, max(case["gate"].get(name, {}).get("shares", {}).values(), default=0.0))
            for row, case in enumerate(cases)
        ]
        scale = 1.0 if name == OURS else RIVAL_BUDGET
        shown = [(row, scale * share) for row, share in shares if share > 0]
        _scatter(axis, [share for _, share in shown], [row for row, _ in shown], i, name)
    axis.set_xlabel(_broken("worst error against float64, as a share of what trajkern is allowed (the line)", width))
    _legend(axis, width)
    return figure


def _log(axis: Any, scale: Callable[[str], None]) -> None:
    scale("log")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


PICTURES: dict[str, tuple[Draw, str]] = {
    "overview": (
        overview,
        "Everybody's time as a multiple of trajkern's: a case an op, then calls on few numbers.",
    ),
    "ratios": (ratios, "The same in every case."),
    "roofline": (roofline, "How far each case is above the fastest that this machine could be: the line."),
    "time": (time_growth, "Time against size, each op over its own."),
    "memory": (memory_growth, "Peak memory against size, each op over its own."),
    "errors": (errors, "Errors against the float64 reference. Cases without an error are not shown."),
}
