"""Recipes as the trainer runs them, one file a recipe that asks more than advantages: a system with its settings."""

from __future__ import annotations

from trajkern import recipes
from trajkern._suggest import did_you_mean
from trajkern.trainer.systems.base import System
from trajkern.trainer.systems.delta_belief import TurnBeliefs
from trajkern.trainer.systems.dro import Reflection
from trajkern.trainer.systems.feedback import HintedTeacher
from trajkern.trainer.systems.judge import ReasoningJudge
from trajkern.trainer.systems.plain import PlainGroups, PlainTrees
from trajkern.trainer.systems.rlcr import Calibrated
from trajkern.trainer.systems.skillrl import SkillBased
from trajkern.trainer.systems.srl import StepImitation
from trajkern.trainer.systems.toolpo import ToolRewards

# In the order of the configuration, which has a table for each that has settings.
SYSTEMS: dict[str, type[System]] = {
    "rlcr": Calibrated,
    "dro": Reflection,
    "delta_belief": TurnBeliefs,
    "toolpo": ToolRewards,
    "srl": StepImitation,
    "feedback": HintedTeacher,
    "skillrl": SkillBased,
    "judge": ReasoningJudge,
}


def recipe_names() -> list[str]:
    """Every recipe that the trainer runs."""
    return sorted({*recipes.RECIPES, *recipes.TREE_RECIPES, *SYSTEMS})


def system_type(recipe: str, setting: str = "recipe") -> type[System]:
    """What runs ``recipe``. Raises ValueError with the setting and all recipes where there is none of that name."""
    if recipe in SYSTEMS:
        return SYSTEMS[recipe]
    if recipe in recipes.RECIPES:
        return PlainGroups
    if recipe in recipes.TREE_RECIPES:
        return PlainTrees
    names = recipe_names()
    raise ValueError(f"{setting} must be one of {', '.join(names)}; got {recipe!r}{did_you_mean(recipe, names)}")


__all__ = ["SYSTEMS", "System", "recipe_names", "system_type"]
