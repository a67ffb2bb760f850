"""What was meant by a name that does not exist: for misspelt options, choices and settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch.compiler import is_dynamo_compiling

Function = TypeVar("Function", bound=Callable[..., Any])
_LONGEST = 60  # characters of a name that is compared: the time grows with their square


def did_you_mean(given: Any, choices: Iterable[Any]) -> str:
    """The end of a message that refuses ``given``: the nearest of the choices' names, or nothing where none is near."""
    if not isinstance(given, str) or len(given) > _LONGEST:
        return ""
    from difflib import get_close_matches  # only where something goes wrong

    names = {_plain(x): x for x in choices if isinstance(x, str)}
    near = get_close_matches(_plain(given), names, 1)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def suggesting(function: Function) -> Function:
    """Around a public function, or a class whose making is meant: a misspelt option is refused with the nearest one.

    Costs nothing where nothing is wrong: it is Python that finds an argument which does not exist.
    """
    if isinstance(function, type):
        function.__init__ = _around(function.__init__, f"{function.__name__}()")  # type: ignore[misc]
        return function
    return _around(function, f"{function.__qualname__}()")


def _around(function: Any, name: str) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if is_dynamo_compiling():
            return function(*args, **options)
        try:
            return function(*args, **options)
        except TypeError:
            refuse_unknown(name, function, options)
            raise

    return call


def refuse_unknown(name: str, function: Callable[..., Any], options: Iterable[str]) -> None:
    """TypeError where one of the options is no argument of the function, which is shown by ``name``."""
    known = inspect.signature(function).parameters.values()
    if any(x.kind is x.VAR_KEYWORD for x in known):
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    legal = [x.name for x in known if x.kind in named and x.name not in ("self", "cls")]
    for option in options:
        if option not in legal:
            instead = did_you_mean(option, legal) or f"; it takes {', '.join(legal) or 'none'}"
            raise TypeError(f"{name} has no option {option!r}{instead}") from None
