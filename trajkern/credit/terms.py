"""The terms: what a rollout, a span or a token is worth, against whom it is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_number
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern.credit.part import Call, Function, Part, named, needs_of, resolved_function, written, written_call
from trajkern.credit.result import packed_any, to_tokens
from trajkern.credit.rollouts import check_counted, widened
from trajkern.credit.spec import GateSet, Spec
from trajkern.layouts.tree import Tree
from trajkern.ops.advantage import BASELINES, SCALES, SINGLETONS, group_advantages
from trajkern.recipes import TREE_RECIPES, delta_belief, nsr
from trajkern.recipes._groups import pair_ids

REWARDS = (torch.bool, *INTEGERS, *FLOATS)
GROUP = frozenset({"baseline", "scale", "ddof", "eps", "singleton"})  # the options of group_advantages
OUTCOME_WITHIN, SPAN_WITHIN, WHERE = ("group", "tree", "batch"), ("group", "index"), ("all", "failed")


class Term(Spec):
    """A leaf of an expression: computed once a call behind equal gates."""

    children: ClassVar = ()

    def part(self, call: Call, gates: GateSet) -> Part:
        return call.once((self, gates), lambda: self.formed(call, gates))

    def formed(self, call: Call, gates: GateSet) -> Part:
        raise NotImplementedError

    def __repr__(self) -> str:
        """Its function, with what is not the default."""
        name, first = FUNCTIONS[type(self)]
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
            check_choice(name, getattr(self, name), choices)
        check_number("eps", self.eps, low=0, dtype=torch.float32)

    def compared(self, x: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        return group_advantages(x, ids, gate=keep, **{name: getattr(self, name) for name in GROUP})


@dataclass(frozen=True, repr=False)
class Outcome(Compared):
    reward: Any = "reward"  # str | Function
    within: str = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "reward", resolved_function(self.reward))
        check_choice("within", self.within, OUTCOME_WITHIN)

    @property
    def own_needs(self) -> frozenset[str]:
        reward = needs_of(self.reward) if callable(self.reward) else {self.reward}
        return frozenset(reward) | ({"tree"} if self.within == "tree" else frozenset())

    def formed(self, call: Call, gates: GateSet) -> Part:
        reward, passed = reward_of(call, self.reward), call.passed(gates)
        keep = ~reward.isnan() if passed is None else passed & ~reward.isnan()
        check_counted(f"rewards[{written(self.reward)}]", reward, keep)
        ranks = call.rollouts.ranks
        every = (ranks.gather(x) for x in (reward, call.once(("ids", self.within), lambda: self._ids(call)), keep))
        rows = ranks.own(self.compared(*every))
        name = "outcome" if self.reward == "reward" else f"outcome:{named(self.reward)}"
        call.report(name, rows, torch.where(keep, call.counts, 0))
        return Part(rows, learns=((keep, None),))

    def _ids(self, call: Call) -> Tensor:
        """Who is compared with whom, on all ranks."""
        rollouts = call.rollouts
        groups = rollouts.batch.group_ids.long()
        if self.within == "group":
            return groups
        if self.within == "batch":
            return torch.zeros_like(groups)
        assert self.within == "tree" and rollouts.tree is not None
        return rollouts.tree.leaf_root + rollouts.ranks.begin("trees")


@dataclass(frozen=True, repr=False)
class OfSpans(Compared):
    name: str = ""
    reward: Any = None  # None | str | Function
    within: str = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward is not None:
            object.__setattr__(self, "reward", resolved_function(self.reward))
        check_choice("within", self.within, SPAN_WITHIN)

    @property
    def source(self) -> Any:
        """The name of the spans' rewards, or the function that gives them."""
        return self.name if self.reward is None else self.reward

    @property
    def own_needs(self) -> frozenset[str]:
        source = self.source
        read = needs_of(source) if callable(source) else {f"span_rewards:{source}"}
        return frozenset(read) | {f"spans:{self.name}"}

    def formed(self, call: Call, gates: GateSet) -> Part:
        rollouts, spans = call.rollouts, call.rollouts.spans[self.name]
        owner, reward, passed = (
            spans.trajectory.long(),
            span_reward_of(call, self.source, self.name),
            call.passed(gates),
        )
        scored = ~reward.isnan()
        counted = scored if passed is None else scored & passed[owner]
        check_counted(f"span_rewards[{written(self.source)}]", reward, counted)
        of = f"spans:{self.name}"
        ids = rollouts.batch.group_ids.long()[owner]
        every = [rollouts.ranks.gather(x, of) for x in (reward, ids, spans.index.long(), counted)]
        if self.within == "index":
            every[1] = pair_ids(every[1], every[2])
        values = rollouts.ranks.own(self.compared(every[0], every[1], every[3]), of)
        # a rollout without spans has nothing that could not be scored
        of_rollout = torch.zeros(2, len(rollouts), dtype=torch.int64, device=rollouts.device)
        total, good = of_rollout.index_add(1, owner, torch.stack((torch.ones_like(scored), scored)).long())
        keep = (good > 0) | (total == 0)
        call.report(f"spans:{self.name}", values, torch.where(counted, call.span_counts(self.name), 0))
        return Part(spans={self.name: values}, learns=((keep if passed is None else keep & passed, None),))


