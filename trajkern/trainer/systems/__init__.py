"""Recipes that ask more of the trainer than advantages: scoring forwards, environments, formats, memories."""

from __future__ import annotations

from trajkern import recipes
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.ranks import ALONE, Ranks
from trajkern.trainer.systems.base import Found, Local, Played, System, Values, rubric
from trajkern.trainer.systems.delta_belief import TurnBeliefs
from trajkern.trainer.systems.dro import Reflection
from trajkern.trainer.systems.feedback import HintedTeacher
from trajkern.trainer.systems.rlcr import Calibrated
from trajkern.trainer.systems.skillrl import SkillBased
from trajkern.trainer.systems.srl import StepImitation
from trajkern.trainer.systems.toolpo import ToolRewards
from trajkern.trainer.tasks.base import Task
from trajkern.trainer.tasks.tools import ToolTask
from trajkern.trainer.tasks.twenty_questions import TwentyQuestions

SYSTEMS: dict[str, type[System]] = {
    "delta_belief": TurnBeliefs,
    "dro": Reflection,
    "feedback": HintedTeacher,
    "rlcr": Calibrated,
    "skillrl": SkillBased,
    "srl": StepImitation,
    "toolpo": ToolRewards,
}


def recipe_names() -> list[str]:
    """Every recipe that the trainer runs."""
    return sorted({*recipes.RECIPES, *recipes.TREE_RECIPES, *SYSTEMS})


def load_system(config: TrainConfig, task: Task, policy: Policy, ranks: Ranks = ALONE) -> System:
    """The system of ``config.recipe``.

    Raises:
        ValueError: an unknown recipe, with the list; a recipe and a task, control or rubric that do not go together.
    """
    name = config.recipe
    if name not in recipe_names():
        raise ValueError(f"recipe must be one of {', '.join(recipe_names())}; got {name!r}")
    needs = {
        "delta_belief": ("a task that knows a hidden answer: twenty_questions", isinstance(task, TwentyQuestions)),
        "dro": ("a task that shows its work", task.shows_work),
        "feedback": ("a task that gives hints", type(task).hint is not Task.hint),
        "rlcr": ("a task whose answers state a confidence", task.states_confidence),
        "srl": ("a task that shows its work", task.shows_work),
        "toolpo": ("a task with tools", isinstance(task, ToolTask)),
        **dict.fromkeys(recipes.TREE_RECIPES, ("a task without an environment", not task.interactive)),
    }
    meaning, met = needs.get(name, ("", True))
    if not met:
        raise ValueError(f"task must be {meaning}, for the recipe {name}; got {task.name!r}")
    if config.compose.hint_weight and type(task).hint is Task.hint:
        raise ValueError(f"task must be one that gives hints, for compose.hint_weight; got {task.name!r}")
    system = SYSTEMS.get(name, System)(config, task, policy, ranks)
    if config.control == "random-rewards" and not system.dealable:
        raise ValueError(f"control must be one of none, supervised for the recipe {name}, which rewards turns")
    rubric(config.compose.rubric, task)
    return system


__all__ = ["SYSTEMS", "Found", "Local", "Played", "System", "Values", "load_system", "recipe_names", "rubric"]
