"""What goes in front of any reward and behind any advantage."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trajkern.recipes.dro import gate
from trajkern.trainer.systems.base import Assigned, GroupSystem, Local, Played
from trajkern.trainer.systems.hints import hinted_logprobs
from trajkern.trainer.tasks.base import Question, Task

Gate = Literal["drop_rollout", "reject_group_if_any_fails", "reject_group_if_all_fail", "pass_rate"]
Rubric = Callable[[Sequence[Question], Sequence[str]], Sequence[bool]]


@dataclass(frozen=True)
class Compose:
    """What goes in front of any reward and behind any advantage.

    Args:
        rubric: "well_formed", or "package.module:function", called with the questions and the texts of all rollouts of
            a step and returning a flag for each (a judge's verdict, for one). Rollouts that fail it are gated out.
        gate: what becomes of those and of their groups; see trajkern.recipes.dro.gate.
        threshold: the share that "pass_rate" asks for.
        positive_weight: of positive advantages; below 1, failure teaches more than success (W-REINFORCE).
        hint_weight: of log p(with the task's hint) - log p, added to the advantage of each token.
    """

    rubric: str | None = None
    gate: Gate = "drop_rollout"
    threshold: float = 0.5
    positive_weight: float = 1.0
    hint_weight: float = 0.0


def load_rubric(name: str | None, task: Task) -> Rubric | None:
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


def gated(compose: Compose, task: Task, played: Played, values: Local) -> tuple[Played, Tensor]:
    """The rollouts that the rubric and its gate let through, and which they are; the others enter no statistic."""
    check, groups = load_rubric(compose.rubric, task), played.batch.group_ids
    if check is None:
        return played, torch.ones_like(groups, dtype=torch.bool)
    passed = torch.tensor([bool(x) for x in check(played.questions, played.texts)])
    keep = gate(passed, groups, mode=compose.gate, threshold=compose.threshold)
    values["gated_rollouts"] = int((~keep).sum())
    values["emptied_groups"] = len(groups.unique()) - len(groups[keep].unique())
    return played.select(keep), keep


def composed(compose: Compose, system: GroupSystem, played: Played, assigned: Assigned) -> Assigned:
    """The recipe's advantages, positive ones weighed, a hint's term added."""
    batch, advantages = played.batch, assigned.advantages
    if compose.positive_weight != 1:
        advantages = torch.where(advantages > 0, compose.positive_weight * advantages, advantages)
    if not compose.hint_weight:
        return assigned._replace(advantages=advantages)
    assert batch.sampler_logprobs is not None
    if not assigned.per_token:
        advantages = torch.repeat_interleave(advantages, batch.lengths)
    gain = hinted_logprobs(system, played) - batch.sampler_logprobs
    return assigned._replace(advantages=advantages + compose.hint_weight * batch.loss_mask * gain, per_token=True)
