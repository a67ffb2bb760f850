"""Rewards that ask the policy: how likely it makes an answer that it did not write (DRO, delta-belief)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trajkern._checks import (
    check_choice,
    check_count,
    check_flag,
    check_instance,
    check_number,
    check_shape,
    check_tensor,
    checked_field,
    describe,
)
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern._values import check_offsets
from trajkern.credit.part import Value, check_name
from trajkern.credit.rollouts import Rollouts, spans_each, widened
from trajkern.ops.reflection import reflection_rewards
from trajkern.recipes import delta_belief, dro
from trajkern.recipes._groups import pair_ids

WEIGHTS = ("variance", "uniform")


@dataclass(frozen=True, repr=False)
class Reflection(Value):
    """DRO's reward: how likely the reasoning makes ``rows[n]["reference"]``, most where a group's rollouts differ.

    A rollout's reasoning ends with its last span of that name. With ``propagation`` above 0, its log-probs are those of
    :func:`trajkern.recipes.dro.propagated` at that gamma, of ``reflective`` of the reference's tokens.
    """

    span: str = "reasoning"
    weights: str = "variance"
    masked: bool = False
    outcome_weight: float = 0.0
    propagation: float = 0.0
    reflective: float = 0.1

    def __post_init__(self) -> None:
        check_name("span", self.span)
        checked_field(self, check_choice, "weights", WEIGHTS)
        checked_field(self, check_flag, "masked")
        checked_field(self, check_number, "outcome_weight", low=0, dtype=torch.float32)
        checked_field(self, check_number, "propagation", low=0)
        checked_field(self, check_number, "reflective", above=0, high=1)
        if self.masked and self.propagation:
            raise ValueError(f"propagation must be 0 where masked is True, which stands for it; got {self.propagation}")

    @property
    def needs(self) -> frozenset[str]:
        names = {"score", f"spans:{self.span}", "rows:reference"}
        return frozenset(names | ({"reward"} if self.outcome_weight else set()))

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return self.among(rollouts, None)

    def among(self, rollouts: Rollouts, keep: Tensor | None) -> Tensor:  # [N] bool
        """The rewards of these rollouts, compared with each other alone; NaN for the others."""
        rewards = self._compared(rollouts, keep)[0] if keep is not None else self.of_reference(rollouts)[0]
        if self.outcome_weight:
            rewards = rewards + self.outcome_weight * rollouts.reward("reward")
        return rewards

    def of_reference(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """The rewards, and each rollout's group's score, ``[N]`` each."""
        return rollouts.once((self, "reference"), lambda: self._compared(rollouts, None))

    def scored(self, rollouts: Rollouts, ranks: bool = False) -> tuple[Tensor, ...]:
        """What the policy makes of the references behind the reasoning; with ranks, too, if these were there before."""
        ranks = ranks or (self.span, "scores", True) in rollouts.memory
        ends = _ends_of(rollouts, self.span)
        contexts = [tokens[:end] for tokens, end in zip(rollouts.token_lists, ends, strict=True)]
        return rollouts.once((self.span, "scores", ranks), lambda: _references(rollouts, contexts, ranks=ranks))

    def _compared(self, rollouts: Rollouts, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        logprobs, bounds = self.scored(rollouts)[:2]
        gain, lengths = logprobs, bounds.diff()
        if self.masked:
            contexts = [tokens[:end] for tokens, end in zip(rollouts.token_lists, rollouts.prompt_lengths, strict=True)]
            gain = logprobs - rollouts.once("masked references", lambda: _references(rollouts, contexts))[0]
        groups, lengths = (rollouts.ranks.gather(x) for x in (rollouts.batch.group_ids.long(), lengths))
        if keep is not None:  # the others are groups of their own
            groups = pair_ids(rollouts.ranks.gather(keep).long(), groups)
        of_all = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
        every, gains = (rollouts.ranks.gather_packed(x, lengths) for x in (logprobs, gain))
        result = reflection_rewards(every, of_all, groups, baseline=every - gains)
        rewards = result.rewards
        if self.propagation:
            options = {"gamma": self.propagation, "fraction": self.reflective}
            gains = dro.propagated(every, of_all, result.std, **options)
        if self.weights == "uniform" or self.propagation:
            owner = torch.repeat_interleave(torch.arange(len(lengths), device=gain.device), lengths)
            weighed = gains.double() if self.weights == "uniform" else gains.double() * result.weights
            total = torch.zeros(len(lengths), dtype=torch.float64, device=gain.device).index_add(0, owner, weighed)
            rewards = (total / lengths if self.weights == "uniform" else total).to(rewards.dtype)
        rewards, score = (rollouts.ranks.own(x) for x in (rewards, result.group_score[pair_ids(groups)]))
        return rewards if keep is None else torch.where(keep, rewards, torch.nan), score


@dataclass(frozen=True, repr=False)
class InReach(Value):
    """DRO's filter of prompts: those on which rollouts differ, and whose reference the policy nearly gives."""

    reward: Reflection
    drop_fraction: float = 0.0
    top_k: int = 0
    worst_fraction: float = 0.25

    def __post_init__(self) -> None:
        check_instance("reward", self.reward, Reflection)
        checked_field(self, check_number, "drop_fraction", low=0, high=1)
        checked_field(self, check_count, "top_k", low=0)
        checked_field(self, check_number, "worst_fraction", above=0, high=1)

    @property
    def needs(self) -> frozenset[str]:
        return self.reward.needs

    def __call__(self, rollouts: Rollouts) -> Tensor:
        gather, own = rollouts.ranks.gather, rollouts.ranks.own
        groups = pair_ids(gather(rollouts.batch.group_ids.long()))
        places = self.reward.scored(rollouts, ranks=True) if self.top_k else ()  # before all is asked without ranks
        score = gather(self.reward.of_reference(rollouts)[1])
        count = int(groups.max()) + 1 if len(groups) else 0
        of_group = torch.zeros(count, dtype=score.dtype, device=score.device).scatter(0, groups, score)
        keep = own(dro.keep_groups(of_group, drop_fraction=self.drop_fraction)[groups])
        if self.top_k:
            lengths = gather(places[1].diff())
            of_all = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
            worst: dict[str, Any] = {"worst_fraction": self.worst_fraction, "top_k": self.top_k}
            keep = keep & own(
                dro.rank_filter(rollouts.ranks.gather_packed(places[2], lengths), of_all, groups, **worst)
            )
        return keep


