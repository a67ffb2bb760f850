"""The trainer's configuration: a frozen dataclass, every field a flag and a TOML key."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import trajkern as tk
from trajkern.trainer.extras import require
from trajkern.trainer.model import ModelConfig

PROGRAM = "trajkern train"


@dataclass(frozen=True)
class WarmUp:
    """Supervised training on demonstrations, stopped by a validation band.

    Args:
        steps: most optimiser steps; 0 skips the warm-up.
        batch: demonstrations a step.
        lr: learning rate after a ramp of 20 steps.
        demonstrations: questions whose answers are shown.
        check_every: steps between validations.
        pass_at_1: validation pass@1 that ends the warm-up.
        pass_at_k: validation pass@k that it needs as well.
    """

    steps: int = 600
    batch: int = 128
    lr: float = 4e-3
    demonstrations: int = 2000
    check_every: int = 20
    pass_at_1: float = 0.25
    pass_at_k: float = 0.5


@dataclass(frozen=True)
class Evaluation:
    """Questions never trained on.

    Args:
        heldout: questions of the reported accuracy, before and after.
        validation: questions of the curve and of the warm-up's end.
        samples: completions of a question; the k of pass@k.
        every: steps between validations in the main loop.
    """

    heldout: int = 512
    validation: int = 256
    samples: int = 8
    every: int = 25


@dataclass(frozen=True)
class TrainConfig:
    """Warm a small language model up on a reasoning task, then train it by
    reinforcement learning with trajkern's ops.

    Args:
        task: a reasoning-gym task; an unknown name lists them.
        model: "tiny" (the built-in transformer), "smollm2" (SmolLM2-135M-Instruct),
            or the path of a HuggingFace folder or a .gguf file.
        recipe: how rewards become advantages.
        control: "none" trains; "random-rewards" deals each group's rewards to its
            rollouts at random; "supervised" spends the same compute on more warm-up.
        seed: decides questions, weights and samples.
        steps: batches of rollouts.
        prompts: questions (groups) a step.
        rollouts: completions of each question.
        updates: optimiser steps on each batch.
        temperature: of sampling and of the loss.
        max_new: most tokens of a completion; by default the longest answer's.
        lr: learning rate, decaying to a tenth.
        questions: training questions to draw from.
        time_limit: seconds after which no further step starts.
        threads: torch threads; by default one a physical core.
        reference: run every op as plain torch.
        out: folder of the results; by default a new one under runs/.
        checkpoint_every: steps between checkpoints; 0 for the last one only.
        tensorboard: folder for TensorBoard event files.
        resume: checkpoint to continue from, with its configuration.
        config: TOML file with any of these settings; flags override it.
        loss: see trajkern.PolicyLoss.
        warmup: the supervised start.
        eval: how accuracy is measured.
        tiny: sizes of the built-in transformer.
    """

    task: str = "chain_sum"
    model: str = "tiny"
    recipe: str = "grpo"
    control: Literal["none", "random-rewards", "supervised"] = "none"
    seed: int = 0
    steps: int = 300
    prompts: int = 64
    rollouts: int = 8
    updates: int = 1
    temperature: float = 1.0
    max_new: int | None = None
    lr: float = 5e-4
    questions: int = 20_000
    time_limit: float = 240.0
    threads: int | None = None
    reference: bool = False
    out: Path | None = None
    checkpoint_every: int = 100
    tensorboard: Path | None = None
    resume: Path | None = None
    config: Path | None = None
    loss: tk.PolicyLoss = field(default_factory=tk.PolicyLoss)
    warmup: WarmUp = field(default_factory=WarmUp)
    eval: Evaluation = field(default_factory=Evaluation)
    tiny: ModelConfig = field(default_factory=ModelConfig)
