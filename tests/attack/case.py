"""A hostile call, what must come of it, and what came of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tests.attack.odd_values import odd
from tests.attack.values import hostile

GOOD = "as it should be"


class Case(NamedTuple):
    name: str  # of what is called, as users write it
    label: str  # what of its arguments is wrong
    call: Callable[[], Any]
    named: tuple[str, ...]  # of which a message must have one
    may_pass: bool = False
    heavy: bool = False  # needs a package that takes seconds to import, or seconds itself
    wrong: Callable[[Any], str] = lambda _: "was accepted"  # what is wrong with a result, where none must come


class Outcome(NamedTuple):
    came: str  # an exception's name, or "result"
    fault: str  # empty where that was right


REFUSALS = (TypeError, ValueError)


def outcome(case: Case) -> Outcome:
    """What a call came to: a TypeError or ValueError with a public name or, where that is right, a result."""
    try:
        result = case.call()
    except REFUSALS as error:
        came, message = next(x.__name__ for x in REFUSALS if isinstance(error, x)), str(error)
        other = " on meta like the other tensors" in message  # of which the first has set the device
        is_named = any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in case.named)
        if (is_named or other) and "pybind" not in message:
            return Outcome(came, "")
        return Outcome(came, f"{came} without the name {' or '.join(case.named)}: {message[:200]}")
    except BaseException as error:
        return Outcome(type(error).__name__, f"{type(error).__name__}: {str(error)[:200]}")
    return Outcome("result", "" if case.may_pass else case.wrong(result))


def of_function(
    name: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    kinds: Mapping[str, str] | None = None,
    aliases: Mapping[str, tuple[str, ...]] | None = None,
    heavy: bool = False,
    with_odd: bool = True,
) -> Iterator[Case]:
    """A function's good call, and calls of which one argument is hostile or odd, or has a name that there is not.

    ``kinds``: annotations of arguments that the signature does not say; ``aliases``: what messages may call them.
    """
    yield Case(name, GOOD, partial(function, **arguments), (), may_pass=True, heavy=heavy)
    parameters = inspect.signature(function).parameters.values()
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    known = {x.name: str(x.annotation) for x in parameters if x.kind not in free} | dict(kinds or {})
    defaults = {x.name: x.default for x in parameters}
    alone = sum(isinstance(x, Tensor) for x in arguments.values()) == 1
    for argument, kind in known.items():
        value = arguments.get(argument, defaults.get(argument))
        named = (argument, *(aliases or {}).get(argument, ()))
        for label, x in hostile(argument, kind, value):
            changed = {**arguments, argument: x}
            shape_alone = alone and label == "meta"  # a result of that shape, where no other says a device
            yield Case(name, f"{argument}: {label}", partial(function, **changed), named, shape_alone, heavy)
        for label, x in odd(kind, value) if with_odd else ():
            every = (*known, *(x for names in (aliases or {}).values() for x in names))
            call = partial(function, **{**arguments, argument: x})
            yield Case(name, f"{argument}: {label}", call, every, may_pass=True, heavy=heavy)
    yield Case(name, "foo", partial(function, **arguments, foo=1), ("foo",), heavy=heavy)
