"""The published systems as expressions, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_number, checked_field, renamed
from trajkern.credit.part import Value, needs_of, resolved_function
from trajkern.credit.rollouts import Rollouts, check_counted
from trajkern.credit.scored import BeliefGain, InReach, Reflection
from trajkern.credit.spec import Spec
from trajkern.credit.terms import Directive, OfTurns, Outcome, Signs
from trajkern.credit.tree_terms import OfTokens, OfTree
from trajkern.recipes import TREE_RECIPES, nsr, rlcr, srl, tree_grpo

CENTRED: dict[str, Any] = {"scale": "none", "singleton": "zero"}


@dataclass(frozen=True, repr=False)
class Calibration(Value):
    """RLCR's reward, of rewards "reward" (1 is right) and "confidence" (NaN where none was stated)."""

    form: str = "paper"
    needs = frozenset({"reward", "confidence"})

    def __post_init__(self) -> None:
        checked_field(self, check_choice, "form", rlcr.FORMS)

    def __call__(self, rollouts: Rollouts) -> Tensor:
        correct, confidence = rollouts.reward("reward"), rollouts.reward("confidence")
        stated, scored = ~confidence.isnan(), ~correct.isnan()
        correct, confidence = torch.where(scored, correct, 0), torch.where(stated, confidence, 0)
        with renamed({"correct": "rewards['reward']", "confidence": "rewards['confidence']"}):
            rewards = rlcr.rewards(correct, confidence, form=self.form, well_formed=stated)
        return torch.where(scored, rewards, torch.nan)


@dataclass(frozen=True, repr=False)
class StepLikeness(Value):
    """SRL's reward, of ``rewards["similarity"]`` (NaN for a step that is not well-formed)."""

    penalty: float = -1.0
    needs = frozenset({"similarity"})

    def __post_init__(self) -> None:
        checked_field(self, check_number, "penalty", dtype=torch.float32)

    def __call__(self, rollouts: Rollouts) -> Tensor:
        similarity = rollouts.reward("similarity")
        well_formed = ~similarity.isnan()
        check_counted("rewards['similarity']", similarity, well_formed)
        return srl.rewards(torch.where(well_formed, similarity, 0), well_formed, penalty=self.penalty)


@dataclass(frozen=True, repr=False)
class Varies(Value):
    """Whether a group's rewards deviate by more than ``min_std``."""

    reward: Callable[[Rollouts], Tensor]
    min_std: float = 1e-4

    def __post_init__(self) -> None:
        checked_field(self, check_number, "min_std", low=0)

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.reward)

    def __call__(self, rollouts: Rollouts) -> Tensor:
        statistic, groups = partial(srl.keep_groups, min_std=self.min_std), rollouts.batch.group_ids.long()
        return rollouts.ranks.over_all(statistic, self.reward(rollouts), groups)


@dataclass(frozen=True, repr=False)
class Verdict(Value):
    """1 where the reward is positive, else -1."""

    needs = frozenset({"reward"})

    def __call__(self, rollouts: Rollouts) -> Tensor:
        reward = rollouts.reward("reward")
        return torch.where(reward.isnan(), reward, torch.where(reward > 0, 1.0, -1.0).to(reward.dtype))


def _handing_on(to: Callable[..., Any]) -> Callable[[Callable[..., Spec]], Callable[..., Spec]]:
    """A preset whose further settings are those of ``to``, in its signature as well."""

    def named(preset: Callable[..., Spec]) -> Callable[..., Spec]:
        own = [x for x in signature(preset).parameters.values() if x.kind is not x.VAR_KEYWORD]
        handed = [x.replace(kind=x.KEYWORD_ONLY) for x in signature(to).parameters.values()]
        preset.__signature__ = signature(preset).replace(parameters=[*own, *handed])  # type: ignore[attr-defined]
        return preset

    return named


def _toolpo(action: str = "action", span: str = "call") -> Spec:
    return Outcome(**CENTRED) + Outcome(reward=resolved_function("action", action), **CENTRED).on(span)


def _tree_grpo(estimator: str = "tree") -> Spec:
    """The estimators of :func:`trajkern.recipes.tree_grpo.leaf_advantages`, "tree_per_token" of its token_advantages
    for outcomes, and "tree_diff" of its node_rewards, each step's tokens getting the step's reward."""
    estimator = check_choice("estimator", estimator, (*tree_grpo.ESTIMATORS, "tree_per_token", "tree_diff"))
    if estimator == "tree_diff":
        return OfTree(name="tree_diff")
    if estimator == "tree_per_token":
        return OfTokens() + OfTokens("tree")
    if estimator == "tree":
        return Outcome() + Outcome(within="tree")
    return Outcome(within="tree") if estimator == "tree_inner" else Outcome(reward=Outcome(), within="tree")


def _rlcr(form: str = "paper") -> Spec:
    return Outcome(reward=Calibration(form), **CENTRED)


def _srl(penalty: float = -1.0, min_std: float = 1e-4) -> Spec:
    reward = StepLikeness(penalty)
    return Outcome(reward=reward).gate(Varies(reward, min_std))


def _feedback(reward_weight: float = 1.0, directive_weight: float = 1.0, where: str = "all") -> Spec:
    reward_weight = check_number("reward_weight", reward_weight, dtype=torch.float32)
    directive_weight = check_number("directive_weight", directive_weight, dtype=torch.float32)
    verdict = Outcome(reward=Verdict(), baseline="none", scale="none")
    return reward_weight * verdict + directive_weight * Directive(where=where)


@_handing_on(Reflection)
def _dro(drop_fraction: float = 0.0, top_k: int = 0, worst_fraction: float = 0.25, **options: Any) -> Spec:
    reward = Reflection(**options)
    return Outcome(reward=reward).gate(InReach(reward, drop_fraction, top_k, worst_fraction)).only(reward.span)


@_handing_on(BeliefGain)
def _delta_belief(finished: str = "included", reward: Any = None, **options: Any) -> Spec:
    if reward is None:
        reward = BeliefGain(**options)
    elif options:
        raise TypeError(f"{', '.join(options)} set the policy's own reward of a turn, and reward= is another")
    return OfTurns(reward=reward, finished=finished)


PRESETS: dict[str, Callable[..., Spec]] = {
    "grpo": Outcome,
    "skillrl": Outcome,
    "judge": Outcome,
    **{kind: partial(Signs, kind) for kind in nsr.KINDS},
    "toolpo": _toolpo,
    "dro": _dro,
    "delta_belief": _delta_belief,
    "rlcr": _rlcr,
    "srl": _srl,
    "feedback": _feedback,
    **{name: partial(OfTree, name) for name in TREE_RECIPES},
    "tree_grpo": _tree_grpo,
    "treepo": lambda reward="reward": OfTree(name="treepo_branches", reward=reward).whiten(),
}
