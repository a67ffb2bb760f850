"""What a task of one's own returns, checked where it returns it: later it would be an error that names nothing, or a
number that means something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any

import torch

from trajkern.trainer.tasks.base import Answer, Question, Reply, Task


def checked(task: Task) -> Task:
    """The task, whose methods raise TypeError or ValueError, by their names, where what they return is not theirs to
    return."""
    checks: dict[str, Callable[[str, Any], Any]] = {
        "questions": _questions,
        "read": _answer,
        "reward": as_finite,
        "reply": _reply,
        "pieces": _pieces,
        "statistics": _statistics,
        "identity": _identity,
    }
    for method, check in checks.items():
        setattr(task, method, _returning(getattr(task, method), f"{type(task).__name__}.{method}", check))
    return task


def as_finite(name: str, value: Any) -> float:
    """A number of Python's, of numpy's or of a tensor of one element. Raises TypeError or ValueError for another."""
    if isinstance(value, torch.Tensor) or type(value).__module__ == "numpy":
        value = value.item() if getattr(value, "size", None) == 1 or getattr(value, "ndim", 1) == 0 else value
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"{name} must return a number, got {_shown(value)}")
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must return a number that float32 holds, got {_shown(value)}")
    return float(value)


def _returning(method: Callable[..., Any], name: str, check: Callable[[str, Any], Any]) -> Callable[..., Any]:
    @wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        return check(name, method(*args, **kwargs))

    return called


def _questions(name: str, value: Any) -> Iterator[Question]:
    try:
        drawn = iter(value)
    except TypeError:
        raise TypeError(f"{name} must return an iterator of Question, got {_shown(value)}") from None
    return (_question(name, each) for each in drawn)


def _question(name: str, value: Any) -> Question:
    texts = isinstance(value, Question) and all(isinstance(x, str) for x in value[:3])
    if not texts or not isinstance(value.entry, Mapping):
        raise TypeError(
            f"{name} must draw Question(prompt, text, answer, entry), three texts and a dict; got {_shown(value)}"
        )
    return value


def _answer(name: str, value: Any) -> Answer:
    if not isinstance(value, Answer):
        raise TypeError(f"{name} must return an Answer, got {_shown(value)}")
    as_finite(f"{name}'s correct: it", value.correct)
    as_finite(f"{name}'s well_formed: it", value.well_formed)
    if value.confidence is not None and not 0 <= as_finite(f"{name}'s confidence: it", value.confidence) <= 1:
        raise ValueError(f"{name} must return a confidence in [0, 1] or None, got {_shown(value.confidence)}")
    return value


def _reply(name: str, value: Any) -> Reply | None:
    if value is not None and not (isinstance(value, Reply) and isinstance(value.text, str)):
        raise TypeError(f"{name} must return a Reply with a text, or None; got {_shown(value)}")
    return value


def _pieces(name: str, value: Any) -> list[tuple[str, bool]]:
    pairs = isinstance(value, (list, tuple)) and all(isinstance(x, tuple) and len(x) == 2 for x in value)
    if not pairs or not all(isinstance(text, str) for text, _ in value):
        raise TypeError(f"{name} must return a list of (text, whether it is learnt), got {_shown(value)}")
    return list(value)


def _statistics(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must return a dict of numbers, got {_shown(value)}")
    return {key: x if _is_nan(x) else as_finite(f"{name}'s {key!r}: it", x) for key, x in value.items()}


def _identity(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must return a text, got {_shown(value)}")
    return value


def _is_nan(x: Any) -> bool:  # of a mean of nothing
    return isinstance(x, float) and math.isnan(x)


def _shown(value: Any) -> str:
    try:
        words = repr(value)
    except Exception:  # whatever an object's own repr raises
        words = "one"
    return f"{words if len(words) <= 200 else f'{words[:200]}...'} ({type(value).__name__})"
