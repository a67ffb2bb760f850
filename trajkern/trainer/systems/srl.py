"""SRL: an expert's solution becomes one exercise a step, rewarded by likeness to the expert's next line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trajkern import credit
from trajkern.recipes import srl
from trajkern.trainer.systems.base import SHOWS_WORK, GroupSystem, Local, Played
from trajkern.trainer.tasks.base import Answer, Question, Reply, Splits, Task
from trajkern.trainer.tasks.capabilities import ReferenceTask

THOUGHT = "</think>"  # what stands before it is monologue and not scored


@dataclass(frozen=True)
class SRL:
    """Recipe srl; a task with worked solutions.

    Args:
        penalty: the reward of a step that is not well-formed.
        min_std: a step's rollouts are trained on if their rewards deviate by more.
    """

    penalty: float = -1.0
    min_std: float = 1e-4


class NextStep(Task):
    """The steps of another task's demonstrations: a question with the lines so far, answered by the next line."""

    interactive = True

    def __init__(self, task: Task) -> None:
        super().__init__(task.name, task.seed)
        assert isinstance(task, ReferenceTask)
        self._task, self.solution = task, task.reference

    def questions(self, split: int) -> Iterator[Question]:
        for question in self._task.questions(split):
            yield from steps_of(question, self.solution(question))

    def read(self, question: Question, text: str) -> Answer:
        return Answer(_action(text) == question.answer)

    def reply(self, question: Question, text: str) -> Reply | None:
        """A new line ends the step."""
        return Reply("", done=True) if text.endswith("\n") else None


class StepImitation(GroupSystem):
    """Knows the reward "similarity", NaN for a step that is not well-formed.

    The exercises are those of the warm-up's demonstrations: the same solutions that supervised training imitates.
    """

    settings_type = SRL
    requires = SHOWS_WORK
    knows = frozenset({"similarity"})
    asks_task = False

    settings: SRL

    def __post_init__(self) -> None:
        self.task: NextStep = NextStep(self.task)

    @classmethod
    def expression(cls, recipe: str, settings: SRL) -> credit.Spec:
        return credit.recipe(recipe, penalty=settings.penalty, min_std=settings.min_std)

    def pool(self, splits: Splits) -> list[Question]:
        return [step for question in splits.demonstrations for step in steps_of(question, self.task.solution(question))]

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:
        actions = [_action(text) for text in played.texts]
        alike = srl.similarity(actions, [q.answer for q in played.questions]).float()
        well_formed = torch.tensor([bool(action) for action in actions])
        return {"reward": played.rewards, "similarity": torch.where(well_formed, alike, torch.nan)}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        likeness = credit.presets.StepLikeness(self.settings.penalty)
        differ = credit.presets.Varies(likeness, self.settings.min_std)(rollouts)
        return {"similarity": likeness(rollouts), "filtered": int((~differ).sum())}


def steps_of(question: Question, solution: str) -> list[Question]:
    """Each line of the solution, posed after those before it."""
    lines = solution.split("\n")
    before = ["".join(f"{line}\n" for line in lines[:at]) for at in range(len(lines))]
    return [
        Question(question.prompt + shown, f"{question.text}\n{shown}", line, question.entry)
        for shown, line in zip(before, lines, strict=True)
    ]


def _action(text: str) -> str:
    return text.rpartition(THOUGHT)[2].removesuffix("\n")
