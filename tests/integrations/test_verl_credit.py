"""Credits in verl's trainers: the same as by hand, in both trainers; what leaves the loss leaves its normaliser."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations.verl_batches import Queue, Rollout, by_hand, config_of, padded, rollouts_of
from trajkern import credit
from trajkern.integrations import verl as adapter

SPEC = (credit.outcome() + 0.5 * credit.spans("turn") + 0.25 * credit.spans("call")).gate("well_formed")
NAME = "trajkern_credit"


@pytest.fixture
def trainers(verl_trainers):
    """verl's trainers; what a test registers is taken back."""
    yield verl_trainers
    adapter.unregister()


@pytest.fixture
def queue(trainers, monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(trainers.v1, "tq", queue)
    return queue


def legacy(trainers, data: Any, name: str = NAME, config: Any = None) -> Any:
    config = config_of(name) if config is None else config
    return trainers.legacy.compute_advantage(data, adv_estimator=name, config=config.algorithm)


def v1(trainers, batch: Any, name: str = NAME, config: Any = None, tokenizer: Any = None) -> dict[str, float]:
    metrics: dict[str, float] = {}
    config = config_of(name) if config is None else config
    trainer = SimpleNamespace(config=config, tokenizer=tokenizer)
    trainers.v1.PPOTrainer._compute_advantage(trainer, batch, metrics=metrics)
    return metrics


def unpadded(rollouts: list[Rollout], x: torch.Tensor) -> list[list[float]]:
    return [row[: len(of.mask)].tolist() for row, of in zip(x, rollouts, strict=True)]


def close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(x) for x in found] == [len(x) for x in expected]
    for x, y in zip(found, expected, strict=True):
        assert x == pytest.approx(y, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_by_hand_in_the_legacy_trainer(trainers, seed: int) -> None:
    adapter.register(credit=SPEC)
    rollouts = rollouts_of(seed)
    advantages, learns = by_hand(rollouts, turns=0.5, calls=0.25)
    data = legacy(trainers, padded(rollouts))
    close(unpadded(rollouts, data.batch["advantages"]), advantages)
    assert torch.equal(data.batch["returns"], data.batch["advantages"])
    assert data.batch["response_mask"].dtype == torch.int64
    assert unpadded(rollouts, data.batch["response_mask"]) == learns
    assert 0 < sum(map(sum, learns)) < sum(sum(x.mask) for x in rollouts)


@pytest.mark.parametrize("seed", range(3))
def test_by_hand_in_the_default_trainer(trainers, queue: Queue, seed: int) -> None:
    adapter.register(credit=SPEC)
    rollouts = rollouts_of(seed)
    advantages, learns = by_hand(rollouts, turns=0.5, calls=0.25)
    metrics = v1(trainers, queue.put_rollouts(rollouts))
    close(queue.column(rollouts, "advantages"), advantages)
    assert queue.column(rollouts, "returns") == queue.column(rollouts, "advantages")
    for name in ("response_mask", "loss_mask"):
        assert queue.column(rollouts, name) == learns
    kept = sum(x.extra["reward_extra_info"]["well_formed"] for x in rollouts)
    assert metrics["credit/kept"] == pytest.approx(kept / len(rollouts))
    assert {"credit/outcome/mean", "credit/spans:turn/std", "credit/spans:call/mean"} <= metrics.keys()
