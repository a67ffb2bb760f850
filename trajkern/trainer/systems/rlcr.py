"""RLCR: answers that state how sure they are, rewarded for being right and for knowing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trajkern import credit
from trajkern.trainer.systems.base import GroupSystem, Local, Played, Requirement


@dataclass(frozen=True)
class RLCR:
    """Recipe rlcr.

    Args:
        form: of the reward, "paper" or "code".
    """

    form: Literal["paper", "code"] = "paper"


class Calibrated(GroupSystem):
    """Knows the reward "confidence", NaN where none was stated."""

    settings_type = RLCR
    requires = Requirement("one whose answers state a confidence", lambda task: task.states_confidence)
    knows = frozenset({"confidence"})

    settings: RLCR

    @classmethod
    def expression(cls, recipe: str, settings: RLCR) -> credit.Spec:
        return credit.recipe(recipe, form=settings.form)

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:
        answers = [self.task.read(q, text) for q, text in zip(played.questions, played.texts, strict=True)]
        if bool((odd := (played.rewards != 0) & (played.rewards != 1)).any()):
            expected = f"reward of task {self.task.name} must be 0 or 1 for the recipe rlcr"
            raise ValueError(f"{expected}, as confidences are of being right; got {float(played.rewards[odd][0]):g}")
        stated = [torch.nan if answer.confidence is None else answer.confidence for answer in answers]
        return {"reward": played.rewards, "confidence": torch.tensor(stated)}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        return {"rlcr": credit.presets.Calibration(self.settings.form)(rollouts)}
