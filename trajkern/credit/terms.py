"""The terms: what a rollout, a span or a token is worth, against whom it is compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_count, check_number, checked_field, suggesting
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern.credit.part import (
    Call,
    Function,
    Learns,
    Part,
    check_name,
    named,
    needs_of,
    resolved_function,
    written,
    written_call,
)
from trajkern.credit.result import to_tokens
from trajkern.credit.rollouts import check_counted, spans_each, widened
from trajkern.credit.spec import GateSet, Spec
from trajkern.ops.advantage import BASELINES, SCALES, SINGLETONS, group_advantages
from trajkern.recipes import delta_belief, nsr
from trajkern.recipes._groups import pair_ids

REWARDS = (torch.bool, *INTEGERS, *FLOATS)
GROUP = frozenset({"baseline", "scale", "ddof", "eps", "singleton"})  # the options of group_advantages
OUTCOME_WITHIN, SPAN_WITHIN, WHERE = ("group", "tree", "batch"), ("group", "index"), ("all", "failed")


class Term(Spec):
    """A leaf of an expression: computed once a call behind equal gates."""

    children: ClassVar = ()
    made_by: ClassVar[tuple[str, str]]  # the function that makes it, and its argument by position

    def part(self, call: Call, gates: GateSet) -> Part:
        return call.once((self, gates), lambda: self.formed(call, gates)).mapped(Tensor.clone)

    def formed(self, call: Call, gates: GateSet) -> Part:
        raise NotImplementedError

    def __repr__(self) -> str:
        """Its function, with what is not the default."""
        name, first = self.made_by
        return written_call(f"credit.{name}", self, first, GROUP if isinstance(self, Compared) else frozenset())


@dataclass(frozen=True, repr=False)
class Compared(Term):
    """What :func:`trajkern.group_advantages` is told."""

    baseline: str = "mean"
    scale: str = "std"
    ddof: int = 1
    eps: float = 1e-6
    singleton: str = "raw"

    def __post_init__(self) -> None:
        for name, choices in (("baseline", BASELINES), ("scale", SCALES), ("singleton", SINGLETONS), ("ddof", (0, 1))):
            checked_field(self, check_choice, name, choices)
        object.__setattr__(self, "eps", float(check_number("eps", self.eps, low=0, dtype=torch.float32)))

    def compared(self, x: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        return group_advantages(x, ids, gate=keep, **{name: getattr(self, name) for name in GROUP})


@suggesting
@dataclass(frozen=True, repr=False)
class Outcome(Compared):
    made_by: ClassVar = ("outcome", "reward")
    reward: Any = "reward"  # str | Function
    within: str = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reward, Spec):
            object.__setattr__(self, "reward", resolved_function("reward", self.reward))
        checked_field(self, check_choice, "within", OUTCOME_WITHIN)

    @property
    def own_needs(self) -> frozenset[str]:
        return needs_of(self.reward) | ({"tree"} if self.within == "tree" else set())

    def formed(self, call: Call, gates: GateSet) -> Part:
        reward = reward_of(call, self.reward, gates)
        missing = reward.isnan()
        keep = call.among_passed(~missing, gates)
        check_counted(f"rewards[{written(self.reward)}]", reward, keep)
        rows = call.rollouts.ranks.over_all(self.compared, reward, self.ids(call), keep)
        name = "outcome" if self.reward == "reward" else f"outcome:{named(self.reward)}"
        call.report(name, rows, torch.where(keep, call.counts, 0))
        return Part(rows, learns=(Learns(keep),), abstains=call.among_passed(missing, gates))

    def ids(self, call: Call) -> Tensor:
        """Who is compared with whom, on all ranks."""
        rollouts = call.rollouts
        groups = rollouts.batch.group_ids.long()
        if self.within == "group":
            return groups
        if self.within == "batch":
            return torch.zeros_like(groups)
        assert self.within == "tree" and rollouts.tree is not None
        return rollouts.tree.leaf_root + rollouts.ranks.begin("trees")


@suggesting
@dataclass(frozen=True, repr=False)
class OfSpans(Compared):
    made_by: ClassVar = ("spans", "name")
    name: str = ""
    reward: Any = None  # None | str | Function
    within: str = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward is not None:
            object.__setattr__(self, "reward", resolved_function("reward", self.reward))
        checked_field(self, check_choice, "within", SPAN_WITHIN)

    @property
    def source(self) -> Any:
        """The name of the spans' rewards, or the function that gives them."""
        return self.name if self.reward is None else self.reward

    @property
    def own_needs(self) -> frozenset[str]:
        return needs_of(self.source, "span_rewards:") | {f"spans:{self.name}"}

    def formed(self, call: Call, gates: GateSet) -> Part:
        rollouts, spans, of = call.rollouts, call.rollouts.spans[self.name], f"spans:{self.name}"
        reward, passed = span_reward_of(call, self.source, self.name), call.passed(gates)
        owner, scored = spans.trajectory.long(), ~reward.isnan()
        counted = scored if passed is None else scored & passed[owner]
        check_counted(f"span_rewards[{written(self.source)}]", reward, counted)
        ids = [rollouts.batch.group_ids.long()[owner]] + ([spans.index.long()] if self.within == "index" else [])
        values = rollouts.ranks.over_all(self._compared, reward, counted, *ids, of=of)
        idle = spans_each(owner, len(rollouts)) == 0
        silent = ~idle & (spans_each(owner, len(rollouts), scored.long()) == 0)  # had some, none of which is scored
        call.report(of, values, torch.where(counted, call.span_counts(self.name), 0))
        learns = Learns(call.among_passed(~silent, gates), None, idle)
        return Part(spans={self.name: values}, learns=(learns,), abstains=call.among_passed(silent, gates))

    def _compared(self, rewards: Tensor, counted: Tensor, *ids: Tensor) -> Tensor:
        return self.compared(rewards, ids[0] if len(ids) == 1 else pair_ids(*ids), counted)


