"""What came of a run, and how it is told."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from trajkern.trainer.config import TrainConfig
from trajkern.trainer.evaluate import Accuracy
from trajkern.trainer.place import Clock


class Result(NamedTuple):
    """Held-out accuracy after the warm-up and at the end, the speed, and the files left behind."""

    before: Accuracy | None  # where the run measured it as it does the end's
    after: Accuracy
    steps: int
    seconds: float
    clock: Clock
    curve: Path | None  # where it could be drawn
    metrics: Path
    checkpoint: Path


def summary(config: TrainConfig, result: Result) -> str:
    """A table of the accuracies, the speed, and where everything lies."""
    k = config.eval.samples
    sampled, trained = result.clock.rates
    start = "after warm-up" if config.warmup.steps else "before"
    rows = [(start, result.before), (f"after {result.steps} steps of {config.label}", result.after)]
    width = max(len(name) for name, _ in rows)
    lines = [
        "",
        f"{config.task}, seed {config.seed}: {config.eval.heldout} held-out questions, {k} samples each",
        f"{'':{width}}  {'pass@1':>7}  {f'pass@{k}':>7}  {'greedy':>7}",
        *(f"{name:{width}}  {shown(accuracy)}" for name, accuracy in rows),
        f"tokens per second: {sampled:,.0f} sampled, {trained:,.0f} trained; {result.seconds:.0f} s in all",
        *detail_lines(result.before, result.after),
        *shared_line(result.clock),
        *([f"curve       {result.curve}"] if result.curve else []),
        f"metrics     {result.metrics}",
        f"checkpoint  {result.checkpoint}",
    ]
    return "\n".join(lines)


def shown(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "  ".join([f"{'-':>7}"] * 3)
    return f"{accuracy.pass_at_1:7.3f}  {accuracy.pass_at_k:7.3f}  {accuracy.greedy:7.3f}"


def detail_lines(before: Accuracy | None, after: Accuracy) -> list[str]:
    """What the task reports besides accuracy."""
    lines = []
    for name in (name for name in after.details if not name.startswith("pass@")):
        values = [before and before.details.get(name), after.details[name]]
        lines.append(f"{name}: {' -> '.join('-' if x is None else f'{x:.3f}' for x in values)}")
    return lines


def shared_line(clock: Clock) -> list[str]:
    if not clock.shared:
        return []
    share = clock.shared / clock.trained
    return [f"shared prefixes: {clock.shared:,} of {clock.trained:,} tokens ({share:.0%}) were not computed again"]
