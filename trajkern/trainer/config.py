"""The trainer's configuration: a frozen dataclass, every field a flag and a TOML key."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args

import trajkern as tk
from trajkern._files import read
from trajkern._suggest import did_you_mean
from trajkern.trainer.checkpoint import load, newest
from trajkern.trainer.compose import Compose
from trajkern.trainer.help import parsed
from trajkern.trainer.help import show as show_help
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.optional import require
from trajkern.trainer.schema import (
    Count,
    NotNegative,
    Positive,
    Seconds,
    Seed,
    Several,
    Size,
    Threads,
    check_fields,
    conform,
    hints_of,
)
from trajkern.trainer.systems import SYSTEMS, system_type
from trajkern.trainer.systems.plain import PlainTrees
from trajkern.trainer.tree_sampling import TreeShape

PROGRAM = "trajkern train"
LAST = "last"
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

    steps: Count = 400
    batch: Size = 128
    lr: Positive = 4e-3
    weight_decay: NotNegative | None = None
    demonstrations: Size | None = None
    check_every: Size = 20
    pass_at_1: NotNegative = 0.25
    pass_at_k: NotNegative = 0.5


@dataclass(frozen=True)
class Evaluation:
    """Questions never trained on.

    Args:
        heldout: questions of the reported accuracy, before and after.
        validation: questions of the curve and of the warm-up's end.
        samples: completions of a question; the k of pass@k.
        every: steps between validations in the main loop.
    """

    heldout: Size = 512
    validation: Size = 256
    samples: Size = 8
    every: Size = 25


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
    steps: Count = 0
    lr: Positive | None = None
    prompts: Size | None = None
    credit: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "then.")
        if self.recipe is None and (self.steps or self.lr or self.prompts or self.credit):
            raise ValueError(f"then.recipe must be given for other settings of then, got {self}")
        if self.recipe is not None:
            system_type(self.recipe, "then.recipe")
        if self.recipe is not None and self.steps < 1:
            raise ValueError(f"then.steps must be at least 1 for then.recipe {self.recipe!r}, got {self.steps}")


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
        rollouts: completions of each question; a recipe for trees has "tree" instead.
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
        resume: checkpoint to continue from, with its configuration; "last" is the last one in ``out``, and a
            fresh start where there is none yet: for what a scheduler or torchrun starts again.
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
    seed: Seed = 0
    steps: Count = 300
    prompts: Size = 64
    rollouts: Several = 8
    drop_equal: bool = True
    updates: Size = 1
    temperature: Positive = 1.0
    max_new: Size | None = None
    shots: Count = 2
    lr: Positive = 5e-4
    questions: Size = 20_000
    micro_tokens: Size | None = None
    tensor_parallel: Size = 1
    device: str = "cpu"
    time_limit: Seconds = 240.0
    token_limit: Size | None = None
    threads: Threads | None = None
    head: Head = "fused"
    reference: bool = False
    out: Path | None = None
    checkpoint_every: Count = 100
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
        check_fields(self)
        if self.micro_tokens:
            check_parts(self.loss, "micro_tokens must not be given")
        if self.token_limit is not None and self.control == "supervised":
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

    The defaults follow the model: small steps and no warm-up for any but "tiny". ``--help`` shows what most runs need,
    ``--help GROUP`` a group of the other flags, ``--help-all`` all of them.

    Raises:
        ValueError: a TOML file that is missing, is no TOML or has an unknown key or a value out of range, which a flag
            may override; a checkpoint that cannot be read; a setting that no recipe of the run reads.
        SystemExit: a bad flag (with a message), or ``--help``.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--resume", "--model", "--out"):
        early.add_argument(name)
    named, _ = early.parse_known_args(argv)
    file = read_toml(Path(named.config)) if named.config else {}
    meant = {name: file.get(name) if value is None else value for name, value in vars(named).items()}
    for name, value in meant.items():
        if value == "":  # of a variable that is not set: it would be the current folder, or no resuming
            raise ValueError(f"{name} must not be empty, got ''")
    model = meant["model"] or "tiny"
    base = TrainConfig() if model == "tiny" else dataclasses.replace(PRETRAINED, model=model)
    path = resumed(*(None if (word := meant[name]) == "None" else word for name in ("resume", "out")))
    if path:
        stored = TrainConfig.from_json(load(path).place["config"])
        base = dataclasses.replace(stored, out=path.parent, config=None, resume=None)
    show_help(argv, base, PROGRAM)
    words = [*_flags(file), *argv]
    config: TrainConfig = parsed(TrainConfig, prog=PROGRAM, args=words, default=base)
    _check_read(config, [word.partition("=")[0] for word in words])
    return dataclasses.replace(config, resume=path)


def _check_read(config: TrainConfig, words: list[str]) -> None:
    """Raise ValueError where a flag sizes groups or trees that no recipe of the run samples."""
    recipes = [recipe for recipe in (config.recipe, config.then.recipe) if recipe is not None]
    trees = [issubclass(system_type(recipe), PlainTrees) for recipe in recipes]
    said = " and ".join(recipes)
    if all(trees) and "--rollouts" in words:
        raise ValueError(
            f"rollouts must not be given with the recipe {said}, which samples tree.trees trees of a question with "
            f"tree.keep leaves each; got {config.rollouts}"
        )
    if not any(trees) and (given := [word for word in words if word.startswith("--tree.")]):
        name = given[0].removeprefix("--").replace("-", "_")
        raise ValueError(f"{name} must not be given with the recipe {said}, which samples rollouts, not trees")


def resumed(named: str | None, out: str | None) -> Path | None:
    """The checkpoint that ``--resume`` means."""
    if named != LAST:
        return Path(named) if named else None
    if out is None:
        raise ValueError(f"out must be given to resume the {LAST} checkpoint in it, got None")
    return newest(Path(out))


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, each of which is checked by itself. Raises ValueError naming the file."""
    toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        settings = toml.loads(read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config must be a readable TOML file; {path}: {error}") from None
    _check_keys(settings, TrainConfig, path, "")
    _check_values(settings, TrainConfig, path, "")
    return settings


def _check_keys(settings: dict[str, Any], table: type, path: Path, prefix: str) -> None:
    known = [f.name for f in dataclasses.fields(table)]
    for key, value in settings.items():
        if key not in known:
            legal = f"settings of {prefix or PROGRAM}: {', '.join(known)}"
            raise ValueError(f"config {path} must hold {legal}; got {key!r}{did_you_mean(key, known)}")
        is_table = table is TrainConfig and key in _TABLES
        if isinstance(value, dict) != is_table:
            name, what = f"{prefix}.{key}" if prefix else key, "be" if is_table else "not be"
            raise ValueError(f"config {path}: {name} must {what} a table of settings, got {value!r}")
        if isinstance(value, dict):
            _check_keys(value, _TABLES[key], path, key)


def _check_values(settings: dict[str, Any], table: type, path: Path, prefix: str) -> None:
    hints = hints_of(table)
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_values(value, _TABLES[key], path, f"{key}.")
        elif value != "None" or NoneType not in get_args(hints[key]):  # TOML has no other word for it
            try:
                conform(prefix + key, value, hints[key])
                if table is tk.PolicyLoss:
                    _check_option_of_loss(key, value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"config {path}: {error}") from None


def _check_option_of_loss(key: str, value: Any) -> None:
    """What :class:`trajkern.PolicyLoss` says of one option, whatever the flags make of the others."""
    swapped = {"low": "high", "high": "low"}
    twin = "_".join(swapped.get(word, word) for word in key.split("_"))  # of a lower bound the upper one
    try:
        tk.PolicyLoss(**{twin: value, key: value})
    except (TypeError, ValueError) as error:
        name, _, text = str(error).partition(" ")
        if name in (key, twin):
            raise ValueError(f"loss.{key} {text}") from None


def _flags(settings: dict[str, Any], prefix: str = "--") -> list[str]:
    flags: list[str] = []
    for key, value in settings.items():
        name = prefix + key.replace("_", "-")
        if isinstance(value, dict):
            flags += _flags(value, f"{name}.")
        elif isinstance(value, bool):
            flags.append(name if value else f"--no-{name.removeprefix('--')}")
        else:
            flags.append(f"{name}={value}")  # in one word: a text may be that of a flag
    return flags
