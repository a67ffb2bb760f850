"""ToolPO: the outcome teaches every token, right calls teach the tokens that made them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trajkern import Spans
from trajkern.recipes import toolpo
from trajkern.trainer.systems.base import Assigned, GroupSystem, Played, Requirement
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
    """Advantages of :func:`trajkern.recipes.toolpo.token_advantages`; a call's tokens include its delimiters."""

    settings_type = ToolPO
    requires = Requirement("a task with tools", lambda task: isinstance(task, ToolTask))

    settings: ToolPO
    task: ToolTask

    def signals(self, played: Played) -> dict[str, Tensor]:
        calls = [self.task.right_calls(q, text) for q, text in zip(played.questions, played.texts, strict=True)]
        right = torch.tensor(calls, dtype=torch.float32)
        action = toolpo.action_rewards(right, torch.zeros_like(right), call_weight=self.settings.call_weight)
        return {"rewards": played.rewards, "action": action}

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Assigned:
        batch = played.batch
        mask = self.action_mask(played) if self.settings.attribution else batch.loss_mask
        where = (batch.group_ids, mask, batch.cu_seqlens)
        advantages = toolpo.token_advantages(signals["rewards"], signals["action"], *where)
        return Assigned(advantages, per_token=True, values={"action_reward": signals["action"]})

    def action_mask(self, played: Played) -> Tensor:  # [T] bool
        """The tokens of calls: of each turn of the policy that ends with one, from the call's beginning."""
        batch, mask = played.batch, torch.zeros_like(played.batch.loss_mask)
        turns = Spans.turns(batch.loss_mask, batch.cu_seqlens)
        for begin, end in zip(turns.start.tolist(), turns.end.tolist(), strict=True):
            tokens = batch.tokens[begin:end].tolist()
            if not self.policy.spelling(tokens).endswith(END):
                continue
            first = len(tokens)
            while first and CALL not in self.policy.spelling(tokens[first:]):
                first -= 1
            mask[begin + first : end] = True
        return mask
