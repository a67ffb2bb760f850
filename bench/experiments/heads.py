"""The head that forms the logits beside the one that does not: time and memory of a training step."""

from __future__ import annotations

import contextlib
import statistics
from functools import partial
from typing import Any

import torch

from trajkern._bench.memory import peak_bytes
from trajkern._bench.timing import Call, WallClock, race
from trajkern.trainer.run import Run
from trajkern.trainer.update import policy_term

HEADS = ("eager", "fused")
ROUNDS = (5, 5)


def compare(run: Run) -> list[str]:
    """A line a head: forward and backward of the last batch that the run trained, none where it trained nothing.

    The median time and, where the system tells (Linux, a GPU), the most memory beyond what is held before.
    """
    if run.last is None:
        return []
    device = run.ranks.device.type
    clock = WallClock(torch.cuda.synchronize) if device == "cuda" else WallClock()
    steps: dict[str, Call] = {head: partial(_step, run, run.last, head) for head in HEADS}
    samples = race(steps, clock, seconds=0.0, rounds=ROUNDS)
    lines = []
    for head, step in steps.items():
        line = f"{head:5} head on the last batch, model included: {1e3 * statistics.median(samples[head]):.1f} ms"
        with contextlib.suppress(OSError):
            line += f", {peak_bytes(step, device) / 2**20:.0f} MiB at its peak"
        lines.append(line)
    return lines


def _step(run: Run, batch: Any, head: str) -> None:
    loss, _ = policy_term(run, batch.lesson, batch.pairs, None, head, batch.fixed)
    loss.backward()
