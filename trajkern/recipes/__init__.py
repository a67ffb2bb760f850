"""Recipes: a published system's way from a packed batch to advantages, ``[N]`` or ``[T]``, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trajkern._checks import check_choice
from trajkern.layout import PackedBatch
from trajkern.recipes.grpo import grpo

RECIPES: dict[str, Callable[[PackedBatch], Tensor]] = {"grpo": grpo}


def recipe(name: str) -> Callable[[PackedBatch], Tensor]:
    """The recipe called ``name``. Raises ValueError with the list of names where there is none."""
    check_choice("recipe", name, RECIPES)
    return RECIPES[name]


__all__ = ["RECIPES", "grpo", "recipe"]
