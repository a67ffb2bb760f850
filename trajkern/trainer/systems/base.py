"""How a recipe plays and what it knows of its rollouts, and what it asks of a task: what all systems share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern.trainer.compose import Gate
from trajkern.trainer.forest import Forest
from trajkern.trainer.lagging import SCORER, TEACHER, Lag
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.packing import Piece, demonstration, pack_rollouts
from trajkern.trainer.ranks import ALONE, Moments, Ranks
from trajkern.trainer.returned import agreed
from trajkern.trainer.sampling import Rollouts
from trajkern.trainer.systems.scoring import score
from trajkern.trainer.tasks.base import Question, Splits, Task
from trajkern.trainer.tasks.capabilities import HintTask, ReferenceTask

Values = dict[str, float | int | None]  # a step's metrics
# One rank's: a tensor counts with each of its elements, a pair (x, n) as n elements of mean x, integers are added up.
Local = dict[str, Tensor | Moments | tuple[float, int] | float | int | None]


Rater = Callable[[Sequence[Question], Sequence[str]], Tensor]  # of questions and texts: [N], higher is likelier right


class Requirement(NamedTuple):
    """What a recipe asks of a task: in words, and whether a task has it."""

    meaning: str
    met: Callable[[Task], bool]


SHOWS_WORK = Requirement("one with `reference`, a worked solution", lambda task: isinstance(task, ReferenceTask))
GIVES_HINTS = Requirement("one with `hint`", lambda task: isinstance(task, HintTask))


def load_function(
    setting: str,
    name: str,
    check: Callable[[str, Any], Any] = lambda name, value: value,
    call: Callable[..., Any] = agreed,
) -> Callable[..., Any]:
    """The function "package.module:function" that a setting names, which ``call`` calls; its results pass ``check``.
    Raises ValueError where there is none."""
    try:
        found = credit.load(name)
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None
    if not callable(found):
        raise ValueError(f"{setting} must be package.module:function; {name!r} is {found!r}")
    return lambda *args: check(f"{setting} {name}", call(f"{setting} {name}", found, *args))


class Rounds(NamedTuple):
    """Training in rounds of ``steps`` steps on what a filter keeps of ``candidates`` questions."""

    steps: int
    candidates: int


@dataclass(frozen=True, eq=False)
class Played:
    """A step's rollouts: trajectory n of ``batch`` answers ``questions[n]`` with ``texts[n]``.

    ``batch.rewards`` are the verifier's. ``forest`` is that of rollouts which were grown as trees, leaf n trajectory n.
    """

    questions: list[Question]
    texts: list[str]
    batch: tk.PackedBatch
    forest: Forest | None = None

    @property
    def rewards(self) -> Tensor:
        assert self.batch.rewards is not None
        return self.batch.rewards


@dataclass(eq=False)
class System:
    """A recipe in the trainer: what it is told, what it asks for, what its rollouts know, what it remembers.

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
        knows: what its rollouts know beside what all do, by the names of a credit's ``needs``.
        gate: what a rubric's verdict means for a group, where the user does not say.
        asks_task: whether its questions are the task's own, for which that may have hints.
        remembers: whether :meth:`learn` keeps anything.
        scored: tokens whose log-prob was asked for so far, by :meth:`score` or under hints.
        copies: of the policy, those that :meth:`lags` names, in the main loop.
    """

    settings_type: ClassVar[type | None] = None
    requires: ClassVar[Requirement | None] = None
    splits_groups: ClassVar[bool] = False
    knows: ClassVar[frozenset[str]] = frozenset()
    gate: ClassVar[Gate] = "drop_rollout"
    asks_task: ClassVar[bool] = True
    remembers: ClassVar[bool] = False

    recipe: str
    settings: Any
    task: Task
    policy: Policy
    ranks: Ranks = ALONE
    temperature: float = 1.0
    scored: int = field(default=0, init=False)
    copies: dict[str, Policy] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Where a system adds what it makes of these."""

    def score(self, contexts: Sequence[Any], targets: Sequence[Any], **options: Any) -> Any:
        """``score`` of ``trajkern.credit.Rollouts``, by the policy; the targets' tokens are counted."""
        found = score(self.copies.get(SCORER, self.policy), contexts, targets, **options)
        self.scored += len(found[0])
        return found

    @classmethod
    def posed(cls, task: Task, settings: Any) -> Task:
        """The task that is trained and evaluated on, made of the run's; by default that itself.

        Raises:
            ValueError: a task that lacks what the settings ask for.
        """
        return task

    @classmethod
    def expression(cls, recipe: str, settings: Any) -> credit.Spec:
        """The recipe's credit, of what its rollouts know."""
        return credit.recipe(recipe)

    @classmethod
    def check(cls, recipe: str, settings: Any, task: Task) -> None:
        """Raise ValueError where ``task`` lacks what the recipe asks of it."""
        if cls.requires and not cls.requires.met(task):
            raise ValueError(f"task must be {cls.requires.meaning}, for the recipe {recipe}; got {task.name!r}")

    def lags(self) -> dict[str, Lag]:
        """The copies of the policy that it reads, by name, and how each lags behind."""
        return {}

    @property
    def teacher(self) -> Policy:
        """What teaches under a hint: the policy as it is, or a copy."""
        return self.copies.get(TEACHER, self.policy)

    @property
    def rounds(self) -> Rounds | None:
        """Of the main loop; None where every step draws from the whole pool."""
        return None

    def pool(self, splits: Splits) -> list[Question]:
        """The questions to train on."""
        return splits.train

    def prompt(self, question: Question) -> list[int]:
        """The tokens that pose ``question``, in training and in evaluation."""
        return self.policy.prompt(question)

    def demonstration(self, question: Question) -> list[Piece]:
        """A trajectory of the warm-up."""
        return [(self.prompt(question), False), *demonstration(self.policy, self.task.pieces(question))]

    def imitated(self, splits: Splits) -> list[Question]:
        """What the supervised control imitates."""
        return splits.demonstrations

    def imitation(self, question: Question) -> list[Piece]:
        """A trajectory of the supervised control."""
        return self.demonstration(question)

    def foreseen(self, splits: Splits) -> list[list[Piece]]:
        """Trajectories of the lengths that rollouts are to have, a prompt first, as far as can be told beforehand."""
        return [self.imitation(question) for question in self.imitated(splits)]

    def known(self, played: Played, needs: frozenset[str]) -> dict[str, Any]:
        """What there is to know of the rollouts beside their signals: arguments of ``trajkern.credit.Rollouts``.

        ``needs`` of it are read; what is cheap to know may be there anyway.
        """
        return {}

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:  # [N] each
        """What each rollout earned: named rewards, and flags (bool); the control with random rewards deals them."""
        return {"reward": played.rewards}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        """What to report of a step, where it was needed."""
        return {}

    def statistics(self, questions: list[Question]) -> dict[str, float]:
        """What an evaluation on these questions reports of how they are posed."""
        return {}

    def learn(self, questions: list[Question], texts: list[str], rewards: list[float]) -> None:
        """Called after every step of whole rollouts with those of all ranks, where ``remembers``."""

    def rater(self, pool: list[Question], max_new: int) -> Rater | None:
        """What rates the samples of a held-out evaluation for its votes; None where nothing does.

        Args:
            pool: questions to train on.
            max_new: most tokens of a completion.
        """
        return None

    def validated(self, pass_at_1: float, families: dict[str, float]) -> None:
        """Called after every validation, with its pass@1 of all questions and of those of each family."""

    def state(self) -> Any:
        """JSON data for the checkpoint."""
        return None

    def restore(self, state: Any) -> None:
        """The inverse of :meth:`state`."""


class GroupSystem(System):
    """Groups of whole rollouts of each question, rewarded by the verifier; ranks may share a group."""

    splits_groups = True

    def play(self, rollouts: Rollouts, questions: list[Question], groups: Tensor) -> Played:  # [N]
        """Read and verify these rollouts, the n-th of ``questions[n]``, in group ``groups[n]``."""
        texts = [self.policy.text(tokens) for tokens in rollouts.completions()]
        earned = [self.task.reward(q, text) for q, text in zip(questions, texts, strict=True)]
        rewards = torch.tensor(earned, dtype=torch.float32)  # a count or a verdict is a reward, too
        return Played(questions, texts, pack_rollouts(rollouts, rewards, groups))

    def keeps(self, played: Played) -> Tensor:
        """Whether the filter keeps each rollout's prompt, bool ``[N]``, where there are ``rounds``."""
        raise NotImplementedError

    def next_round(self, numbers: list[int], keep: Tensor) -> None:  # [P] bool
        """A round begins: of these questions of the pool the filter keeps some."""
        raise NotImplementedError

    def round_prompts(self) -> Sequence[int]:
        """The questions of this round, by their numbers in the pool."""
        raise NotImplementedError
