"""The trainer's configuration: a frozen dataclass, every field a flag and a TOML key."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import trajkern as tk
from trajkern.trainer.checkpoint import load
from trajkern.trainer.compose import Compose
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.optional import require
from trajkern.trainer.schema import conform
from trajkern.trainer.systems import SYSTEMS
from trajkern.trainer.tree_sampling import TreeShape

PROGRAM = "trajkern train"
Control = Literal["none", "random-rewards", "random-drop", "supervised"]
Head = Literal["fused", "eager"]
T = TypeVar("T")


@dataclass(frozen=True)
class WarmUp:
    """Supervised training on demonstrations, stopped by a validation band.

    Args:
        steps: most optimiser steps; 0 skips the warm-up.
        batch: demonstrations a step.
        lr: learning rate after a ramp of 20 steps.
        weight_decay: AdamW's; by default the task's own number.
        demonstrations: questions whose answers are shown; by default the task's own number.
        check_every: steps between validations.
        pass_at_1: validation pass@1 that ends the warm-up.
        pass_at_k: validation pass@k that it needs as well.
    """

    steps: int = 400
    batch: int = 128
    lr: float = 4e-3
    weight_decay: float | None = None
    demonstrations: int | None = None
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
class Then:
    """A second recipe, which goes on where the first has taken its steps, with a fresh optimiser and no control.

    Args:
        recipe: as ``recipe``; by default there is none.
        steps: batches of rollouts.
        lr: learning rate, decaying to a tenth; by default the first's.
        prompts: questions a step; by default the first's.
        credit: as ``credit``.
    """

    recipe: str | None = None
    steps: int = 0
    lr: float | None = None
    prompts: int | None = None
    credit: str | None = None

    def __post_init__(self) -> None:
        if self.recipe is None and (self.steps or self.lr or self.prompts or self.credit):
            raise ValueError(f"then.recipe must be given for other settings of then, got {self}")
        if self.recipe is not None and self.steps < 1:
            raise ValueError(f"then.steps must be at least 1 for then.recipe {self.recipe!r}, got {self.steps}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"then.lr must be above 0, got {self.lr}")
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"then.prompts must be at least 1, got {self.prompts}")


def with_tables_of_recipes(cls: type[T]) -> type[T]:
    """Give a class, before it becomes a dataclass, a field for the settings of each recipe that has some."""
    for recipe, system in SYSTEMS.items():
        if system.settings_type:
            cls.__annotations__[recipe] = system.settings_type
            setattr(cls, recipe, field(default_factory=system.settings_type))
    return cls


@dataclass(frozen=True)
@with_tables_of_recipes
class TrainConfig:
    """Train a small language model on a reasoning task with trajkern's ops.

    Args:
        task: a reasoning-gym task or a game (an unknown name lists them), a .jsonl file of your
            own, or package.module:Class, a subclass of trajkern.trainer.tasks.Task.
        model: "tiny" (the built-in transformer), "smollm2" (SmolLM2-135M-Instruct),
            or the path of a HuggingFace folder or a .gguf file.
        recipe: how rollouts are drawn, and how rewards become advantages; an unknown name lists them.
        credit: package.module:name of a trajkern.credit expression, in place of the recipe's own.
        control: "none" trains; "random-rewards" deals each group's rewards to its
            rollouts at random; "random-drop" deals each prompt's flags, by which a gate drops, to
            another at random; "supervised" spends the same compute on more warm-up.
        seed: decides questions, weights and samples.
        steps: batches of rollouts.
        prompts: questions (groups) a step.
        rollouts: completions of each question; a recipe for trees has ``tree`` instead.
        drop_equal: whether groups in which nothing differs, so that no token has an advantage, leave the
            loss and its normaliser; else they stay, and a KL term holds them.
        updates: optimiser steps on each batch.
        temperature: of sampling and of the loss.
        max_new: most tokens of a completion; by default the longest answer's.
        lr: learning rate, decaying to a tenth.
        questions: draws that make the pool of training questions.
        micro_tokens: most tokens of a micro-batch (a longer rollout stands alone); the gradients of
            a step's micro-batches are added up. By default a step is one.
        tensor_parallel: ranks that share the head, each with its part of the vocabulary; must
            divide the ranks that torchrun starts.
        device: cpu, or cuda: one GPU a rank.
        time_limit: seconds after which no further step starts.
        token_limit: tokens, sampled and scored by the policy for a reward in the main loop, after which no further
            step starts; the learning rate then decays with them where they are ahead of the steps. By default none.
        threads: torch threads; by default one a physical core.
        head: "fused" never forms the logits; "eager" does, and shows at the end what that
            costs in time and memory.
        reference: run every op as plain torch.
        out: folder of the results; by default a new one under runs/.
        checkpoint_every: steps between checkpoints; 0 for the last one only.
        tensorboard: folder for TensorBoard event files.
        resume: checkpoint to continue from, with its configuration.
        config: TOML file with any of these settings; flags override it.
        loss: see trajkern.PolicyLoss.
        warmup: the supervised start.
        then: a second recipe after the first.
        eval: how accuracy is measured.
        tiny: sizes of the built-in transformer.
        tree: how a recipe for trees samples.
        compose: a gate in front of the reward, weights behind the advantage.
        shots: demonstrations shown before each question to a pretrained model.
    """

    task: str = "chain_sum"
    model: str = "tiny"
    recipe: str = "grpo"
    credit: str | None = None
    control: Control = "none"
    seed: int = 0
    steps: int = 300
    prompts: int = 64
    rollouts: int = 8
    drop_equal: bool = True
    updates: int = 1
    temperature: float = 1.0
    max_new: int | None = None
    shots: int = 2
    lr: float = 5e-4
    questions: int = 20_000
    micro_tokens: int | None = None
    tensor_parallel: int = 1
    device: str = "cpu"
    time_limit: float = 240.0
    token_limit: int | None = None
    threads: int | None = None
    head: Head = "fused"
    reference: bool = False
    out: Path | None = None
    checkpoint_every: int = 100
    tensorboard: Path | None = None
    resume: Path | None = None
    config: Path | None = None
    loss: tk.PolicyLoss = field(default_factory=tk.PolicyLoss)
    warmup: WarmUp = field(default_factory=WarmUp)
    then: Then = field(default_factory=Then)
    eval: Evaluation = field(default_factory=Evaluation)
    tiny: ModelConfig = field(default_factory=ModelConfig)
    tree: TreeShape = field(default_factory=TreeShape)
    compose: Compose = field(default_factory=Compose)

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("prompts", 1), ("rollouts", 2), ("updates", 1), ("questions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, choices in (("control", get_args(Control)), ("head", get_args(Head))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        for name in ("temperature", "lr", "time_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.micro_tokens is not None and self.micro_tokens < 1:
            raise ValueError(f"micro_tokens must be at least 1, got {self.micro_tokens}")
        if self.micro_tokens:
            check_parts(self.loss, "micro_tokens must not be given")
        if self.token_limit is not None:
            if self.token_limit < 1:
                raise ValueError(f"token_limit must be at least 1, got {self.token_limit}")
            if self.control == "supervised":
                raise ValueError("token_limit must not be given with control 'supervised', which samples nothing")
        if self.questions < self.prompts:
            raise ValueError(f"questions must be at least prompts = {self.prompts}, got {self.questions}")

    @property
    def arm(self) -> str:
        """What trains after the warm-up: the recipe, or the control in its place."""
        return self.recipe if self.control == "none" else self.control

    @property
    def label(self) -> str:
        """All that trains after the warm-up, as part of a file's name."""
        return f"{self.arm}-then-{self.then.recipe}" if self.then.recipe else self.arm

    @property
    def second(self) -> TrainConfig | None:
        """What ``then`` trains by; None where there is none."""
        then = self.then
        if then.recipe is None:
            return None
        changed: dict[str, Any] = {"recipe": then.recipe, "credit": then.credit, "steps": then.steps, "control": "none"}
        lr, prompts = then.lr or self.lr, then.prompts or self.prompts
        return dataclasses.replace(self, **changed, lr=lr, prompts=prompts, then=Then())

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON data."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_json`. Raises ValueError where a setting is missing, unknown or of another kind."""
        config: TrainConfig = conform("config", data, cls)
        return config