@dataclass(frozen=True, repr=False)
class OfTurns(Term):
    """Delta-belief's comparison of turns; see :func:`trajkern.recipes.delta_belief.turn_advantages`."""

    reward: Any = "turn"  # str | Function
    finished: str = "included"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", resolved_function(self.reward))
        check_choice("finished", self.finished, delta_belief.FINISHED)

    @property
    def own_needs(self) -> frozenset[str]:
        read = needs_of(self.reward) if callable(self.reward) else {f"span_rewards:{self.reward}"}
        return frozenset(read) | {"spans:turn"}

    def formed(self, call: Call, gates: GateSet) -> Part:
        rollouts, turns, passed = call.rollouts, call.rollouts.spans["turn"], call.passed(gates)
        owner, ranks = turns.trajectory.long(), rollouts.ranks
        rewards = span_reward_of(call, self.reward, "turn")
        groups = ranks.gather(rollouts.batch.group_ids.long())
        of_all = (rewards, owner + ranks.begin("rollouts"), turns.index.long())
        rewards, rollout, index = (ranks.gather(x, "spans:turn") for x in of_all)
        if passed is not None:  # a rollout that is gated out is a group of its own, of which nothing is read
            kept = ranks.gather(passed)
            groups = pair_ids(torch.where(kept, 0, 1 + torch.arange(len(kept), device=kept.device)), groups)
            rewards = torch.where(kept[rollout], rewards, 0)
        values = delta_belief.turn_advantages(rewards, rollout, index, groups, finished=self.finished)
        values = ranks.own(values, "spans:turn")
        weights = call.span_counts("turn")
        if passed is not None:
            values, weights = torch.where(passed[owner], values, 0), torch.where(passed[owner], weights, 0)
        call.report("delta_belief", values, weights)
        return Part(spans={"turn": values}, learns=((passed, None),))


@dataclass(frozen=True, repr=False)
class Directive(Term):
    where: str = "all"

    def __post_init__(self) -> None:
        check_choice("where", self.where, WHERE)

    @property
    def own_needs(self) -> frozenset[str]:
        return frozenset({"teacher_logprobs"} | ({"reward"} if self.where == "failed" else set()))

    def formed(self, call: Call, gates: GateSet) -> Part:
        teacher, base = call.rollouts.teacher_logprobs, call.rollouts.log_ratio_base
        assert teacher is not None and base is not None
        keep = directed(call, self.where, gates)
        part = Part(learns=((keep, None),))
        # what is not scored may be anything
        tokens = (widened(teacher) - widened(base)).nan_to_num_(0, 0, 0).mul_(call.learning(part))
        call.report_tokens("directive", tokens, part)
        return Part(tokens=tokens, learns=part.learns)


@dataclass(frozen=True, repr=False)
class Divergence(Term):
    """A term of the loss, not of the advantage: its gradient reaches tokens that were not sampled."""

    where: str = "all"
    k: int | None = 100
    beta: float = 0.5
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        check_choice("where", self.where, WHERE)
        check_number("beta", self.beta, low=0, high=1)
        if self.k is not None:
            check_number("k", self.k, low=1)
        if self.max_ratio is not None:
            check_number("max_ratio", self.max_ratio, above=0)

    @property
    def own_needs(self) -> frozenset[str]:
        return frozenset({"divergence"} | ({"reward"} if self.where == "failed" else set()))

    def formed(self, call: Call, gates: GateSet) -> Part:
        keep = directed(call, self.where, gates)
        weight = to_tokens(torch.ones(len(call.rollouts), device=call.rollouts.device), call.rollouts)
        if keep is not None:
            weight = to_tokens(keep.to(weight.dtype), call.rollouts)
        return Part(learns=((keep, None),), divergences=((self, weight),))


