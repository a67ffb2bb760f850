"""Rewards that ask the policy: how likely it makes an answer that it did not write (DRO, delta-belief)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_flag, check_number
from trajkern.credit.part import written_call
from trajkern.credit.rollouts import Rollouts
from trajkern.ops.reflection import reflection_rewards
from trajkern.recipes import delta_belief, dro
from trajkern.recipes._groups import pair_ids

WEIGHTS = ("variance", "uniform")


@dataclass(frozen=True)
class Reflection:
    """DRO's reward: how likely the reasoning makes ``rows[n]["reference"]``, most where a group's rollouts differ.

    A rollout's reasoning ends with its last span of that name.
    """

    span: str = "reasoning"
    weights: str = "variance"
    masked: bool = False
    outcome_weight: float = 0.0

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, WEIGHTS)
        check_flag("masked", self.masked)
        check_number("outcome_weight", self.outcome_weight, low=0, dtype=torch.float32)

    @property
    def needs(self) -> frozenset[str]:
        names = {"score", f"spans:{self.span}", "rows:reference"}
        return frozenset(names | ({"reward"} if self.outcome_weight else set()))

    def __call__(self, rollouts: Rollouts) -> Tensor:
        rewards = self.of_reference(rollouts)[0]
        if self.outcome_weight:
            rewards = rewards + self.outcome_weight * rollouts.reward("reward")
        return rewards

    def of_reference(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """The rewards, and each rollout's group's score, ``[N]`` each."""
        return rollouts.once((self, "reference"), lambda: self._compared(rollouts))

    def scored(self, rollouts: Rollouts, ranks: bool = False) -> tuple[Tensor, ...]:
        """What the policy makes of the references behind the reasoning."""
        ends = _ends_of(rollouts, self.span)
        contexts = [tokens[:end] for tokens, end in zip(rollouts.token_lists, ends, strict=True)]
        return rollouts.once((self.span, "scores", ranks), lambda: _score(rollouts, contexts, ranks=ranks))

    def _compared(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        logprobs, bounds = self.scored(rollouts)[:2]
        gain = logprobs
        if self.masked:
            contexts = [tokens[:end] for tokens, end in zip(rollouts.token_lists, rollouts.prompt_lengths, strict=True)]
            gain = logprobs - _score(rollouts, contexts)[0]
        groups, lengths = (rollouts.ranks.gather(x) for x in (rollouts.batch.group_ids, bounds.diff()))
        of_all = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        every, gains = (rollouts.ranks.gather_packed(x, lengths) for x in (logprobs, gain))
        result = reflection_rewards(every, of_all, groups, baseline=every - gains)
        rewards = result.rewards
        if self.weights == "uniform":
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=gain.device), lengths)
            rewards = torch.zeros_like(rewards).index_add(0, owner, gains) / lengths
        score = result.group_score[pair_ids(groups)]
        return rollouts.ranks.own(rewards), rollouts.ranks.own(score)

    def __repr__(self) -> str:
        return written_call(f"credit.scored.{type(self).__name__}", self)


@dataclass(frozen=True)
class InReach:
    """DRO's filter of prompts: those on which rollouts differ, and whose reference the policy nearly gives."""

    reward: Reflection
    drop_fraction: float = 0.0
    top_k: int = 0
    worst_fraction: float = 0.25

    @property
    def needs(self) -> frozenset[str]:
        return self.reward.needs

    def __call__(self, rollouts: Rollouts) -> Tensor:
        gather, own = rollouts.ranks.gather, rollouts.ranks.own
        groups = pair_ids(gather(rollouts.batch.group_ids))
        score = gather(self.reward.of_reference(rollouts)[1])
        of_group = torch.zeros(int(groups.max()) + 1, dtype=score.dtype, device=score.device).scatter(0, groups, score)
        keep = own(dro.keep_groups(of_group, drop_fraction=self.drop_fraction)[groups])
        if self.top_k:
            _, bounds, places = self.reward.scored(rollouts, ranks=True)
            lengths = gather(bounds.diff())
            of_all = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
            worst: dict[str, Any] = {"worst_fraction": self.worst_fraction, "top_k": self.top_k}
            keep = keep & own(dro.rank_filter(rollouts.ranks.gather_packed(places, lengths), of_all, groups, **worst))
        return keep

    def __repr__(self) -> str:
        return written_call(f"credit.scored.{type(self).__name__}", self)