def check_parts(loss: tk.PolicyLoss, otherwise: str) -> None:
    """Raise ValueError where the loss of a batch is not the sum of its parts' losses."""
    if loss.ranks_tokens:
        raise ValueError(f"{otherwise} with loss.kind {loss.kind!r}, which ranks the tokens of the whole batch")
    if loss.sampler_correction == "sequence_mask":
        raise ValueError(f"{otherwise} with loss.sampler_correction 'sequence_mask', which changes what is counted")


_TABLES: dict[str, Any] = {
    f.name: f.default_factory for f in dataclasses.fields(TrainConfig) if callable(f.default_factory)
}

# A pretrained model needs no warm-up, a small step and small batches.
PRETRAINED = TrainConfig(
    steps=20,
    prompts=4,
    rollouts=4,
    lr=1e-5,
    questions=1000,
    time_limit=3600.0,
    warmup=WarmUp(steps=0, batch=8, lr=2e-5, weight_decay=0.0, demonstrations=16),
    eval=Evaluation(heldout=32, validation=16, samples=4, every=10),
)


def parse(argv: list[str]) -> TrainConfig:
    """The configuration of a command line: flags over the TOML file over a resumed run's over the defaults.

    The defaults follow the model: small steps and no warm-up for any but "tiny".

    Raises:
        ValueError: a TOML file that is missing, is no TOML or has an unknown key; a checkpoint that cannot be read.
        SystemExit: a bad flag (with a message), or ``--help``.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--resume", "--model"):
        early.add_argument(name)
    named, _ = early.parse_known_args(argv)
    file = read_toml(Path(named.config)) if named.config else {}
    model = named.model or file.get("model", "tiny")
    base = TrainConfig() if model == "tiny" else dataclasses.replace(PRETRAINED, model=model)
    if named.resume:
        path = Path(named.resume)
        stored = TrainConfig.from_json(load(path).place["config"])
        base = dataclasses.replace(stored, out=path.parent, config=None, resume=None)
    return require("tyro").cli(TrainConfig, prog=PROGRAM, args=[*_flags(file), *argv], default=base)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, whose keys are checked. Raises ValueError naming the file."""
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        settings = toml.loads(path.read_text())
    except (OSError, UnicodeDecodeError, toml.TOMLDecodeError) as error:
        raise ValueError(f"config must be a readable TOML file; {path}: {error}") from None
    _check_keys(settings, TrainConfig, path, "")
    return settings


def _check_keys(settings: dict[str, Any], table: type, path: Path, prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(table)]
    for key, value in settings.items():
        if key not in known or isinstance(value, dict) != (table is TrainConfig and key in _TABLES):
            table_name = prefix or PROGRAM
            raise ValueError(f"config {path} must hold settings of {table_name}: {', '.join(known)}; got {key!r}")
        if isinstance(value, dict):
            _check_keys(value, _TABLES[key], path, key)


def _flags(settings: dict[str, Any], prefix: str = "--") -> list[str]:
    flags: list[str] = []
    for key, value in settings.items():
        name = prefix + key.replace("_", "-")
        if isinstance(value, dict):
            flags += _flags(value, f"{name}.")
        elif isinstance(value, bool):
            flags.append(name if value else f"--no-{name.removeprefix('--')}")
        else:
            flags += [name, str(value)]
    return flags
