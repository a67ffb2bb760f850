"""Recipes that read a batch or a tree with rewards, and ask no more of the trainer."""

from __future__ import annotations

from torch import Tensor

from trajkern import credit
from trajkern.recipes import srl
from trajkern.trainer.systems.base import GroupSystem, Requirement, System


class PlainGroups(GroupSystem):
    """A recipe that compares a group's rollouts."""


class PlainTrees(System):
    """A recipe that compares the branches of trees of rollouts."""

    requires = Requirement("one without an environment", lambda task: not task.interactive)
    knows = frozenset({"tree"})


def differs(rollouts: credit.Rollouts) -> Tensor:
    """Whether a rollout's prompt has rollouts of different rewards, bool ``[N]``."""
    gather, own = rollouts.ranks.gather, rollouts.ranks.own
    return own(srl.keep_groups(gather(rollouts.reward("reward")), gather(rollouts.batch.group_ids), min_std=0))


differs.needs = frozenset({"reward"})  # type: ignore[attr-defined]
