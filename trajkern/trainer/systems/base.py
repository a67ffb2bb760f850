"""How a recipe plays, rewards and credits in the trainer, and what it asks of a task: what all systems share."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.packing import Piece, demonstration, pack_rollouts, select
from trajkern.trainer.ranks import ALONE, Ranks
from trajkern.trainer.sampling import Rollouts
from trajkern.trainer.tasks.base import Question, Splits, Task

Values = dict[str, float | int | None]  # a step's metrics
# One rank's: a tensor counts with each of its elements, a pair (x, n) as n elements of mean x, integers are added up.
Local = dict[str, Tensor | tuple[float, int] | float | int | None]


class Requirement(NamedTuple):
    """What a recipe asks of a task: in words, and whether a task has it."""

    meaning: str
    met: Callable[[Task], bool]


SHOWS_WORK = Requirement("a task that shows its work", lambda task: task.shows_work)
GIVES_HINTS = Requirement("a task that gives hints", lambda task: task.gives_hints)


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
        numbers = keep.nonzero().squeeze(1).tolist()
        questions, texts = [self.questions[n] for n in numbers], [self.texts[n] for n in numbers]
        return replace(self, questions=questions, texts=texts, batch=select(self.batch, keep))


class Assigned(NamedTuple):
    """Advantages of the rollouts ``[N]``, or of their tokens ``[T]``; which rollouts are trained; what to report."""

    advantages: Tensor
    per_token: bool = False
    keep: Tensor | None = None
    values: Local = {}


@dataclass(eq=False)
class System:
    """A recipe in the trainer: what it is told, what it asks for, what it remembers.

    Args:
        recipe: its name.
        settings: the user's, of the class's ``settings_type``.
        task: what rollouts are drawn on; evaluation keeps to the run's own task.
        policy: what plays.
        ranks: over which a step's rollouts are spread.
        temperature: of sampling and of the loss.

    Attributes:
        settings_type: a frozen dataclass of defaults, which becomes the table of flags, TOML keys and JSON that bears
            the recipe's name; None where there is nothing to choose.
        requires: of the task; None where any will do.
        splits_groups: whether a group's rollouts may lie on several ranks; else each group is credited on one.
        compares_prompts: whether a rollout's credit depends on other prompts'.
        dealable: whether a rollout's signals can be dealt to another of its group, as the control with random rewards
            does.
        remembers: whether :meth:`learn` keeps anything.
    """

    settings_type: ClassVar[type | None] = None
    requires: ClassVar[Requirement | None] = None
    splits_groups: ClassVar[bool] = False
    compares_prompts: ClassVar[bool] = False
    dealable: ClassVar[bool] = True
    remembers: ClassVar[bool] = False

    recipe: str
    settings: Any
    task: Task
    policy: Policy
    ranks: Ranks = ALONE
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Where a system adds what it makes of these."""

    def pool(self, splits: Splits) -> list[Question]:
        """The questions to train on."""
        return splits.train

    def prompt(self, question: Question) -> list[int]:
        """The tokens that pose ``question``, in training and in evaluation."""
        return self.policy.prompt(question)

    def demonstration(self, question: Question) -> list[Piece]:
        """A trajectory of the warm-up."""
        return [(self.prompt(question), False), *demonstration(self.policy, self.task.pieces(question))]

    def learn(self, questions: list[Question], texts: list[str], rewards: list[float]) -> None:
        """Called after every step of whole rollouts with those of all ranks, where ``remembers``."""

    def validated(self, pass_at_1: float) -> None:
        """Called after every validation."""

    def state(self) -> Any:
        """JSON data for the checkpoint."""
        return None

    def restore(self, state: Any) -> None:
        """The inverse of :meth:`state`."""


class GroupSystem(System, abc.ABC):
    """Groups of whole rollouts of each question, rewarded by the verifier."""

    def play(self, rollouts: Rollouts, questions: list[Question], groups: Tensor) -> Played:  # [N]
        """Read and verify these rollouts, the n-th of ``questions[n]``, in group ``groups[n]``."""
        texts = [self.policy.text(tokens) for tokens in rollouts.completions()]
        rewards = torch.tensor([self.task.reward(q, text) for q, text in zip(questions, texts, strict=True)])
        return Played(questions, texts, pack_rollouts(rollouts, rewards, groups))

    def signals(self, played: Played) -> dict[str, Tensor]:  # [N] each
        """What each rollout earned, for :meth:`credit` to compare; and for the control with random rewards to deal."""
        return {"rewards": played.rewards}

    @abc.abstractmethod
    def credit(self, played: Played, signals: dict[str, Tensor]) -> Assigned:
        """The advantages."""
