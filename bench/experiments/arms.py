"""The arms of a comparison: runs of the trainer from one warm-up, and the figures each ends with."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trajkern.trainer.config import parse
from trajkern.trainer.train import train


def run_arms(
    folder: Path, arms: dict[str, str], seed: int, *, share_warm_up: bool = True, show: bool = False
) -> list[dict[str, Any]]:
    """The results of all arms in their order, each under ``folder`` and with its ``arm`` and ``seed``.

    Args:
        folder: where each arm has a folder; a result that lies there already, of the same flags, is read.
        arms: flags of the trainer, by the arm's name.
        seed: of all of them.
        share_warm_up: whether the first arm's warm-up is where the others start.
        show: whether the trainer's own progress is shown.
    """
    results: list[dict[str, Any]] = []
    folders = {arm: folder / f"{_slug(arm)}-seed{seed}" for arm in arms}
    warm_up = folders[next(iter(arms))] / "warmup.safetensors"
    for arm, arm_flags in arms.items():
        flags = f"{arm_flags} --seed {seed}"
        stored = folders[arm] / "result.json"
        result = json.loads(stored.read_text()) if stored.exists() else {}
        if result.get("flags") != flags:
            start = warm_up if share_warm_up and results and warm_up.exists() else None
            result = train_arm(folders[arm], flags, start, show) | {"arm": arm, "seed": seed}
            stored.write_text(json.dumps(result))
        results.append(result)
    return results


def train_arm(folder: Path, flags: str, warm_up: Path | None, show: bool) -> dict[str, Any]:
    """Train with these flags in an emptied folder, and keep the figures and no checkpoint but the warm-up's."""
    for old in folder.glob("*"):
        old.unlink()
    resume = ["--resume", str(warm_up)] if warm_up else []
    config = parse([*resume, *shlex.split(flags), "--out", str(folder)])
    with contextlib.nullcontext() if show else contextlib.redirect_stdout(io.StringIO()):
        done = train(config)
    done.checkpoint.unlink()
    lines = [json.loads(line) for line in done.metrics.read_text().splitlines()]
    samples, clock = config.eval.samples, done.clock
    return {
        "flags": flags,
        "before": figures(asdict(done.before), samples),
        "after": figures(asdict(done.after), samples) | {"tokens": clock.sampled + clock.trained},
        "curve": [[r["step"], r["val_pass@1"]] for r in lines if r["phase"] == "main" and "val_pass@1" in r],
        "steps": done.steps,
        "seconds": done.seconds,
        "clock": vars(clock),
    }


def figures(accuracy: dict[str, Any], samples: int) -> dict[str, Any]:
    """An evaluation's figures by the names that its metrics have."""
    named = {"pass@1": accuracy["pass_at_1"], f"pass@{samples}": accuracy["pass_at_k"], "greedy": accuracy["greedy"]}
    return named | accuracy["details"]


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)
