"""The learning curve of a run, drawn from its metrics file."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

from trajkern._files import put
from trajkern.trainer.optional import require

_WINDOW = 20  # steps the reward is averaged over


def _series(records: list[dict[str, Any]], phase: str, name: str) -> tuple[list[int], list[float]]:
    points = [(r["step"], r[name]) for r in records if r["phase"] == phase and r.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> list[float]:
    windows = (values[max(0, i - _WINDOW + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot(metrics: Path, path: Path, title: str) -> str:
    """Draw validation accuracy and reward over the steps of both phases, and held-out accuracy before and after; where
    that cannot be drawn, why: it costs no run its end. Raises OSError where the file cannot be written."""
    try:
        drawn = drawing(metrics, title)
    except Exception as error:  # of a library that reads settings and fonts of the user's
        words = " ".join(str(error).split())
        return f"{type(error).__name__}: {words}" if words else type(error).__name__
    put(path, drawn)
    return ""


def drawing(metrics: Path, title: str) -> bytes:
    """The picture, with the library's own settings: the user's may ask for what is not there."""
    library = require("matplotlib")
    with library.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that the font lacks
        library.rcdefaults()
        return _drawn(metrics, "".join(x if x.isprintable() else ascii(x)[1:-1] for x in title))


def _drawn(metrics: Path, title: str) -> bytes:
    figure = require("matplotlib.figure").Figure(figsize=(9, 4), layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 2.2))
    for axis, phase in ((left, "warmup"), (right, "main")):
        for name, colour in (("val_pass@1", "C0"), ("val_pass@k", "C1")):
            axis.plot(*_series(records, phase, name), color=colour, marker=".", label=f"validation {name[4:]}")
        axis.set_xlabel(f"{phase} step")
        axis.grid(alpha=0.3)
    steps, rewards = _series(records, "main", "reward")
    right.plot(steps, _smooth(rewards), color="C2", lw=1, label=f"reward, mean of {_WINDOW} steps")
    for name, colour in (("pass@1", "C0"), ("pass@k", "C1")):
        right.plot(*_series(records, "heldout", name), color=colour, ls="none", marker="D", label=f"held-out {name}")
    left.set_ylabel("share of questions answered")
    left.set_ylim(0, 1)
    right.legend(fontsize="small", loc="lower right")
    figure.suptitle(title, parse_math=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    return drawn.getvalue()
