"""The chart of ``trajkern bench --memory``: bytes against tokens, predicted, and measured beside the formula."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from trajkern._bench.head_memory import FORMS, GPUS, MODELS, Sizes, longest, whole
from trajkern._bench.plots import COLOURS, INK

TOKENS = [1024 * 2 ** (i / 4) for i in range(37)]  # 1k to 512k
GIB = 2**30


def draw(report: dict[str, Any], width: float = 9.6) -> Figure:
    """A panel a model, and one of the measured peaks."""
    figure = Figure(figsize=(width, width / 1.5), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    colours = dict(zip(FORMS, (COLOURS[3], COLOURS[1], COLOURS[4], COLOURS[0]), strict=True))
    for axis, (name, model) in zip(axes, MODELS.items(), strict=False):
        for form, colour in colours.items():
            most = ", ".join(f"{longest(form, model, memory) // 1024}k" for memory in GPUS.values())
            held = [whole(form, model, int(n)) / GIB for n in TOKENS]
            axis.plot(TOKENS, held, color=colour, label=f"{form}: {most}", linewidth=1.8)
        for label, memory in GPUS.items():
            axis.axhline(memory / GIB, color=INK, linewidth=1, linestyle="--")
            axis.text(TOKENS[0], memory / GIB * 1.06, label, fontsize=7, color=INK)
        axis.set_title(f"{name}: {model.width:,} × {model.vocabulary:,}, {model.layers} layers", fontsize=9)
        axis.set_ylabel("GiB, predicted, bfloat16")
        axis.set_ylim(2, 400)
        axis.legend(fontsize=7, title="tokens in 80 and in 141 GB", title_fontsize=7, loc="lower right")
        _scales(axis)
    _measured(axes[3], report, colours)
    return figure


def _measured(axis: Any, report: dict[str, Any], colours: dict[str, str]) -> None:
    """Of the first model: points, and the formula's line through them."""
    name = next(iter(MODELS))
    for form, points in report["points"].items():
        own = [p for p in points if p["model"] == name]
        if not own:
            continue
        at = [p["tokens"] for p in own]
        axis.scatter(at, [p["peak_bytes"] / 2**20 for p in own], s=26, color=colours[form], zorder=3)
        first = {k: own[0][k] for k in Sizes._fields}
        line = [at[0] * (at[-1] / at[0]) ** (i / 24) for i in range(25)]
        predicted = [FORMS[form](Sizes(**{**first, "tokens": int(n)})) / 2**20 for n in line]
        axis.plot(line, predicted, color=colours[form], linewidth=1.2)
    where = report["machine"].get("gpu") or "resident memory of a CPU"
    shrunk = "" if report["scale"] == 1 else f", sizes over {report['scale']}"
    axis.set_title(f"measured (points) and formula (lines): {name}{shrunk}", fontsize=9)
    axis.set_ylabel(f"MiB beyond inputs, {where}", fontsize=8)
    _scales(axis)


def _scales(axis: Any) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
    axis.set_xlabel("tokens of a batch")
    axis.grid(color=INK, alpha=0.18)
