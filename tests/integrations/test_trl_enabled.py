"""Whose methods ``enable`` replaces: the trainer's it was given, or those of trainers that are made after it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern.integrations.trl as adapter
from tests.integrations.trl_trainers import batch, generated, trainer_of, transformers, trl
from trajkern.integrations import _trl_loss


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    for target in list(adapter._enabled):
        adapter.disable(target)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers whose loss trajkern computed."""
    seen: list[Any] = []

    def noted(self: Any, *args: Any) -> Tensor:
        seen.append(self)
        return _trl_loss.grpo_loss(self, *args)

    monkeypatch.setitem(adapter._LOSSES, "GRPOTrainer", noted)
    monkeypatch.setattr(adapter, "check_fit", lambda *_: None)
    return seen


def advantages(trainer: Any) -> list[float]:
    return generated(trainer)["advantages"].tolist()


def loss(trainer: Any) -> float:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return float(trainer._compute_loss(trainer.model, batch()))


class Mine(trl.GRPOTrainer):  # type: ignore[name-defined, misc]
    pass


def made(folder: Path, kind: type, patch: pytest.MonkeyPatch, **options: Any) -> Any:
    with patch.context() as here:
        here.setattr(trl, "GRPOTrainer", kind)
        return trainer_of(folder, beta=0.0, **options)


