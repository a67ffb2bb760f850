"""How a recipe plays, rewards and credits in the trainer: the plain way, of which the others change parts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern import recipes
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.packing import Piece, demonstration, pack_rollouts, select
from trajkern.trainer.ranks import ALONE, Ranks
from trajkern.trainer.sampling import Rollouts
from trajkern.trainer.tasks.base import Question, Splits, Task

Values = dict[str, float | int | None]  # a step's metrics
# One rank's: a tensor counts with each of its elements, a pair (x, n) as n elements of mean x, integers are added up.
Local = dict[str, Tensor | tuple[float, int] | float | int | None]
Rubric = Callable[[Sequence[Question], Sequence[str]], Sequence[bool]]


@dataclass(frozen=True, eq=False)
class Played:
    """A step's rollouts: trajectory n of ``batch`` answers ``questions[n]`` with ``texts[n]``.

    ``batch.rewards`` are the verifier's.
    """

    questions: list[Question]
    texts: list[str]
    batch: tk.PackedBatch

    @property
    def rewards(self) -> Tensor:
        assert self.batch.rewards is not None
        return self.batch.rewards

    def trajectories(self) -> list[list[int]]:
        """The tokens of each rollout, its prompt first."""
        return [x.tolist() for x in self.batch.tokens.split(self.batch.lengths.tolist())]

    def select(self, keep: Tensor) -> Played:  # [N] bool
        """The rollouts marked by ``keep``."""
        kept = keep.nonzero().squeeze(1).tolist()
        questions, texts = [self.questions[n] for n in kept], [self.texts[n] for n in kept]
        return replace(self, questions=questions, texts=texts, batch=select(self.batch, keep))


class Found(NamedTuple):
    """Advantages of the rollouts ``[N]``, or of their tokens ``[T]``; which rollouts are trained; what to report."""

    advantages: Tensor
    per_token: bool = False
    keep: Tensor | None = None
    values: Local = {}


class System:
    """A flat recipe in the trainer: groups of whole rollouts, rewarded by the verifier.

    Attributes:
        task: what rollouts are drawn on; evaluation keeps to the run's own task.
        ranks: over which a step's rollouts are spread.
        dealable: whether a rollout's signals can be dealt to another of its group, as the control with random rewards
            does.
        remembers: whether :meth:`learn` keeps anything.
    """

    dealable, remembers = True, False

    def __init__(self, config: TrainConfig, task: Task, policy: Policy, ranks: Ranks = ALONE) -> None:
        self.config, self.task, self.policy, self.ranks = config, task, policy, ranks

    @property
    def splits_groups(self) -> bool:
        """Whether a group's rollouts may lie on several ranks; else each group is played and credited on one."""
        alone = self.config.control != "random-rewards" and self.config.compose.rubric is None
        return alone and self.config.recipe in recipes.RECIPES

    def pool(self, splits: Splits) -> list[Question]:
        """The questions to train on."""
        return splits.train

    def prompt(self, question: Question) -> list[int]:
        """The tokens that pose ``question``, in training and in evaluation."""
        return self.policy.prompt(question)

    def demonstration(self, question: Question) -> list[Piece]:
        """A trajectory of the warm-up."""
        return [(self.prompt(question), False), *demonstration(self.policy, self.task.pieces(question))]

    def play(self, rollouts: Rollouts, questions: list[Question], groups: Tensor) -> Played:  # [N]
        """Read and verify these rollouts, the n-th of ``questions[n]``, in group ``groups[n]``."""
        texts = [self.policy.text(tokens) for tokens in rollouts.completions()]
        rewards = torch.tensor([self.task.reward(q, text) for q, text in zip(questions, texts, strict=True)])
        return Played(questions, texts, pack_rollouts(rollouts, rewards, groups))

    def signals(self, played: Played) -> dict[str, Tensor]:  # [N] each
        """What each rollout earned, for :meth:`credit` to compare; and for the control with random rewards to deal."""
        return {"rewards": played.rewards}

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Found:
        """The advantages. Here the recipe's, a function of a batch with rewards."""
        batch = replace(played.batch, rewards=signals["rewards"])
        found = recipes.RECIPES[self.config.recipe](batch, process_group=self.ranks.data)
        return Found(found[0], keep=found[1]) if isinstance(found, tuple) else Found(found)

    def learn(self, questions: list[Question], texts: list[str], rewards: list[float]) -> None:
        """Called after every step with its rollouts, those of all ranks where ``remembers``."""

    def validated(self, pass_at_1: float) -> None:
        """Called after every validation."""

    def state(self) -> Any:
        """JSON data for the checkpoint."""
        return None

    def restore(self, state: Any) -> None:
        """The inverse of :meth:`state`."""


def rubric(name: str | None, task: Task) -> Rubric | None:
    """The rubric that ``compose.rubric`` names. Raises ValueError where there is none of that name."""
    if name is None:
        return None
    if name == "well_formed":
        return lambda questions, texts: [task.read(q, x).well_formed for q, x in zip(questions, texts, strict=True)]
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        expected = '"well_formed" or "package.module:function"'
        raise ValueError(f"compose.rubric must be {expected}; got {name!r}: {error}") from None
