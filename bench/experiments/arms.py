"""The arms of a comparison: runs of the trainer from one warm-up, and the figures each ends with."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trajkern.trainer.config import Then, TrainConfig, parse
from trajkern.trainer.evaluate import Accuracy
from trajkern.trainer.train import train

WARM_UP = "warm-up"
_END = "warmup.safetensors"  # of the warm-up, as the trainer calls it
_SHARED = ("task", "model", "shots", "questions", "warmup", "eval", "tiny")  # what a warm-up depends on


def run_arms(
    folder: Path,
    arms: dict[str, str],
    seed: int,
    *,
    share_warm_up: bool = True,
    version: str = "",
    show: bool = False,
    failed: Callable[[str, Exception], None] | None = None,
) -> list[dict[str, Any]]:
    """The results of the warm-up, where it is shared, and of all arms in their order.

    Args:
        folder: where each has a folder; a result that lies there already, of the same flags and version, is read.
        arms: flags of the trainer, by the arm's name.
        seed: of all of them.
        share_warm_up: whether the first arm's warm-up is where all start.
        version: of the sources.
        show: whether the trainer's own progress is shown.
        failed: is told of an arm and its error, and the other arms go on; without it the error ends all.

    Raises:
        ValueError: arms that share a warm-up and differ in what it depends on.
    """
    flags = {arm: f"{some} --seed {seed}" for arm, some in arms.items()}
    configs = {arm: parse(shlex.split(some)) for arm, some in flags.items()}
    start = None
    if share_warm_up:
        check_shared(configs)
        first = next(iter(configs))
        flags, configs = {WARM_UP: flags[first], **flags}, {WARM_UP: configs[first], **configs}
        start = folder / f"{_slug(WARM_UP)}-seed{seed}" / _END
    results = []
    for arm, config in configs.items():
        out = folder / f"{_slug(arm)}-seed{seed}"
        about = {"arm": arm, "seed": seed, "flags": flags[arm], "version": version, "started": flags.get(WARM_UP)}
        stored = out / "result.json"
        result = json.loads(stored.read_text()) if stored.exists() else {}
        if any(result.get(key) != value for key, value in about.items()):
            try:
                result = about | run_arm(out, config, arm == WARM_UP, None if arm == WARM_UP else start, show)
            except Exception as error:
                if failed is None:
                    raise
                failed(arm, error)
                if arm == WARM_UP:
                    break
                continue
            stored.write_text(json.dumps(result))
        results.append(result)
    return results


def check_shared(configs: dict[str, TrainConfig]) -> None:
    """Raise ValueError where arms differ in what their warm-up depends on."""
    (first, config), *others = configs.items()
    for arm, other in others:
        for name in _SHARED:
            one, two = getattr(config, name), getattr(other, name)
            if one != two:
                raise ValueError(f"{name} must be {first}'s, {one}, for an arm of the same warm-up; {arm} has {two}")


def run_arm(out: Path, config: TrainConfig, only_warm_up: bool, start: Path | None, show: bool) -> dict[str, Any]:
    """Train in an emptied folder, from the warm-up that ended in ``start`` if there is one; keep the figures."""
    for old in out.glob("*"):
        old.unlink()
    config = dataclasses.replace(config, out=out, resume=start)
    if only_warm_up:
        config = dataclasses.replace(config, steps=0, then=Then())
    began = time.process_time()
    with contextlib.nullcontext() if show else contextlib.redirect_stdout(io.StringIO()):
        done = train(config)
    processor = time.process_time() - began
    done.checkpoint.unlink()
    if not only_warm_up:
        (out / _END).unlink(missing_ok=True)
    lines = [json.loads(line) for line in done.metrics.read_text().splitlines()]
    warm = [line for line in lines if line["phase"] == "warmup"]
    k, clock = config.eval.samples, done.clock
    return {
        "before": figures(done.before, k),
        "after": figures(done.after, k),
        "pass_at": done.after.pass_at,
        "reliability": done.after.reliability,
        "curve": curve(warm[-1:], k) + curve([line for line in lines if line["phase"] in ("main", "then")], k),
        "steps": done.steps,
        "tokens": clock.drawn,
        "sampled": clock.sampled,
        "scored": clock.scored,
        "trained": clock.trained,
        "seconds": clock.sampling + clock.training,
        "warm_up_seconds": 0.0 if start or not warm else warm[-1]["seconds"],
        "elapsed": done.seconds,
        "processor": processor,
    }


def figures(accuracy: Accuracy, samples: int) -> dict[str, float | None]:
    """An evaluation's figures by the names that its metrics have."""
    named = {"pass@1": accuracy.pass_at_1, f"pass@{samples}": accuracy.pass_at_k, "greedy": accuracy.greedy}
    return named | {"distinct": accuracy.distinct} | accuracy.details


def curve(lines: list[dict[str, Any]], samples: int) -> list[dict[str, float | None]]:
    """The validations among these lines of the metrics: measures by name, and the steps, tokens and seconds until then.

    Of the warm-up that is where the main loop begins: nothing is spent yet.
    """
    points = []
    for line in lines:
        if "val_pass@1" in line:
            begun = line["phase"] != "warmup"
            point = {
                "steps": line["step"] * begun,
                "tokens": line["tokens"] * begun,
                "seconds": line["seconds"] * begun,
            }
            measures = {name.removeprefix("val_"): x for name, x in line.items() if name.startswith("val_")}
            measures[f"pass@{samples}"] = measures.pop("pass@k")
            points.append(point | measures)
    return points


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)
