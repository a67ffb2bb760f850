"""What is played: questions with a verifier, some with an environment; by name."""

from __future__ import annotations

from trajkern.trainer.tasks.base import Answer, Question, Reply, Splits, Task
from trajkern.trainer.tasks.gym import SPECS, GymTask
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
    """The task called ``name``. Raises ValueError with the list of names where there is none."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(task_names())}; got {name!r}")
    return TASKS[name](name, seed)


__all__ = ["TASKS", "Answer", "Question", "Reply", "Splits", "Task", "load_task", "task_names"]
