"""A run small enough to repeat: one narrow layer, a few questions, a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="the trainer's extra is not installed")

from trajkern.trainer.config import Evaluation, TrainConfig, WarmUp
from trajkern.trainer.model import ModelConfig

SMALL = ModelConfig(layers=1, width=32, heads=2, ffn=64)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(out: str = "run", **changes) -> TrainConfig:
        settings = {
            "task": "chain_sum",
            "steps": 6,
            "prompts": 16,
            "rollouts": 4,
            "questions": 300,
            "threads": 1,
            "out": tmp_path / out,
            "checkpoint_every": 2,
            "warmup": WarmUp(steps=40, batch=32, lr=1e-2, demonstrations=256, check_every=20),
            "eval": Evaluation(heldout=16, validation=8, samples=4, every=3),
            "tiny": SMALL,
        }
        return TrainConfig(**(settings | changes))

    return make
