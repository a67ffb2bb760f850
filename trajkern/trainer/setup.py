"""A run before its first step: the system of its recipe, and what must go together."""

from __future__ import annotations

from trajkern.trainer.collect import keeps_groups
from trajkern.trainer.compose import load_rubric
from trajkern.trainer.config import TrainConfig, check_parts
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.ranks import ALONE, Ranks
from trajkern.trainer.systems import System, system_type
from trajkern.trainer.systems.base import GIVES_HINTS
from trajkern.trainer.tasks.base import Task


def load_system(config: TrainConfig, task: Task, policy: Policy, ranks: Ranks = ALONE) -> System:
    """The system of ``config.recipe``.

    Raises:
        ValueError: an unknown recipe, with the list; a recipe and a task, control or rubric that do not go together.
    """
    recipe = config.recipe
    kind = system_type(recipe)
    if kind.requires and not kind.requires.met(task):
        raise ValueError(f"task must be {kind.requires.meaning}, for the recipe {recipe}; got {task.name!r}")
    if config.compose.hint_weight and not GIVES_HINTS.met(task):
        raise ValueError(f"task must be one that gives hints, for compose.hint_weight; got {task.name!r}")
    if config.control == "random-rewards" and not kind.dealable:
        raise ValueError(f"control must be one of none, supervised for the recipe {recipe}, which rewards turns")
    load_rubric(config.compose.rubric, task)
    settings = getattr(config, recipe) if kind.settings_type else None
    return kind(recipe, settings, task, policy, ranks, config.temperature)


def check_ranks(config: TrainConfig, system: System, ranks: Ranks) -> None:
    """Raise ValueError where the ranks cannot share the work."""
    if ranks.parts == 1:
        return
    check_parts(config.loss, "the run must have one rank of data")
    whole = keeps_groups(config, system)
    if config.prompts * (1 if whole else config.rollouts) < ranks.parts:
        because = f" (the recipe {config.recipe} keeps a group on one rank)" if whole else ""
        raise ValueError(f"prompts must be enough for {ranks.parts} ranks of data{because}; got {config.prompts}")
    if config.warmup.batch < ranks.parts:
        raise ValueError(f"warmup.batch must be at least {ranks.parts}, the ranks of data; got {config.warmup.batch}")
    if config.compose.rubric and system.compares_prompts:
        raise ValueError(
            f"compose.rubric must be none for the recipe {config.recipe} on several ranks, which compares all prompts"
        )