@suggesting
@dataclass(frozen=True, repr=False)
class OfTurns(Term):
    """Delta-belief's comparison of turns; see :func:`trajkern.recipes.delta_belief.turn_advantages`."""

    made_by: ClassVar = ("terms.OfTurns", "")
    reward: Any = "turn"  # str | Function
    finished: str = "included"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", resolved_function("reward", self.reward))
        checked_field(self, check_choice, "finished", delta_belief.FINISHED)

    @property
    def own_needs(self) -> frozenset[str]:
        return needs_of(self.reward, "span_rewards:") | {"spans:turn"}

    def formed(self, call: Call, gates: GateSet) -> Part:
        rollouts, turns, passed = call.rollouts, call.rollouts.spans["turn"], call.passed(gates)
        owner, ranks = turns.trajectory.long(), rollouts.ranks
        rewards = span_reward_of(call, self.reward, "turn")
        check_counted(f"span_rewards[{written(self.reward)}]", rewards, torch.ones_like(owner, dtype=torch.bool))
        groups = ranks.gather(rollouts.batch.group_ids.long())
        of_all = (rewards, owner + ranks.begin("rollouts"), turns.index.long())
        rewards, rollout, index = (ranks.gather(x, "spans:turn") for x in of_all)
        if passed is not None:  # those who are gated out are groups of their own, of which nothing is read
            groups = pair_ids(ranks.gather(passed).long(), groups)
        values = delta_belief.turn_advantages(rewards, rollout, index, groups, finished=self.finished)
        values = ranks.own(values, "spans:turn")
        weights = call.span_counts("turn")
        if passed is not None:
            values, weights = torch.where(passed[owner], values, 0), torch.where(passed[owner], weights, 0)
        call.report("delta_belief", values, weights)
        turned = spans_each(owner, len(rollouts))
        keep = torch.ones_like(turned, dtype=torch.bool) if passed is None else passed
        return Part(spans={"turn": values}, learns=(Learns(keep, None, turned == 0),))


@suggesting
@dataclass(frozen=True, repr=False)
class Directive(Term):
    made_by: ClassVar = ("directive", "where")
    where: str = "all"

    def __post_init__(self) -> None:
        checked_field(self, check_choice, "where", WHERE)

    @property
    def own_needs(self) -> frozenset[str]:
        return frozenset({"teacher_logprobs"} | ({"reward"} if self.where == "failed" else set()))

    def formed(self, call: Call, gates: GateSet) -> Part:
        teacher, base = call.rollouts.teacher_logprobs, call.rollouts.log_ratio_base
        assert teacher is not None and base is not None
        keep = directed(call, self.where, gates)
        part = Part(learns=(Learns(keep),))
        # what is not scored may be anything
        tokens = (widened(teacher) - widened(base)).nan_to_num_(0, 0, 0).mul_(call.learning(part))
        call.report_tokens("directive", tokens, part)
        return replace(part, tokens=tokens)