@dataclass(frozen=True)
class BeliefGain:
    """Delta-belief's reward of each turn: what it added to log p of ``rows[n]["belief_target"]``, asked by
    ``rows[n]["belief_probe"]``; see :func:`trajkern.recipes.delta_belief.turn_rewards`.

    Reads, where they are: flags "finished" (nothing is asked after the last turn), span_rewards "penalty".
    """

    scale: float = 0.1
    clip: bool = True
    win_reward: float = 2.0
    turn_cost: float = 0.05
    needs = frozenset({"score", "reward", "spans:turn", "rows:belief_target"})

    def __call__(self, rollouts: Rollouts) -> Tensor:
        turns = rollouts.spans["turn"]
        beliefs, bounds = rollouts.once(("beliefs",), lambda: _beliefs(rollouts))
        penalty = rollouts.span_rewards.get("penalty", beliefs.new_zeros(len(turns)))
        won = rollouts.reward("reward") > 0
        options = {name: getattr(self, name) for name in ("scale", "clip", "win_reward", "turn_cost")}
        return delta_belief.turn_rewards(beliefs, bounds, won=won, penalty=penalty, **options)

    def __repr__(self) -> str:
        return written_call(f"credit.scored.{type(self).__name__}", self)


def _score(rollouts: Rollouts, contexts: list[Any], *, ranks: bool = False) -> tuple[Tensor, ...]:
    targets = [row["reference"] for row in rollouts.rows]  # type: ignore[union-attr]
    return rollouts.score(contexts, targets, ranks=ranks)  # type: ignore[misc]


def _ends_of(rollouts: Rollouts, name: str) -> list[int]:
    """Where the last span of this name ends in each rollout; where the prompt does in one without."""
    spans, ends = rollouts.spans[name], list(rollouts.prompt_lengths)
    begin = rollouts.batch.cu_seqlens.tolist()
    for n, end in zip(spans.trajectory.tolist(), spans.end.tolist(), strict=True):
        ends[n] = end - begin[n]
    return ends


def _beliefs(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """log p of the hidden answer before each rollout's first turn and after each, NaN where not asked; and bounds."""
    turns, device = rollouts.spans["turn"], rollouts.device
    counts = group_counts(turns.trajectory, len(rollouts))
    bounds = torch.cat((counts.new_zeros(1), (counts + 1).cumsum(0)))
    asked, contexts, targets = [], [], []
    for n, stops in enumerate(_stops(rollouts, counts.tolist())):
        row = rollouts.rows[n]  # type: ignore[index]
        for turn, stop in enumerate(stops):
            asked.append(int(bounds[n]) + turn)
            contexts.append((rollouts.token_lists[n][:stop], row.get("belief_probe", "")))
            targets.append(row["belief_target"])
    logprobs, lengths = rollouts.score(contexts, targets)  # type: ignore[misc]
    owner = torch.repeat_interleave(torch.arange(len(targets), device=device), lengths.diff())
    belief = torch.zeros(len(targets), dtype=logprobs.dtype, device=device).index_add(0, owner, logprobs)
    every = torch.full((int(bounds[-1]),), torch.nan, dtype=belief.dtype, device=device)
    return every.index_copy(0, torch.tensor(asked, device=device, dtype=torch.int64), belief), bounds


def _stops(rollouts: Rollouts, counts: list[int]) -> Iterator[list[int]]:
    """How much of each rollout the policy has seen at each question: up to each of its turns, and all of it."""
    starts, begin = rollouts.spans["turn"].start.tolist(), rollouts.batch.cu_seqlens.tolist()
    finished = rollouts.flags.get("finished")
    over = [False] * len(counts) if finished is None else finished.tolist()
    first = 0
    for n, (count, (low, high)) in enumerate(zip(counts, pairwise(begin), strict=True)):
        stops = [start - low for start in starts[first : first + count]] + [high - low]
        first += count
        yield stops[:-1] if over[n] and count else stops


def group_counts(owner: Tensor, count: int) -> Tensor:
    """How many spans each rollout has, int64 ``[N]``."""
    return torch.zeros(count, dtype=torch.int64, device=owner.device).index_add(
        0, owner.long(), torch.ones_like(owner, dtype=torch.int64)
    )
