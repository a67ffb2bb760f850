"""How the confidence that answers state agrees with what came true."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trajkern.recipes import rlcr
from trajkern.trainer.tasks.base import Question, Task


def calibration(task: Task, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """The figures "ece", "brier" and "auroc" of the answers that state a confidence, which are those of
    :func:`trajkern.recipes.rlcr.calibration`, and "well_formed", the share of the texts that state one; none of them
    where a task's answers do not."""
    if not task.states_confidence:
        return {}
    answers = [task.read(question, text) for question, text in zip(questions, texts, strict=True)]
    stated = [(answer.correct, answer.confidence) for answer in answers if answer.confidence is not None]
    found = rlcr.calibration(
        torch.tensor([correct for correct, _ in stated], dtype=torch.bool),
        torch.tensor([confidence for _, confidence in stated], dtype=torch.float64),
    )
    figures = {name: getattr(found, name).item() for name in ("ece", "brier", "auroc")}
    return figures | {"well_formed": len(stated) / max(len(answers), 1)}
