"""RLCR: answers that state how sure they are, rewarded for being right and for knowing it."""

from __future__ import annotations

import torch
from torch import Tensor

import trajkern as tk
from trajkern.recipes import rlcr
from trajkern.trainer.systems.base import Found, Played, System


class Calibrated(System):
    """The reward of :func:`trajkern.recipes.rlcr.rewards`, centred in its group and not scaled, as the authors do."""

    def signals(self, played: Played) -> dict[str, Tensor]:
        answers = [self.task.read(q, text) for q, text in zip(played.questions, played.texts, strict=True)]
        correct = torch.tensor([answer.correct for answer in answers])
        confidence = torch.tensor([answer.confidence or 0.0 for answer in answers])
        well_formed = torch.tensor([answer.confidence is not None for answer in answers])
        return {"rewards": rlcr.rewards(correct, confidence, form=self.config.rlcr.form, well_formed=well_formed)}

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Found:
        rewards = signals["rewards"]
        advantages = tk.group_advantages(rewards, played.batch.group_ids, scale="none", singleton="zero")
        return Found(advantages, values={"rlcr": rewards})
