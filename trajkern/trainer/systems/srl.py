"""SRL: an expert's solution becomes one exercise a step, rewarded by likeness to the expert's next line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trajkern import credit
from trajkern.recipes import srl
from trajkern.trainer.packing import Piece, demonstration
from trajkern.trainer.schema import Finite, NotNegative, Size, check_fields
from trajkern.trainer.systems.base import SHOWS_WORK, GroupSystem, Local, Played
from trajkern.trainer.tasks.base import Answer, Question, Reply, Splits, Task
from trajkern.trainer.tasks.capabilities import ReferenceTask


@dataclass(frozen=True)
class SRL:
    """Recipe srl; a task with worked solutions.

    Args:
        penalty: the reward of a step that is not well-formed.
        min_std: a step's rollouts are trained on if their rewards deviate by more.
        thought_end: what ends a step's monologue, which is not scored.
        demonstrations: of the warm-up's, the first so many are the expert's; by default all.
    """

    penalty: Finite = -1.0
    min_std: NotNegative = 1e-4
    thought_end: str = "</think>"
    demonstrations: Size | None = None

    def __post_init__(self) -> None:
        check_fields(self, "srl.")
        if not self.thought_end:
            raise ValueError("srl.thought_end must be a text, got an empty one")


class NextStep(Task):
    """The steps of another task's demonstrations: a question with the lines so far, answered by the next line."""

    interactive = True

    def __init__(self, task: Task, thought_end: str) -> None:
        super().__init__(task.name, task.seed)
        self._task, self._thought_end = task, thought_end

    def questions(self, split: int) -> Iterator[Question]:
        for question in self._task.questions(split):
            yield from steps_of(self._task, question)

    def read(self, question: Question, text: str) -> Answer:
        return Answer(self.action(text) == question.answer)

    def action(self, text: str) -> str:
        """What a step does, without what it thinks."""
        return text.rpartition(self._thought_end)[2].removesuffix("\n")

    def reply(self, question: Question, text: str) -> Reply | None:
        """A new line ends the step."""
        return Reply("", done=True) if text.endswith("\n") else None


class StepImitation(GroupSystem):
    """Knows the reward "similarity", NaN for a step that is not well-formed, as is one that ``srl.similarity`` cannot
    compare with the expert's in its ``max_steps``: no text of the policy ends the run.

    The exercises are of the solutions that the supervised control imitates.
    """

    settings_type = SRL
    requires = SHOWS_WORK
    knows = frozenset({"similarity"})
    asks_task = False

    settings: SRL

    def __post_init__(self) -> None:
        self._posed = self.task
        self.task: NextStep = NextStep(self.task, self.settings.thought_end)

    @classmethod
    def expression(cls, recipe: str, settings: SRL) -> credit.Spec:
        return credit.recipe(recipe, penalty=settings.penalty, min_std=settings.min_std)

    def demonstration(self, question: Question) -> list[Piece]:
        return [(self.prompt(question), False), *demonstration(self.policy, self._posed.pieces(question))]

    def imitated(self, splits: Splits) -> list[Question]:
        shown, most = splits.demonstrations, self.settings.demonstrations
        if most is not None and most > len(shown):
            raise ValueError(f"srl.demonstrations must be at most {len(shown)}, the warm-up's; got {most}")
        return shown[:most]

    def imitation(self, question: Question) -> list[Piece]:
        pieces = [
            piece for line, reply in played_out(self._posed, question) for piece in ((line, True), (reply, False))
        ]
        return [(self.prompt(question), False), *demonstration(self.policy, [piece for piece in pieces if piece[0]])]

    def pool(self, splits: Splits) -> list[Question]:
        return [step for question in self.imitated(splits) for step in steps_of(self._posed, question)]

    def foreseen(self, splits: Splits) -> list[list[Piece]]:
        """The expert's lines alone: how long a monologue will be is not known."""
        policy = self.policy
        return [[(self.prompt(q), False), *demonstration(policy, self.task.pieces(q))] for q in self.pool(splits)]

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:
        actions = [self.task.action(text) for text in played.texts]
        alike = srl.similarity(actions, [q.answer for q in played.questions], beyond=math.nan).float()
        well_formed = torch.tensor([bool(action) for action in actions])
        return {"reward": played.rewards, "similarity": torch.where(well_formed, alike, torch.nan)}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        likeness = credit.presets.StepLikeness(self.settings.penalty)
        differ = credit.presets.Varies(likeness, self.settings.min_std)(rollouts)
        return {"similarity": likeness(rollouts), "filtered": int((~differ).sum())}


def played_out(task: Task, question: Question) -> list[tuple[str, str]]:
    """The solution as it is played: each line, and what the environment writes after it.

    A line has its newline where the solution or the environment goes on after it, and where that ends the rollout.

    Raises:
        ValueError: the environment ends the rollout within the solution.
    """
    assert isinstance(task, ReferenceTask)
    lines, shown, turns = task.reference(question).split("\n"), "", []
    for number, line in enumerate(lines, start=1):
        reply = task.reply(question, f"{shown}{line}\n") if task.interactive else None
        last = number == len(lines)
        if reply and reply.done and not last:
            raise ValueError(
                f"reference of task {task.name} must end where its environment does, after {number} lines; "
                f"{question.prompt!r} has {len(lines)}"
            )
        turns.append((line if last and reply is None else f"{line}\n", reply.text if reply else ""))
        shown += "".join(turns[-1])
    return turns


def steps_of(task: Task, question: Question) -> list[Question]:
    """Each line of the question's solution, posed after those before it and what the environment wrote."""
    shown, steps = "", []
    for line, reply in played_out(task, question):
        steps.append(
            Question(question.prompt + shown, f"{question.text}\n{shown}", line.removesuffix("\n"), question.entry)
        )
        shown += line + reply
    return steps
