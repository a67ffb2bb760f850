"""What is played: questions with a verifier, some with an environment; by name, by class or from a file."""

from __future__ import annotations

from pathlib import Path

from trajkern._suggest import did_you_mean
from trajkern.credit import load
from trajkern.trainer.returned import ask, shown
from trajkern.trainer.tasks.base import Answer, Question, Reply, Splits, Task
from trajkern.trainer.tasks.capabilities import (
    Action,
    ActionTask,
    Belief,
    BeliefTask,
    CritiqueTask,
    FamilyTask,
    HintTask,
    PenaltyTask,
    ReasoningTask,
    ReferenceTask,
    ResponseTask,
    SimulatedTask,
    VoteTask,
    family_of,
    reasoning_of,
)
from trajkern.trainer.tasks.checked import checked
from trajkern.trainer.tasks.gym import SPECS, GymTask
from trajkern.trainer.tasks.jsonl import JsonlTask
from trajkern.trainer.tasks.tools import TOOLS, ToolTask
from trajkern.trainer.tasks.twenty_questions import TwentyQuestions

TASKS: dict[str, type[Task]] = {
    **dict.fromkeys(SPECS, GymTask),
    **dict.fromkeys(TOOLS, ToolTask),
    "twenty_questions": TwentyQuestions,
}


def task_names() -> list[str]:
    """The names that :func:`load_task` knows."""
    return sorted(TASKS)


def load_task(name: str, seed: int = 0) -> Task:
    """The task called ``name``, of the class ``package.module:Class`` or in a file that ends with ``.jsonl``.

    Raises:
        TypeError: a name that is no text.
        ValueError: there is none, with the list of names; no class of tasks; a file or a line that is broken.
    """
    if not isinstance(name, str):
        raise TypeError(f"task must be a name, got {shown(name)}")
    if name in TASKS:
        return TASKS[name](name, seed)
    if name.endswith(".jsonl"):
        return JsonlTask(name, seed)
    if ":" in name:
        return checked(ask(f"task {name}", _task_class(name), name, seed))
    choices, near = ", ".join(task_names()), did_you_mean(name, task_names())
    raise ValueError(f"task must be one of {choices}, a .jsonl file or package.module:Class; got {name!r}{near}")


def task_label(name: str) -> str:
    """A task's name as part of a file's: that of its class, or of its file without folder and ending."""
    return Path(name).stem if name.endswith(".jsonl") else name.rpartition(":")[2]


def _task_class(name: str) -> type[Task]:
    """Raises ValueError where ``name`` is no subclass of Task with all its abstract methods."""
    try:
        found = load(name)
    except ValueError as error:
        raise ValueError(f"task must be a class of tasks: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"task must be a subclass of trajkern.trainer.tasks.Task; {name!r} is {found!r}")
    if found.__abstractmethods__:
        raise ValueError(f"task must define {', '.join(sorted(found.__abstractmethods__))}; {name!r} does not")
    return found


__all__ = [
    "TASKS",
    "Action",
    "ActionTask",
    "Answer",
    "Belief",
    "BeliefTask",
    "CritiqueTask",
    "FamilyTask",
    "HintTask",
    "JsonlTask",
    "PenaltyTask",
    "Question",
    "ReasoningTask",
    "ReferenceTask",
    "Reply",
    "SimulatedTask",
    "ResponseTask",
    "Splits",
    "Task",
    "VoteTask",
    "family_of",
    "load_task",
    "reasoning_of",
    "task_label",
    "task_names",
]