@dataclass(frozen=True, repr=False)
class Signs(Term):
    """By the sign of the outcome alone; see :func:`trajkern.recipes.nsr.advantages`."""

    kind: str = "w_reinforce"
    positive_weight: float = 0.1
    reward: str = "reward"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, nsr.KINDS)
        check_number("positive_weight", self.positive_weight, low=0, dtype=torch.float32)
        check_name("reward", self.reward)

    @property
    def own_needs(self) -> frozenset[str]:
        return frozenset((self.reward,))

    def formed(self, call: Call, gates: GateSet) -> Part:
        reward, passed = call.rollouts.rewards[self.reward], call.passed(gates)  # type: ignore[index]
        scored = ~reward.isnan()
        rows, keep = nsr.advantages(reward.nan_to_num(), kind=self.kind, positive_weight=self.positive_weight)
        keep = keep & scored if passed is None else keep & scored & passed
        rows = torch.where(keep, rows, 0)
        call.report(self.kind, rows, torch.where(keep, call.counts, 0))
        return Part(rows, learns=((keep, None),))


@dataclass(frozen=True, repr=False)
class OfTree(Term):
    """A recipe of ``trajkern.recipes.TREE_RECIPES``: of leaves, of nodes, or of the steps of each path."""

    name: str = "treerl"
    reward: str = "reward"

    def __post_init__(self) -> None:
        check_choice("name", self.name, TREE_RECIPES)
        check_name("reward", self.reward)

    @property
    def own_needs(self) -> frozenset[str]:
        return frozenset((self.reward, "tree"))

    def formed(self, call: Call, gates: GateSet) -> Part:
        rollouts, recipe, passed = call.rollouts, TREE_RECIPES[self.name], call.passed(gates)
        tree, reward = rollouts.tree, reward_of(call, self.reward)
        assert tree is not None
        keep, only = passed, recipe.learns(self._sampled(call)) if recipe.learns else None
        if self.reward in rollouts.unscored:
            keep = ~reward.isnan() if keep is None else keep & ~reward.isnan()
        mask = packed_any(rollouts.batch.loss_mask, tree)
        if keep is None:
            of_kept = self._values(tree, reward, mask)
        else:  # the one read: how many are left
            tree, nodes = tree.pruned(keep)
            of_kept = self._values(tree, reward[keep], mask[nodes[rollouts.tree.token_node]])  # type: ignore[union-attr]
        placed = self._placed(call, of_kept, keep)
        part = Part(placed.get("rows"), tokens=placed.get("tokens"), learns=((keep, only),))
        if part.rows is None:
            tokens = call.tokens(part)
            call.report_tokens(self.name, tokens, part)
            return Part(tokens=tokens, learns=part.learns)
        call.report(self.name, part.rows, call.counts if keep is None else torch.where(keep, call.counts, 0))
        return part

    def _sampled(self, call: Call) -> Tensor:
        """What each token was sampled with, ``[T]``."""
        base = call.rollouts.batch.sampler_logprobs
        base = call.rollouts.batch.old_logprobs if base is None else base
        if base is None:
            raise ValueError(f"{self!r} needs sampler_logprobs or old_logprobs of the batch, which has neither")
        return torch.where(call.rollouts.batch.loss_mask, base, torch.nan)

    def _values(self, tree: Tree, reward: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Of the rollouts of ``tree``, ``rows``, or of their tokens, ``tokens``."""
        recipe, length = TREE_RECIPES[self.name], tree.flat_index.shape[0]
        if not tree.num_leaves:
            return {"rows": reward} if recipe.per == "leaf" else {"tokens": reward}
        values = recipe.advantages(tree, reward, mask)
        if recipe.per == "leaf":
            return {"rows": values}
        node = tree.path_nodes[1]
        steps = values if recipe.per == "step" else values[node]
        return {"tokens": torch.repeat_interleave(steps, tree.node_lengths.long()[node], output_size=length)}

    def _placed(self, call: Call, values: dict[str, Tensor], keep: Tensor | None) -> dict[str, Tensor]:
        """The values of the rollouts that are kept among those of all."""
        if keep is None:
            return values
        where = {"rows": keep, "tokens": to_tokens(keep.float(), call.rollouts) != 0}
        return {
            kind: torch.zeros(where[kind].shape, dtype=x.dtype, device=x.device).masked_scatter(where[kind], x)
            for kind, x in values.items()
        }


def check_name(argument: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a name, got {value!r}")


def reward_of(call: Call, reward: str | Function) -> Tensor:
    """Of each rollout ``[N]``, float."""
    if callable(reward):
        return widened(call.asked(reward, REWARDS, len(call.rollouts), "one reward a rollout"))
    return call.rollouts.reward(reward)


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
    passed = call.passed(gates)
    if where == "all":
        return passed
    failed = reward_of(call, "reward") <= 0
    return failed if passed is None else failed & passed


FUNCTIONS: dict[type[Term], tuple[str, str]] = {  # what makes a term, and its first argument
    Outcome: ("outcome", "reward"),
    OfSpans: ("spans", "name"),
    Directive: ("directive", "where"),
    Divergence: ("divergence", "where"),
    OfTurns: ("terms.OfTurns", ""),
    OfTree: ("terms.OfTree", ""),
    Signs: ("terms.Signs", ""),
}
