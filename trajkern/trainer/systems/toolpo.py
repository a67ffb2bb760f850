"""ToolPO: the outcome teaches every token, right calls teach the tokens that made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajkern import credit
from trajkern.recipes import toolpo
from trajkern.trainer.systems.actions import action_spans, actions_of
from trajkern.trainer.systems.base import GroupSystem, Local, Played, Requirement
from trajkern.trainer.tasks.capabilities import ActionTask


@dataclass(frozen=True)
class ToolPO:
    """Recipe toolpo; a task that marks actions, such as calls of tools.

    Args:
        call_weight: of each right call.
        attribution: whether the tool reward reaches the tokens of the calls only, or every token.
    """

    call_weight: float = 1.0
    attribution: bool = True


class ToolRewards(GroupSystem):
    """Knows the reward "action" of right calls, and the spans "call", each with its delimiters."""

    settings_type = ToolPO
    requires = Requirement(
        "one with `action_spans` (of a file: the column actions)", lambda task: isinstance(task, ActionTask)
    )
    knows = frozenset({"action", "spans:call"})

    settings: ToolPO

    @classmethod
    def expression(cls, recipe: str, settings: ToolPO) -> credit.Spec:
        if settings.attribution:
            return credit.recipe(recipe)
        centred: dict[str, Any] = {"scale": "none", "singleton": "zero"}
        return credit.outcome(**centred) + credit.outcome("action", **centred)

    def known(self, played: Played, needs: frozenset[str]) -> dict[str, Any]:
        return {"spans": {"call": action_spans(self.policy, played, actions_of(self.task, played))}}

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:
        calls = [sum(action.right for action in actions) for actions in actions_of(self.task, played)]
        right = torch.tensor(calls, dtype=torch.float32)
        action = toolpo.action_rewards(right, torch.zeros_like(right), call_weight=self.settings.call_weight)
        return {"reward": played.rewards, "action": action}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        return {"action_reward": rollouts.reward("action")}
