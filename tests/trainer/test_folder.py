"""A folder of results belongs to its run: who may go on in it, and from which of its checkpoints."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from trajkern._bench.reliability.runs import difference
from trajkern.trainer import train as training
from trajkern.trainer.checkpoint import CHECKPOINT, WARM, load, newest
from trajkern.trainer.config import Evaluation, TrainConfig, WarmUp, parse
from trajkern.trainer.folder import METRICS

Make = Callable[..., TrainConfig]
LEAN = {"steps": 3, "checkpoint_every": 0, "warmup": WarmUp(steps=4, batch=8, demonstrations=16, lr=1e-2)}
LEAN |= {"prompts": 4, "questions": 100, "eval": Evaluation(heldout=4, validation=4, samples=2, every=2)}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


HELD = [(CHECKPOINT,), (WARM,), (CHECKPOINT, WARM)]


@pytest.mark.parametrize(
    ("start", "held"), [*product(("new", "elsewhere", "renamed"), HELD), ("older", HELD[-1])], ids=str
)
def test_a_run_is_not_lost_to_another(config: Make, tmp_path: Path, held: tuple[str, ...], start: str) -> None:
    """Whichever of its checkpoints a folder holds, and whatever would begin there."""
    run = training.train(config("run", **LEAN)).checkpoint.parent
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (run / "mine.safetensors").write_bytes((run / CHECKPOINT).read_bytes())
    for name in {CHECKPOINT, WARM} - {*held}:
        (run / name).unlink()
    resume = {"new": None, "elsewhere": other / CHECKPOINT, "renamed": run / "mine.safetensors", "older": run / WARM}
    before = contents(run)
    with pytest.raises(ValueError, match=f"^out must be a new folder.*{re.escape(str(run))} already holds {held[0]}"):
        training.train(config("run", resume=resume[start], **LEAN))
    assert contents(run) == before


@pytest.mark.parametrize("name", [CHECKPOINT, WARM])
def test_what_goes_on_elsewhere_is_resumed_whenever_it_is_killed(
    config: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes = {**LEAN, "steps": 5, "lr": 1e-3}
    start = training.train(config("run", **LEAN)).checkpoint.with_name(name)
    whole = training.train(config("whole", resume=start, **changes)).checkpoint.parent

    def killed(run: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "policy_step", killed)
        training.train(config("parts", resume=start, **changes))
    parts = whole.with_name("parts")
    assert not difference(training.train(parse(["--resume", "last", "--out", str(parts)])).checkpoint.parent, whole)


def test_the_newest_checkpoint_is_not_told_by_the_files_times(config: Make) -> None:
    run = training.train(config("run", **LEAN)).checkpoint.parent
    os.utime(run / CHECKPOINT, (0, 0))
    assert newest(run) == run / CHECKPOINT
    longer = training.train(parse(["--resume", "last", "--out", str(run), "--steps", "4"]))
    assert load(longer.checkpoint).place["step"] == 4
    assert [line.count('"main"') for line in (run / METRICS).read_text().splitlines()].count(1) == 4
    (run / CHECKPOINT).write_bytes(b"cut")
    with pytest.raises(ValueError, match=f"{CHECKPOINT} is damaged"):
        newest(run)
    (run / CHECKPOINT).unlink()
    assert newest(run) == run / WARM
    (run / WARM).unlink()
    assert newest(run) is None
