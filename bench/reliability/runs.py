"""Runs that are started, stopped and compared."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from trajkern.trainer import cli_main
from trajkern.trainer.checkpoint import CHECKPOINT, load
from trajkern.trainer.folder import METRICS

TIMED = ("seconds", "tokens/s")


def started(arguments: list[str], log: Path) -> int:
    """The process id of a run that is a fork of this one, which has imported everything and computed nothing."""
    if child := os.fork():
        return child
    status = 1
    try:
        status = run(arguments, log)
    finally:
        os._exit(status)


def run(arguments: list[str], log: Path) -> int:
    """The status of a run in this process, whose words go to ``log``."""
    out, kept = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), (os.dup(1), os.dup(2))
    os.dup2(out, 1), os.dup2(out, 2)
    try:
        return cli_main(arguments)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for place, old in enumerate(kept, start=1):
            os.dup2(old, place)
            os.close(old)
        os.close(out)


def ended(child: int) -> int:
    """Its exit status; minus a signal's number, where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(out: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What a run has left: every line of its metrics, but for what they say of time, and its last tensors."""
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in TIMED} for x in lines], load(out / CHECKPOINT).tensors


def difference(out: Path, expected: Path) -> str:
    """How a run differs from another; empty, where no bit does."""
    (lines, tensors), (lines_, tensors_) = whole(out), whole(expected)
    if lines != lines_:
        return f"its metrics, of {len(lines)} lines against {len(lines_)}"
    different = [k for k in tensors_ if k not in tensors or not torch.equal(tensors[k], tensors_[k])]
    return f"the tensors {', '.join(different)}" if different or tensors.keys() != tensors_.keys() else ""


def teaches(out: Path, steps: int) -> bool:
    """Whether as many of a run's steps have moved the policy: else nothing is told by what resumes."""
    return sum(x.get("grad_norm", 0) > 0 for x in whole(out)[0] if x["phase"] == "main") >= steps
