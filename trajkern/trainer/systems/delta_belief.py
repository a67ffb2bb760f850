"""Delta-Belief-RL: a turn is worth how much likelier it made the hidden answer in the policy's own eyes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from trajkern import Spans, credit
from trajkern.trainer.systems.base import GroupSystem, Local, Played, Requirement
from trajkern.trainer.systems.scoring import scorer
from trajkern.trainer.tasks.twenty_questions import END, GUESS, TwentyQuestions, read_game

INVALID = -5.0  # a turn that says nothing


@dataclass(frozen=True)
class DeltaBelief:
    """Recipe delta_belief; a task that can be asked for its belief (twenty_questions).

    Args:
        scale: of the gain in log-probability of the hidden answer.
        clip: whether a loss of belief counts as none.
        win_reward: of every turn of a game that is won.
        turn_cost: of every turn, for each turn.
        penalties: whether invalid and repeated questions cost.
        finished: how the statistics of a turn count rollouts that had ended before it.
    """

    scale: float = 0.1
    clip: bool = True
    win_reward: float = 2.0
    turn_cost: float = 0.05
    penalties: bool = True
    finished: Literal["included", "masked"] = "included"


class TurnBeliefs(GroupSystem):
    """Knows the rewards "turn" of the policy's turns, and "gain", what each added to its belief in the hidden entity.

    After every turn of every rollout the policy is asked for that, all in one packed forward.
    """

    settings_type = DeltaBelief
    requires = Requirement(
        "a task that knows a hidden answer: twenty_questions", lambda task: isinstance(task, TwentyQuestions)
    )
    splits_groups = False  # what reads alike scores alike to the bit only in one forward
    knows = frozenset({"span_rewards:turn", "span_rewards:gain", "span_rewards:penalty"})

    settings: DeltaBelief
    task: TwentyQuestions

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
        asked = credit.Rollouts(
            batch,
            rows=[{"belief_target": q.entry["entity"] + END, "belief_probe": GUESS} for q in played.questions],
            flags={"finished": torch.tensor([read_game(text).guess is not None for text in played.texts])},
            span_rewards={"penalty": penalty},
            score=scorer(self.policy),
        )
        options: dict[str, Any] = {name: getattr(settings, name) for name in ("scale", "clip", "win_reward")}
        reward = credit.scored.BeliefGain(turn_cost=settings.turn_cost, **options)
        beliefs, bounds = reward.beliefs(asked)
        after = torch.arange(len(turns)) + turns.trajectory + 1
        rewards = {"turn": reward(asked), "gain": beliefs[after] - beliefs[after - 1], "penalty": penalty}
        return {"span_rewards": rewards}

    def report(self, rollouts: credit.Rollouts, needs: frozenset[str]) -> Local:
        if "turn" not in rollouts.span_rewards:
            return {}
        gain = rollouts.span_rewards["gain"]
        return {"turn_reward": rollouts.span_rewards["turn"], "belief_gain": gain[gain.isfinite()]}

    def _penalties(self, played: Played, counts: list[int]) -> list[float]:
        """One a turn; an end-of-sequence token that no question or guess goes with is a turn, too."""
        out = []
        for question, text, count in zip(played.questions, played.texts, counts, strict=True):
            penalties = self.task.penalties(question, text)
            out += (penalties + [INVALID] * count)[:count]
        return out