@suggesting
@dataclass(frozen=True, repr=False)
class Divergence(Term):
    """A term of the loss, not of the advantage: its gradient reaches tokens that were not sampled."""

    made_by: ClassVar = ("divergence", "where")
    where: str = "all"
    k: int | None = 100
    beta: float = 0.5
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        checked_field(self, check_choice, "where", WHERE)
        checked_field(self, check_number, "beta", low=0, high=1)
        if self.k is not None:
            checked_field(self, check_count, "k", low=1)
        if self.max_ratio is not None:
            checked_field(self, check_number, "max_ratio", above=0)

    @property
    def own_needs(self) -> frozenset[str]:
        return frozenset({"divergence"} | ({"reward"} if self.where == "failed" else set()))

    def formed(self, call: Call, gates: GateSet) -> Part:
        keep = directed(call, self.where, gates)
        every = torch.ones(len(call.rollouts), dtype=torch.float32, device=call.rollouts.device)
        weight = to_tokens(every if keep is None else keep.float(), call.rollouts)
        return Part(learns=(Learns(keep),), divergences=((self, weight),))


@suggesting
@dataclass(frozen=True, repr=False)
class Signs(Term):
    """By the sign of the outcome alone; see :func:`trajkern.recipes.nsr.advantages`."""

    made_by: ClassVar = ("terms.Signs", "")
    kind: str = "w_reinforce"
    positive_weight: float = 0.1
    reward: str = "reward"

    def __post_init__(self) -> None:
        checked_field(self, check_choice, "kind", nsr.KINDS)
        checked_field(self, check_number, "positive_weight", low=0, dtype=torch.float32)
        check_name("reward", self.reward)

    @property
    def own_needs(self) -> frozenset[str]:
        return frozenset((self.reward,))

    def formed(self, call: Call, gates: GateSet) -> Part:
        reward = call.rollouts.reward(self.reward)
        scored = ~reward.isnan()
        check_counted(f"rewards[{self.reward!r}]", reward, scored)
        rows, keep = nsr.advantages(
            torch.where(scored, reward, 0), kind=self.kind, positive_weight=self.positive_weight
        )
        keep = call.among_passed(keep & scored, gates)
        rows = torch.where(keep, rows, 0)
        call.report(self.kind, rows, torch.where(keep, call.counts, 0))
        return Part(rows, learns=(Learns(keep),), abstains=call.among_passed(~scored, gates))


def reward_of(call: Call, reward: str | Function | Spec, gates: GateSet) -> Tensor:
    """Of each rollout ``[N]``, float: of this name, what an expression comes to, or what a function returns.

    A function that compares rollouts itself has a method ``among``, which is told which are compared.
    """
    if isinstance(reward, str):
        return call.rollouts.reward(reward)
    if isinstance(reward, Spec):
        part = reward.part(call, gates)
        if part.rows is None or part.kinds() > 1 or part.divergences or any(x.only is not None for x in part.learns):
            raise ValueError(f"a reward must be a value of whole rollouts; {reward!r} is not")
        return torch.where(call.kept(part), part.rows, torch.nan)
    passed, count, what = call.passed(gates), len(call.rollouts), "one reward a rollout"
    if passed is not None and hasattr(reward, "among"):
        return widened(call.asked(partial(reward.among, keep=passed), REWARDS, count, what, key=(reward, gates)))
    return widened(call.asked(reward, REWARDS, count, what))


def span_reward_of(call: Call, reward: str | Function, name: str) -> Tensor:
    """Of each span of this name ``[S]``, float."""
    count = len(call.rollouts.spans[name])
    if callable(reward):
        return widened(call.asked(reward, REWARDS, count, f"one reward for each span {name!r}"))
    rewards = call.rollouts.span_rewards[reward]
    if rewards.shape[0] != count:
        raise ValueError(
            f"span_rewards[{reward!r}] must have one reward for each of the {count} spans {name!r}, got "
            f"{rewards.shape[0]}"
        )
    return rewards


def directed(call: Call, where: str, gates: GateSet) -> Tensor | None:
    """The rollouts that are directed, ``[N]``; None for all."""
    if where == "all":
        return call.passed(gates)
    return call.among_passed(call.rollouts.reward("reward") <= 0, gates)
