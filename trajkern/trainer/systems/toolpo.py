"""ToolPO: the outcome teaches every token, right calls and what folding saves teach the tokens that acted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trajkern import credit
from trajkern.recipes import toolpo
from trajkern.trainer.returned import as_text
from trajkern.trainer.schema import Finite
from trajkern.trainer.systems.actions import action_spans, actions_of, completions
from trajkern.trainer.systems.base import GroupSystem, Local, Played, Requirement, load_function
from trajkern.trainer.tasks.base import Task
from trajkern.trainer.tasks.capabilities import Action, ActionTask, SimulatedTask


@dataclass(frozen=True)
class ToolPO:
    """Recipe toolpo; a task that marks actions, such as calls of tools.

    Args:
        call_weight: of each right call.
        preference_weight: of how much shorter a rollout that folds its memory is than those of its group that do not.
        attribution: whether the tool reward reaches the tokens of calls and folds only, or every token.
        simulate: package.module:function that answers the calls in training in place of the task's tools, which
            evaluation asks; see trajkern.recipes.toolpo.Simulator.
    """

    call_weight: Finite = 1.0
    preference_weight: Finite = 1.0
    attribution: bool = True
    simulate: str | None = None


class ToolRewards(GroupSystem):
    """Knows the rewards "action", of right calls and of folding, and "preference", the latter's part of it before its
    weight; and the spans "call" of calls and folds, each with its delimiters."""

    settings_type = ToolPO
    requires = Requirement(
        "one with `action_spans` (of a file: the column actions)", lambda task: isinstance(task, ActionTask)
    )
    knows = frozenset({"action", "preference", "spans:call"})

    settings: ToolPO

    def __post_init__(self) -> None:
        if self.settings.simulate is not None:
            assert isinstance(self.task, SimulatedTask)
            check = partial(as_text, alphabet=self.policy.alphabet)
            self.task = self.task.simulated(load_function("toolpo.simulate", self.settings.simulate, check))

    @classmethod
    def expression(cls, recipe: str, settings: ToolPO) -> credit.Spec:
        if settings.attribution:
            return credit.recipe(recipe)
        centred: dict[str, Any] = {"scale": "none", "singleton": "zero"}
        return credit.outcome(**centred) + credit.outcome("action", **centred)

    @classmethod
    def check(cls, recipe: str, settings: ToolPO, task: Task) -> None:
        super().check(recipe, settings, task)
        if settings.simulate is not None:
            load_function("toolpo.simulate", settings.simulate)
            if not isinstance(task, SimulatedTask):
                raise ValueError(f"task must be one with `simulated`, for toolpo.simulate; got {task.name!r}")

    def known(self, played: Played, needs: frozenset[str]) -> dict[str, Any]:
        return {"spans": {"call": action_spans(self.policy, played, actions_of(self.task, played))}}

    def signals(self, played: Played, needs: frozenset[str]) -> dict[str, Tensor]:
        settings, actions = self.settings, actions_of(self.task, played)
        right = torch.tensor([sum(action.right and not action.folds for action in some) for some in actions])
        preference = self._preference(played, actions)
        weights = {"call_weight": settings.call_weight, "preference_weight": settings.preference_weight}
        action = toolpo.action_rewards(right.long(), preference, **weights)
        return {"reward": played.rewards, "action": action, "preference": preference}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        return {"action_reward": rollouts.reward("action"), "preference": rollouts.reward("preference")}

    def _preference(self, played: Played, actions: list[list[Action]]) -> Tensor:  # [N]
        """Of each rollout against its group's, which may lie on several ranks."""
        spent = [end - begin for begin, end in completions(played.batch)]
        folded = [any(action.folds for action in some) for some in actions]
        own = list(zip(spent, folded, played.batch.group_ids.tolist(), strict=True))
        counts = self.ranks.gather([len(own)])
        rows = torch.tensor(self.ranks.gather(own), dtype=torch.int64).view(-1, 3)
        preference = toolpo.group_preference(rows[:, 0], rows[:, 1].bool(), rows[:, 2])
        begin = sum(counts[: self.ranks.part])
        return preference[begin : begin + len(own)]
