"""Recipes: a published system's way from rewards to advantages, by name.

``RECIPES`` map a packed batch to ``[N]`` or ``[T]``; ``TREE_RECIPES`` read a tree of rollouts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trajkern._checks import check_choice
from trajkern.layout import PackedBatch
from trajkern.recipes.grpo import grpo
from trajkern.recipes.trees import TREE_RECIPES, TreeRecipe, path_nodes

RECIPES: dict[str, Callable[[PackedBatch], Tensor]] = {"grpo": grpo}


def recipe(name: str) -> Callable[[PackedBatch], Tensor] | TreeRecipe:
    """The recipe called ``name``. Raises ValueError with the list of names where there is none."""
    check_choice("recipe", name, {**RECIPES, **TREE_RECIPES})
    return TREE_RECIPES[name] if name in TREE_RECIPES else RECIPES[name]


__all__ = ["RECIPES", "TREE_RECIPES", "TreeRecipe", "grpo", "path_nodes", "recipe"]
