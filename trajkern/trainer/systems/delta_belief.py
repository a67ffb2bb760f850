"""Delta-Belief-RL: a turn is worth how much likelier it made the hidden answer in the policy's own eyes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trajkern import Spans, spread
from trajkern.recipes import delta_belief
from trajkern.trainer.packing import Piece
from trajkern.trainer.systems.base import Assigned, GroupSystem, Played, Requirement
from trajkern.trainer.systems.scoring import score_pieces
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
    """After every turn of every rollout the policy is asked for the hidden entity, all in one packed forward."""

    settings_type = DeltaBelief
    requires = Requirement(
        "a task that knows a hidden answer: twenty_questions", lambda task: isinstance(task, TwentyQuestions)
    )
    dealable = False  # rollouts differ in their number of turns

    settings: DeltaBelief
    task: TwentyQuestions

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Assigned:
        settings, batch = self.settings, played.batch
        turns = Spans.turns(batch.loss_mask, batch.cu_seqlens)
        counts = torch.bincount(turns.trajectory, minlength=len(played.texts))
        beliefs, bounds = self.beliefs(played, turns.start, turns.trajectory, counts)
        penalty = torch.tensor(self._penalties(played, counts.tolist())) * settings.penalties
        options: dict[str, Any] = {"scale": settings.scale, "clip": settings.clip, "win_reward": settings.win_reward}
        won = signals["rewards"] > 0
        rewards = delta_belief.turn_rewards(
            beliefs, bounds, won=won, penalty=penalty, turn_cost=settings.turn_cost, **options
        )
        where = (turns.trajectory, turns.index, batch.group_ids)
        advantages = delta_belief.turn_advantages(rewards, *where, finished=settings.finished)
        gain = beliefs.diff()
        return Assigned(
            spread(advantages, turns),
            per_token=True,
            values={"turn_reward": rewards, "belief_gain": gain[gain.isfinite()]},
        )

    def beliefs(self, played: Played, start: Tensor, trajectory: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """log p(hidden entity) before the first turn and after each, NaN after a guess; and the rollouts' bounds."""
        batch, asked = played.batch, []
        bounds = torch.cat((counts.new_zeros(1), (counts + 1).cumsum(0)))
        every = played.trajectories()
        starts: list[list[int]] = [[] for _ in every]
        for position, n in zip((start - batch.cu_seqlens[trajectory]).tolist(), trajectory.tolist(), strict=True):
            starts[n].append(position)
        pieces: list[list[Piece]] = []
        for n, (question, text, tokens) in enumerate(zip(played.questions, played.texts, every, strict=True)):
            target = self.policy.encode(question.entry["entity"] + END)
            ends = [*starts[n], len(tokens)] if starts[n] else [len(tokens)]
            if read_game(text).guess is not None:
                ends.pop()
            asked += [int(bounds[n]) + turn for turn in range(len(ends))]
            pieces += [[(tokens[:stop] + self.policy.encode(GUESS), False), (target, True)] for stop in ends]
        owner = torch.searchsorted(bounds, torch.tensor(asked), right=True) - 1
        scores = score_pieces(self.policy, pieces, batch.group_ids[owner])
        lengths = scores.cu_seqlens.diff()
        belief = torch.zeros(len(pieces)).index_add(
            0, torch.arange(len(pieces)).repeat_interleave(lengths), scores.logprobs
        )
        return torch.full((int(bounds[-1]),), torch.nan).index_copy(0, torch.tensor(asked), belief), bounds

    def _penalties(self, played: Played, counts: list[int]) -> list[float]:
        """One a turn; an end-of-sequence token that no question or guess goes with is a turn, too."""
        out = []
        for question, text, count in zip(played.questions, played.texts, counts, strict=True):
            penalties = self.task.penalties(question, text)
            out += (penalties + [INVALID] * count)[:count]
        return out
