"""Evaluative and directive feedback: a verdict on the rollout, and what the policy would say that was given a hint."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from trajkern import credit
from trajkern.trainer.lagging import TEACHER, Lag
from trajkern.trainer.packing import Piece, demonstration
from trajkern.trainer.schema import Finite, Share, check_fields
from trajkern.trainer.systems.base import GIVES_HINTS, GroupSystem, Local
from trajkern.trainer.systems.hints import hinted
from trajkern.trainer.tasks.base import Question
from trajkern.trainer.tasks.capabilities import HintTask


@dataclass(frozen=True)
class Feedback:
    """Recipe feedback; a task with hints.

    Args:
        reward_weight: of the verdict, 1 or -1, on the whole rollout.
        directive_weight: of log p(with the hint) - log p, on each token.
        hinted: share of the demonstrations that are shown with a hint.
        teacher_rate: of the way to the policy, what the teacher of ``credit.directive`` and ``credit.divergence`` goes
            after each step: with 1 it is the policy, with less an average over its past, with 0 the policy that the
            main loop began with.
    """

    reward_weight: Finite = 1.0
    directive_weight: Finite = 1.0
    hinted: Share = 0.5
    teacher_rate: Share = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "feedback.")


class HintedTeacher(GroupSystem):
    """The policy, or an average over its past, is its own teacher. Rollouts that the task has no hint for (the right
    ones) take no directive term.

    A share of the warm-up's demonstrations are shown with a hint, so that the policy can read one.
    """

    settings_type = Feedback
    requires = GIVES_HINTS

    settings: Feedback

    @classmethod
    def expression(cls, recipe: str, settings: Feedback) -> credit.Spec:
        weights = {"reward_weight": settings.reward_weight, "directive_weight": settings.directive_weight}
        return credit.recipe(recipe, **weights)

    def __post_init__(self) -> None:
        self.lags()  # which checks its rate

    def lags(self) -> dict[str, Lag]:
        lag = Lag(self.settings.teacher_rate)
        return {TEACHER: lag} if lag.rate < 1 else {}

    def demonstration(self, question: Question) -> list[Piece]:
        number = zlib.crc32(question.prompt.encode())
        if number % 1000 >= 1000 * self.settings.hinted:
            return super().demonstration(question)
        lines = question.answer.split("\n")
        at = number // 1000 % len(lines)
        assert isinstance(self.task, HintTask)
        hint = self.task.hint(question, "\n".join(lines[:at]))
        shown = self.policy.prompt(hinted(question, hint or ""))
        return [(shown, False), *demonstration(self.policy, self.task.pieces(question))]

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        if "teacher_logprobs" not in needs:
            return {}
        assert rollouts.teacher_logprobs is not None and rollouts.log_ratio_base is not None
        return {"directive": (rollouts.teacher_logprobs - rollouts.log_ratio_base)[rollouts.batch.loss_mask]}
