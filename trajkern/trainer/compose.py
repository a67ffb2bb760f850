"""What goes in front of any reward and behind any advantage, as an expression of credit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from trajkern import credit
from trajkern.trainer.returned import agreed, as_flag, as_list
from trajkern.trainer.schema import Finite, NotNegative, Share
from trajkern.trainer.tasks.base import Question, Task

Gate = Literal["drop_rollout", "reject_group_if_any_fails", "reject_group_if_all_fail", "pass_rate"]
Rubric = Callable[[Sequence[Question], Sequence[str]], Sequence[bool]]


@dataclass(frozen=True)
class Compose:
    """What goes in front of any reward and behind any advantage.

    Args:
        rubric: "well_formed", or "package.module:function", called with the questions and the texts of all rollouts of
            a step and returning a flag for each (a judge's verdict, for one). Rollouts that fail it are gated out.
        gate: what becomes of those and of their groups; see trajkern.recipes.dro.gate. By default "pass_rate" for the
            recipe dro, as its authors have it, and "drop_rollout" for any other.
        threshold: the share that "pass_rate" asks for.
        positive_weight: of positive advantages; below 1, failure teaches more than success (W-REINFORCE).
        hint_weight: of log p(with the task's hint) - log p, added to the advantage of each token.
    """

    rubric: str | None = None
    gate: Gate | None = None
    threshold: Share = 0.5
    positive_weight: NotNegative = 1.0
    hint_weight: Finite = 0.0


def load_rubric(name: str | None, task: Task) -> Rubric | None:
    """The rubric that ``compose.rubric`` names. Raises ValueError where there is none of that name."""
    if name is None:
        return None
    if name == "well_formed":
        return lambda questions, texts: [task.read(q, x).well_formed for q, x in zip(questions, texts, strict=True)]
    try:
        function = credit.load(name)
    except ValueError as error:
        raise ValueError(f'compose.rubric must be "well_formed" or {error}') from None
    if not callable(function):
        raise ValueError(f'compose.rubric must be "well_formed" or package.module:function; {name!r} is {function!r}')
    return partial(agreed, f"compose.rubric {name}", function)


def flags_of(rubric: str | None, returned: Any, count: int) -> list[bool]:
    """What a rubric returned, a flag for each of ``count`` rollouts. Raises TypeError or ValueError for all else."""
    name, expected = f"compose.rubric {rubric}", "a flag for each rollout"
    flags = as_list(name, returned, expected, count)
    return [as_flag(name, x, expected, part=f"that of rollout {n}") for n, x in enumerate(flags)]


def composed(spec: credit.Spec, compose: Compose, gate: Gate) -> credit.Spec:
    """The recipe's expression with what the flags add: a gate, by default of the mode ``gate``, another weight for
    success, a hint's term."""
    if compose.positive_weight != 1:
        spec = spec.asymmetric(positive=compose.positive_weight)
    if compose.hint_weight:
        spec = spec + compose.hint_weight * credit.directive(where="failed")
    if compose.rubric is not None:
        spec = spec.gate("rubric", mode=compose.gate or gate, threshold=compose.threshold)
    return spec


def load_spec(name: str) -> credit.Spec:
    """The expression that ``--credit`` names. Raises ValueError where there is none."""
    try:
        spec = credit.load(name)
    except ValueError as error:
        raise ValueError(f"credit must name a trajkern.credit.Spec; {error}") from None
    if not isinstance(spec, credit.Spec):
        raise ValueError(f"credit must name a trajkern.credit.Spec, as package.module:name; {name!r} is {spec!r}")
    return spec