@pytest.mark.parametrize("before", ["nothing", "itself", "its class"])
def test_a_class_leaves_trainers_made_before_alone(
    before: str, tmp_path: Path, losses: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their loss, advantages and handle stay what they were; those made later have both."""
    if before == "its class":
        adapter.enable(Mine)
    old = made(tmp_path, Mine, monkeypatch, scale_rewards="none")
    theirs = advantages(old)
    handle = adapter.enable(old) if before == "itself" else None
    with adapter.enable(trl.GRPOTrainer, "nsr"):
        new = made(tmp_path, trl.GRPOTrainer, monkeypatch)
        assert advantages(old) == theirs != advantages(new)
        assert handle is None or handle.active
        loss(old), loss(new)
        assert losses == ([] if before == "nothing" else [old]) + [new]
    assert advantages(old) == theirs and len(set(advantages(new))) > 2
    losses.clear()
    loss(old), loss(new)
    assert losses == ([] if before == "nothing" else [old])


def test_a_class_that_is_enabled_anew_leaves_those_between_as_they_are(tmp_path: Path, losses: list[Any]) -> None:
    adapter.enable(trl.GRPOTrainer, "nsr")
    first = trainer_of(tmp_path)
    was = advantages(first)
    adapter.enable(trl.GRPOTrainer, "psr")
    second = trainer_of(tmp_path)
    assert advantages(first) == was != advantages(second)
    adapter.disable(trl.GRPOTrainer)
    adapter.enable(trl.GRPOTrainer, "nsr")
    loss(first), loss(second)
    assert losses == [] and len(set(advantages(first))) > 2
    assert "__init__" in vars(trl.GRPOTrainer) and adapter.enable(trl.GRPOTrainer).active


def test_the_class_furthest_down_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever was enabled first: its line says whose the advantages are."""
    for first, then in (((Mine, None), (trl.GRPOTrainer, "nsr")), ((trl.GRPOTrainer, "nsr"), (Mine, "psr"))):
        handles = [adapter.enable(*first), adapter.enable(*then)]
        trainer = made(tmp_path, Mine, monkeypatch)
        for kind in (Mine, trl.GRPOTrainer):
            found = set(advantages(trainer))
            assert (found <= {0.0, -1.0}) is (kind is trl.GRPOTrainer), (first, kind)
            adapter.disable(kind)
        assert not any(x.active for x in handles) and len(set(advantages(trainer))) > 2
        assert "__init__" not in vars(Mine)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
@pytest.mark.parametrize("by", ["nothing", "trainer", "kept handle", "class", "credit"])
def test_a_trainer_that_nobody_wants_is_kept_by_nobody(by: str, kind: str, tmp_path: Path) -> None:
    head, handles, alive = trl.trainer.utils._ChunkedLogProbFunction, [], []
    if by == "class":
        adapter.enable(getattr(trl, f"{kind}Trainer"))
    for _ in range(2):
        trainer = trainer_of(tmp_path, kind, max_steps=1)
        if by not in ("nothing", "class"):
            handle = adapter.enable(trainer, **{"recipe": "nsr"} if by == "credit" else {})
            handles += [handle] if by == "kept handle" else []
        trainer.train()
        alive += [weakref.ref(trainer), weakref.ref(trainer.model), weakref.ref(trainer.optimizer)]
        del trainer
    handle = None
    gc.collect()
    assert [x() for x in alive] == [None] * 6
    assert not any(x.active for x in handles)
    assert (trl.trainer.utils._ChunkedLogProbFunction is head) is (by != "class")


class Smooth(trl.GRPOTrainer):  # type: ignore[name-defined, misc]
    """Logs something of what is logged, and reads it in one more place."""

    smooth = 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        seen = self._metrics["train" if self.model.training else "eval"].get("entropy")
        if seen:
            self.smooth = logs["smooth"] = 0.9 * self.smooth + 0.1 * seen[-1]
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert all(type(x) is not Tensor for values in self._metrics["train"].values() for x in values)
        super()._save_checkpoint(model, trial)


@pytest.mark.parametrize("which", ["base", "class", "trainer"])
def test_a_subclass_s_log_finds_numbers(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if which != "trainer":
        adapter.enable(trl.GRPOTrainer if which == "base" else Smooth)
    trainer = made(tmp_path, Smooth, monkeypatch, max_steps=2, save_steps=1)
    if which == "trainer":
        adapter.enable(trainer)
    trainer.args.save_strategy = transformers.trainer_utils.SaveStrategy.STEPS
    trainer.state.save_steps = 1
    trainer.train()
    logged = [x["smooth"] for x in trainer.state.log_history if "smooth" in x]
    assert logged and {type(x) for x in logged} == {float}


def test_a_copy_is_a_trainer_of_its_own(tmp_path: Path, losses: list[Any]) -> None:
    trainer = trainer_of(tmp_path, beta=0.0)
    before = type(trainer), loss(trainer)
    adapter.enable(trainer, "nsr")
    shallow, deep = copy.copy(trainer), copy.deepcopy(trainer)
    for other in (shallow, deep):
        other.loss_type = "dr_grpo"
        assert loss(other) != pytest.approx(before[1], rel=1e-3)
        assert losses == [other]
        losses.clear()
        adapter.disable(other)
        loss(other)
        assert losses == [] and type(other) is before[0]
    assert loss(trainer) == pytest.approx(before[1], rel=1e-5) and losses == [trainer]
    adapter.enable(deep).disable()
    adapter.disable(trainer)
    assert type(trainer) is type(deep) is before[0] and deep._compute_loss.__func__ is before[0]._compute_loss


class Own(trl.GRPOTrainer):  # type: ignore[name-defined, misc]
    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        return 2 * super()._compute_loss(model, inputs)


def test_a_loss_of_one_s_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path)
    adapter.enable(trainer)
    for name in ("_compute_loss", "log"):
        its_own = getattr(trainer, name)
        setattr(trainer, name, torch.nn.Identity())
        with pytest.raises(TypeError, match=f"must have its class's {name}; this GRPOTrainer has one of its own"):
            adapter.enable(trainer)
        setattr(trainer, name, its_own)  # as who patches restores it
        assert adapter.enable(trainer).active and name not in vars(trainer)
    bound = trainer.log
    adapter.disable(trainer)
    bound({})
    adapter.enable(trl.GRPOTrainer)
    with pytest.raises(TypeError, match="trainer_or_class must have GRPOTrainer's loss; Own has one of its own"):
        made(tmp_path, Own, monkeypatch)
