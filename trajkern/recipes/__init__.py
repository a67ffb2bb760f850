"""Recipes: a published system's way from rewards to advantages, by name.

``RECIPES`` map a packed batch to the rollouts' advantages ``[N]``, or to these and which rollouts are trained, bool
``[N]``, and take the ``process_group`` over whose ranks groups are spread; ``TREE_RECIPES`` read a tree of rollouts.
The modules hold each system's own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trajkern._checks import check_choice
from trajkern.layouts.batch import PackedBatch, check_batch
from trajkern.recipes import nsr
from trajkern.recipes.grpo import grpo
from trajkern.recipes.trees import TREE_RECIPES, TreeRecipe, path_nodes

Recipe = Callable[..., Tensor | tuple[Tensor, Tensor]]


def _by_sign(kind: str) -> Recipe:
    def advantages(batch: PackedBatch, *, process_group: Any = None) -> tuple[Tensor, Tensor]:
        """A rollout's own reward decides: no rank needs to hear of another's."""
        check_batch(batch)
        if batch.rewards is None:
            raise ValueError(f"batch must have rewards for the recipe {kind}; got None")
        return nsr.advantages(batch.rewards, kind=kind)

    return advantages


RECIPES: dict[str, Recipe] = {"grpo": grpo, **{kind: _by_sign(kind) for kind in nsr.KINDS}}


def recipe(name: str) -> Recipe | TreeRecipe:
    """The recipe called ``name``. Raises ValueError with the list of names where there is none."""
    check_choice("recipe", name, {**RECIPES, **TREE_RECIPES})
    return TREE_RECIPES[name] if name in TREE_RECIPES else RECIPES[name]


__all__ = ["RECIPES", "TREE_RECIPES", "Recipe", "TreeRecipe", "grpo", "path_nodes", "recipe"]
