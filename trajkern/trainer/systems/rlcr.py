"""RLCR: answers that state how sure they are, rewarded for being right and for knowing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

import trajkern as tk
from trajkern.recipes import rlcr
from trajkern.trainer.systems.base import Assigned, GroupSystem, Played, Requirement


@dataclass(frozen=True)
class RLCR:
    """Recipe rlcr.

    Args:
        form: of the reward, "paper" or "code".
    """

    form: Literal["paper", "code"] = "paper"


class Calibrated(GroupSystem):
    """The reward of :func:`trajkern.recipes.rlcr.rewards`, centred in its group and not scaled, as the authors do."""

    settings_type = RLCR
    requires = Requirement("a task whose answers state a confidence", lambda task: task.states_confidence)

    settings: RLCR

    def signals(self, played: Played) -> dict[str, Tensor]:
        answers = [self.task.read(q, text) for q, text in zip(played.questions, played.texts, strict=True)]
        correct = torch.tensor([answer.correct for answer in answers])
        confidence = torch.tensor([answer.confidence or 0.0 for answer in answers])
        well_formed = torch.tensor([answer.confidence is not None for answer in answers])
        return {"rewards": rlcr.rewards(correct, confidence, form=self.settings.form, well_formed=well_formed)}

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Assigned:
        rewards = signals["rewards"]
        advantages = tk.group_advantages(rewards, played.batch.group_ids, scale="none", singleton="zero")
        return Assigned(advantages, values={"rlcr": rewards})
