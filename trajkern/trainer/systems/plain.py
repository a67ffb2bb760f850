"""Recipes that are functions of a batch or of a tree with rewards, and ask no more of the trainer."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from trajkern import recipes
from trajkern.trainer.credit import Credit, credit_of
from trajkern.trainer.forest import Forest
from trajkern.trainer.systems.base import Assigned, GroupSystem, Played, Requirement, System


class PlainGroups(GroupSystem):
    """A recipe of ``trajkern.recipes.RECIPES``, which counts a group's rollouts over the ranks that hold them."""

    splits_groups = True

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Assigned:
        batch = replace(played.batch, rewards=signals["rewards"])
        result = recipes.RECIPES[self.recipe](batch, process_group=self.ranks.data)
        advantages, keep = result if isinstance(result, tuple) else (result, None)
        return Assigned(advantages, keep=keep)


class PlainTrees(System):
    """A recipe of ``trajkern.recipes.TREE_RECIPES``, which compares the branches of trees of rollouts."""

    requires = Requirement("a task without an environment", lambda task: not task.interactive)

    def credit(self, forest: Forest) -> Credit:
        """What the recipe makes of the forest's rewards."""
        return credit_of(recipes.TREE_RECIPES[self.recipe], forest)
