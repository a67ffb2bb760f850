"""ToolPO: the outcome teaches every token, right calls teach the tokens that made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajkern import Spans, credit
from trajkern.recipes import toolpo
from trajkern.trainer.systems.base import GroupSystem, Local, Played, Requirement
from trajkern.trainer.tasks.tools import CALL, END, ToolTask


@dataclass(frozen=True)
class ToolPO:
    """Recipe toolpo; a task with tools.

    Args:
        call_weight: of each right call.
        attribution: whether the tool reward reaches the tokens of the calls only, or every token.
    """

    call_weight: float = 1.0
    attribution: bool = True


class ToolRewards(GroupSystem):
    """Knows the reward "action" of right calls, and the spans "call", each with its delimiters."""

    settings_type = ToolPO
    requires = Requirement("a task with tools", lambda task: isinstance(task, ToolTask))
    knows = frozenset({"action", "spans:call"})

    settings: ToolPO
    task: ToolTask

    @classmethod
    def expression(cls, recipe: str, settings: ToolPO) -> credit.Spec:
        if settings.attribution:
            return credit.recipe(recipe)
        centred: dict[str, Any] = {"scale": "none", "singleton": "zero"}
        return credit.outcome(**centred) + credit.outcome("action", **centred)

    def known(self, played: Played, needs: frozenset[str]) -> dict[str, Any]:
        return {"spans": {"call": self.calls(played)}}

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:
        calls = [self.task.right_calls(q, text) for q, text in zip(played.questions, played.texts, strict=True)]
        right = torch.tensor(calls, dtype=torch.float32)
        action = toolpo.action_rewards(right, torch.zeros_like(right), call_weight=self.settings.call_weight)
        return {"reward": played.rewards, "action": action}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        return {"action_reward": rollouts.reward("action")}

    def calls(self, played: Played) -> Spans:
        """Of each turn of the policy that ends with a call, from the call's beginning."""
        batch = played.batch
        turns = Spans.turns(batch.loss_mask, batch.cu_seqlens)
        starts = turns.start.clone()
        for turn, (begin, end) in enumerate(zip(turns.start.tolist(), turns.end.tolist(), strict=True)):
            tokens = batch.tokens[begin:end].tolist()
            first = len(tokens)
            if self.policy.spelling(tokens).endswith(END):
                while first and CALL not in self.policy.spelling(tokens[first:]):
                    first -= 1
            starts[turn] = begin + first
        called = starts < turns.end
        end, owner, index = (x[called] for x in (turns.end, turns.trajectory, turns.index))
        return Spans(starts[called], end, owner, index, batch.num_tokens)