@dataclass(frozen=True, repr=False)
class BeliefGain(Value):
    """Delta-belief's reward of each turn: what it added to log p of ``rows[n]["belief_target"]``, asked by
    ``rows[n]["belief_probe"]``; see :func:`trajkern.recipes.delta_belief.turn_rewards`.

    Reads, where they are: flags "finished" (nothing is asked after the last turn), span_rewards "penalty". With a scale
    of 0 the policy is not asked.
    """

    scale: float = 0.1
    clip: bool = True
    win_reward: float = 2.0
    turn_cost: float = 0.05

    def __post_init__(self) -> None:
        checked_field(self, check_flag, "clip")
        for name in ("scale", "win_reward", "turn_cost"):
            checked_field(self, check_number, name, low=0, dtype=torch.float32)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reward", "spans:turn"} | ({"score", "rows:belief_target"} if self.scale else set()))

    def __call__(self, rollouts: Rollouts) -> Tensor:
        turns = rollouts.spans["turn"]
        beliefs, bounds = self.beliefs(rollouts) if self.scale else _unasked(rollouts)
        penalty = rollouts.span_rewards.get("penalty", beliefs.new_zeros(len(turns)))
        reward = rollouts.reward("reward")
        options = {name: getattr(self, name) for name in ("scale", "clip", "win_reward", "turn_cost")}
        rewards = delta_belief.turn_rewards(beliefs, bounds, won=reward > 0, penalty=penalty, **options)
        return torch.where(reward.isnan()[turns.trajectory.long()], torch.nan, rewards)

    def beliefs(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """log p of the hidden answer before each rollout's first turn and after each, NaN where not asked; and the
        rollouts' bounds ``[N+1]``."""
        return rollouts.once(("beliefs",), lambda: _beliefs(rollouts))


def _references(rollouts: Rollouts, contexts: list[Any], *, ranks: bool = False) -> tuple[Tensor, ...]:
    assert rollouts.rows is not None
    return from_host(rollouts, contexts, [row["reference"] for row in rollouts.rows], ranks=ranks)


def from_host(
    rollouts: Rollouts, contexts: list[Any], targets: list[Any], *, ranks: bool = False
) -> tuple[Tensor, ...]:
    """What the host's ``score`` makes of them, float32 or wider; raises where it is not what was asked for."""
    assert rollouts.score is not None
    result = rollouts.score(contexts, targets, ranks=True) if ranks else rollouts.score(contexts, targets)
    if not isinstance(result, tuple) or len(result) != 2 + ranks:
        raise TypeError(f"score must return {2 + ranks} tensors, got {describe(result)}")
    logprobs, bounds = result[:2]
    places: tuple[Tensor, ...] = result[2:]
    check_tensor("the log-probs of score", logprobs, dtypes=FLOATS, ndim=1, device=rollouts.device)
    check_tensor("the cu_seqlens of score", bounds, dtypes=INTEGERS, device=rollouts.device)
    check_shape("the cu_seqlens of score", bounds, (len(targets) + 1,), "the boundaries of the targets")
    check_offsets("the cu_seqlens of score", bounds, logprobs.shape[0], "log-probs")
    for place in places:
        check_tensor("the ranks of score", place, dtypes=INTEGERS, device=rollouts.device)
        check_shape("the ranks of score", place, tuple(logprobs.shape), "one a log-prob")
    return widened(logprobs.detach()), bounds.long(), *places


def _ends_of(rollouts: Rollouts, name: str) -> list[int]:
    """Where the last span of this name ends in each rollout; where the prompt does in one without."""
    spans, ends = rollouts.spans[name], list(rollouts.prompt_lengths)
    begin = rollouts.batch.cu_seqlens.tolist()
    for n, end in zip(spans.trajectory.tolist(), spans.end.tolist(), strict=True):
        ends[n] = end - begin[n]
    return ends


def _beliefs(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """See :meth:`BeliefGain.beliefs`."""
    device, (every, bounds) = rollouts.device, _unasked(rollouts)
    counts = (bounds.diff() - 1).tolist()
    asked, contexts, targets = [], [], []
    for n, stops in enumerate(_stops(rollouts, counts)):
        row = rollouts.rows[n]  # type: ignore[index]
        for turn, stop in enumerate(stops):
            asked.append(int(bounds[n]) + turn)
            contexts.append((rollouts.token_lists[n][:stop], row.get("belief_probe", "")))
            targets.append(row["belief_target"])
    logprobs, lengths = from_host(rollouts, contexts, targets)
    owner = torch.repeat_interleave(torch.arange(len(targets), device=device), lengths.diff())
    belief = torch.zeros(len(targets), dtype=torch.float64, device=device).index_add(0, owner, logprobs.double())
    belief = belief.to(logprobs.dtype)
    places = torch.tensor(asked, device=device, dtype=torch.int64)
    return every.to(belief.dtype).index_copy(0, places, belief), bounds


def _unasked(rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """A NaN for each belief that could be asked for, and the rollouts' bounds."""
    counts = spans_each(rollouts.spans["turn"].trajectory.long(), len(rollouts))
    bounds = torch.cat((counts.new_zeros(1), (counts + 1).cumsum(0)))
    return torch.full((int(bounds[-1]),), torch.nan, dtype=torch.float32, device=rollouts.device), bounds


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
