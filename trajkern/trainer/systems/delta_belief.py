"""Delta-Belief-RL: a turn is worth how much likelier it made the hidden answer in the policy's own eyes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from trajkern import Spans, credit
from trajkern.trainer.schema import Finite
from trajkern.trainer.systems.base import GroupSystem, Local, Played, Requirement
from trajkern.trainer.tasks.capabilities import Belief, BeliefTask, PenaltyTask

INVALID = -5.0  # a turn that says nothing


@dataclass(frozen=True)
class DeltaBelief:
    """Recipe delta_belief; a task whose policy can be asked for its belief (twenty_questions).

    Args:
        scale: of the gain in log-probability of the hidden answer; with 0 the policy is not asked.
        clip: whether a loss of belief counts as none.
        win_reward: of every turn of a game that is won.
        turn_cost: of every turn, for each turn.
        penalties: whether invalid and repeated turns cost what the task says; a task that says nothing has none.
        finished: how the statistics of a turn count rollouts that had ended before it.
    """

    scale: Finite = 0.1
    clip: bool = True
    win_reward: Finite = 2.0
    turn_cost: Finite = 0.05
    penalties: bool = True
    finished: Literal["included", "masked"] = "included"


class TurnBeliefs(GroupSystem):
    """Knows the rewards "turn" of the policy's turns, and "gain", what each added to its belief in the hidden answer.

    After every turn of every rollout the policy is asked for that, all in one packed forward.
    """

    settings_type = DeltaBelief
    requires = Requirement("one with `belief_target`, a hidden answer", lambda task: isinstance(task, BeliefTask))
    splits_groups = False  # what reads alike scores alike to the bit only in one forward
    knows = frozenset({"span_rewards:turn", "span_rewards:gain", "span_rewards:penalty"})

    settings: DeltaBelief

    @classmethod
    def expression(cls, recipe: str, settings: DeltaBelief) -> credit.Spec:
        return credit.recipe(recipe, reward="turn", finished=settings.finished)

    def known(self, played: Played, needs: frozenset[str]) -> dict[str, Any]:
        batch, settings = played.batch, self.settings
        turns = Spans.turns(batch.loss_mask, batch.cu_seqlens)
        counts = torch.bincount(turns.trajectory, minlength=len(played.texts))
        penalty = torch.tensor(self._penalties(played, counts.tolist())) * settings.penalties
        if not needs & {"span_rewards:turn", "span_rewards:gain"}:
            return {"span_rewards": {"penalty": penalty}}
        asking = self._asking(played)
        asked = credit.Rollouts(
            batch,
            rows=[{"belief_target": belief.target, "belief_probe": belief.probe} for belief, _ in asking],
            flags={"finished": torch.tensor([finished for _, finished in asking])},
            span_rewards={"penalty": penalty},
            score=self.score,
        )
        options: dict[str, Any] = {name: getattr(settings, name) for name in ("scale", "clip", "win_reward")}
        reward = credit.scored.BeliefGain(turn_cost=settings.turn_cost, **options)
        rewards = {"turn": reward(asked), "penalty": penalty}
        if settings.scale or "span_rewards:gain" in needs:
            beliefs, _ = reward.beliefs(asked)
            after = torch.arange(len(turns)) + turns.trajectory + 1
            rewards["gain"] = beliefs[after] - beliefs[after - 1]
        return {"span_rewards": rewards}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        found: Local = {}
        if "turn" in rollouts.span_rewards:
            found["turn_reward"] = rollouts.span_rewards["turn"]
        if "gain" in rollouts.span_rewards:
            gain = rollouts.span_rewards["gain"]
            found["belief_gain"] = gain[gain.isfinite()]
        return found

    def _asking(self, played: Played) -> list[tuple[Belief, bool]]:
        """How each rollout's belief is asked for, and whether it ended with what is not to be asked after."""
        assert isinstance(self.task, BeliefTask)
        asking = []
        for question, text in zip(played.questions, played.texts, strict=True):
            first, last = (self.task.belief_target(question, x) for x in ("", text))
            if first is None or last not in (None, first):
                one = "one Belief after every turn of a question, None after the last at most"
                raise ValueError(f"belief_target of task {self.task.name} must be {one}; got {first}, then {last}")
            asking.append((first, last is None))
        return asking

    def _penalties(self, played: Played, counts: list[int]) -> list[float]:
        """One a turn; an end-of-sequence token that no question or guess goes with is a turn, too."""
        if not isinstance(self.task, PenaltyTask):
            return [0.0] * sum(counts)
        out = []
        for question, text, count in zip(played.questions, played.texts, counts, strict=True):
            penalties = self.task.penalties(question, text)
            out += (penalties + [INVALID] * count)[:count]
        return out
