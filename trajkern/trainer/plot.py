"""The learning curve of a run, drawn from its metrics file."""

from __future__ import annotations

import io
import json
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


def plot(metrics: Path, path: Path, title: str) -> None:
    """Draw validation accuracy and reward over the steps of both phases, and held-out accuracy before and after."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(9, 4), sharey=True, width_ratios=(1, 2.2), layout="constrained"
    )
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
    figure.suptitle(title)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    pyplot.close(figure)
    put(path, drawn.getvalue())
