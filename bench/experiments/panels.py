"""The pictures of the comparison: a panel a row, a colour an arm, all seeds to be seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trajkern._bench.experiments.measures import SPENT, measured
from trajkern._bench.experiments.stored import Row

_COLUMNS, _SIZE, _GRID = 3, (4.6, 3.9), 121
_COLOURS = ("#0b61a4", "#d1495b", "#66a182", "#edae49", "#7d4e9e", "#5c5c5c", "#2ab7ca")
_MARKERS = "osD^vPX"
Runs = list[dict[str, Any]]


def draw(rows: dict[str, Row], verdicts: dict[str, str], path: Path) -> None:
    """Draw the panels of these rows into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(_COLUMNS, len(rows))
    count = math.ceil(len(rows) / columns)
    size = (_SIZE[0] * columns, _SIZE[1] * count)
    figure, axes = pyplot.subplots(count, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(rows) :]:
        axis.remove()
    for axis, (name, row) in zip(axes.flat, rows.items(), strict=False):
        panel = row.comparison.panel
        _KINDS[panel.kind](axis, row)
        if panel.level is not None:
            axis.axhline(panel.level, color="0.4", linewidth=0.8, linestyle=":")
        axis.set_title(f"{name}: {verdicts[name]}", fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
        axis.legend(fontsize=7.5, frameon=False, columnspacing=1.2, handlelength=1.6, **below)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def arms_of(row: Row) -> list[tuple[str, Runs, dict[str, Any]]]:
    """The arms that are drawn: name, results, and how their line looks. Colours are the arm's place in the row."""
    chosen = row.comparison.panel.arms or tuple(row.comparison.arms)
    looks = {arm: (_COLOURS[n % 7], _MARKERS[n % 7]) for n, arm in enumerate(row.comparison.arms)}
    styles = {arm: {"color": colour, "marker": marker, "markersize": 4} for arm, (colour, marker) in looks.items()}
    return [(arm, runs, styles[arm]) for arm in chosen if (runs := list(row.arms[arm].values()))]


def draw_curve(axis: Any, row: Row) -> None:
    """A measure of the validation over steps or tokens, mean and range over seeds; or over another measure."""
    panel = row.comparison.panel
    measure, over = panel.measures[0], panel.over
    for arm, runs, style in arms_of(row):
        points = [
            [(p[over], p[measure]) for p in run["curve"] if p.get(over) is not None and p.get(measure) is not None]
            for run in runs
        ]
        curves = [np.array(some, dtype=float).T for some in points if len(some) > 1]
        if not curves:
            continue
        if over in SPENT:
            _line_and_range(axis, curves, arm, style)
        else:
            shortest = min(curve.shape[1] for curve in curves)
            for x, y in curves:
                axis.plot(x, y, color=style["color"], linewidth=0.6, alpha=0.4)
            axis.plot(*np.mean([curve[:, :shortest] for curve in curves], 0), label=arm, linewidth=1.6, **style)
    axis.set_xlabel({"tokens": "tokens sampled and scored"}.get(over, over), fontsize=8)
    axis.set_ylabel(panel.label or f"validation {measure}", fontsize=8)
    if over == "tokens":
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:.1f}M" if x >= 1e6 else f"{x / 1e3:.0f}k")


def _line_and_range(axis: Any, curves: list[Any], arm: str, style: dict[str, Any]) -> None:
    """The mean over where all curves are, their lowest and highest; markers where the validations are on average."""
    begin, end = max(curve[0, 0] for curve in curves), min(curve[0, -1] for curve in curves)
    grid = np.linspace(begin, end, _GRID)
    every = np.array([np.interp(grid, *curve) for curve in curves])
    marks = max(1, (_GRID - 1) // max(1, min(curve.shape[1] for curve in curves) - 1))
    axis.fill_between(grid, every.min(0), every.max(0), color=style["color"], alpha=0.13, linewidth=0)
    axis.plot(grid, every.mean(0), label=arm, linewidth=1.6, markevery=marks, **style)


def draw_pass_at_k(axis: Any, row: Row) -> None:
    """Held-out pass@k at the end."""
    for arm, runs, style in arms_of(row):
        every = np.array([run["pass_at"] for run in runs])
        ks = np.arange(1, every.shape[1] + 1)
        powers = [k - 1 for k in ks if k & (k - 1) == 0 or k == ks[-1]]
        axis.fill_between(ks, every.min(0), every.max(0), color=style["color"], alpha=0.13, linewidth=0)
        axis.plot(ks, every.mean(0), label=arm, linewidth=1.6, markevery=powers, **style)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_xlabel("k", fontsize=8)
    axis.set_ylabel(row.comparison.panel.label or "held-out pass@k", fontsize=8)


def draw_bars(axis: Any, row: Row) -> None:
    """Figures at the end: the mean with its standard error, and a dot a seed."""
    panel, arms = row.comparison.panel, arms_of(row)
    width = 0.8 / len(arms)
    for place, (arm, runs, style) in enumerate(arms):
        for group, measure in enumerate(panel.measures):
            values = np.array([x for run in runs if (x := measured(run, measure)) is not None])
            if not len(values):
                continue
            at = group + (place - (len(arms) - 1) / 2) * width
            error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
            label = arm if group == 0 else None
            axis.bar(at, values.mean(), width * 0.9, yerr=error, color=style["color"], alpha=0.75, label=label)
            axis.plot(np.full(len(values), at), values, ls="none", marker=".", markersize=4, color="0.15")
    axis.set_xticks(range(len(panel.measures)), panel.measures)
    axis.set_ylabel(panel.label or "held-out, at the end", fontsize=8)


def draw_calibration(axis: Any, row: Row) -> None:
    """How many are right of those answered with a confidence, all seeds together; a marker's area is their share."""
    axis.plot([0, 1], [0, 1], color="0.4", linewidth=0.8, linestyle=":", label="calibrated")
    for arm, runs, style in arms_of(row):
        bins = np.array([run["reliability"] for run in runs if run["reliability"]])
        if not len(bins):
            continue
        counts = bins[..., 0].sum(0)
        means = (bins[..., :1] * bins[..., 1:]).sum(0) / np.maximum(counts, 1)[:, None]
        x, y = means[counts > 0].T
        share = counts[counts > 0] / counts.sum()
        axis.plot(x, y, color=style["color"], linewidth=1.2, label=arm, marker=style["marker"], markersize=4)
        axis.scatter(x, y, s=10 + 350 * share, color=style["color"], alpha=0.3, linewidths=0)
    axis.set_xlabel("stated confidence", fontsize=8)
    axis.set_ylabel(row.comparison.panel.label or "share that is right", fontsize=8)


_KINDS: dict[str, Callable[[Any, Row], None]] = {
    "curve": draw_curve,
    "pass@k": draw_pass_at_k,
    "bars": draw_bars,
    "calibration": draw_calibration,
}
