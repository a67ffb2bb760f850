"""What a value may be: its type by its annotation, its range beside it; both are checked here."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from trajkern._suggest import did_you_mean

_PLAIN: dict[Any, tuple[str, Any]] = {
    bool: ("True or False", bool),
    int: ("a whole number", Integral),
    float: ("a number", Real),
    str: ("a text", str),
    Path: ("a path", (str, Path)),
}


@dataclass(frozen=True)
class Range:
    """Of numbers: from ``low`` to ``high``, or ``above`` one; finite, unless ``infinite``."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    infinite: bool = False

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"between {self.low} and {self.high}"
        bounds = (("at least", self.low), ("above", self.above), ("at most", self.high))
        return " and ".join(f"{word} {x}" for word, x in bounds if x is not None) or "finite"

    def check(self, name: str, value: float) -> None:
        """Raise ValueError that names ``name`` where ``value`` lies outside."""
        inside = (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
        inside = inside and (self.above is None or value > self.above) and not math.isnan(value)
        if not inside:
            raise ValueError(f"{name} must be {self}, got {value}")
        if not self.infinite and math.isinf(value):
            raise ValueError(f"{name} must be finite, got {value}")


LARGEST = 2**63 - 1  # that a generator takes as a seed
Count = Annotated[int, Range(low=0)]
Size = Annotated[int, Range(low=1)]
Share = Annotated[float, Range(low=0, high=1)]
PartOf = Annotated[float, Range(above=0, high=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(low=0)]
Finite = Annotated[float, Range()]
Seed = Annotated[int, Range(low=0, high=LARGEST)]
Threads = Annotated[int, Range(low=1, high=256)]  # far more crash OpenMP's runtime
Seconds = Annotated[float, Range(above=0, infinite=True)]
Several = Annotated[int, Range(low=2)]


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """A dataclass's fields and what they may hold, with their ranges."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hints[name] for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]


def check_fields(settings: Any, prefix: str = "") -> None:
    """Raise ValueError where a field of a dataclass is not of its annotated type, or outside of its range.

    ``prefix`` goes before the field's name in the message.
    """
    kind: Any = type(settings)
    for name, hint in hints_of(kind).items():
        conform(prefix + name, getattr(settings, name), hint)


def conform(name: str, value: Any, hint: Any) -> Any:
    """``value`` as ``hint`` has it: JSON data become paths and dataclasses, of which every field must be given.

    Raises:
        ValueError: another type, a number outside its range, a field that is missing or unknown; with the place as
            ``name`` and what leads to it.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        value = conform(name, value, arguments[0])
        for limit in arguments[1:]:
            if isinstance(limit, Range):
                limit.check(name, value)
        return value
    if origin in (Union, UnionType):
        (other,) = (x for x in arguments if x is not NoneType)
        return None if value is None else conform(name, value, other)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, arguments))}; got {value!r}{did_you_mean(value, arguments)}"
            )
        return value
    if origin in (list, dict):
        return _collection(name, value, origin, arguments)
    if is_dataclass(hint):
        table: Any = hint
        if isinstance(value, table):
            check_fields(value, f"{name}.")
            return value
        return _table(name, value, table)
    expected, types = _PLAIN[hint]
    if not isinstance(value, types) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return Path(value) if hint is Path else value


def _collection(name: str, value: Any, kind: type, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}")
    held: Any = value
    if kind is list:
        return [conform(f"{name}[{n}]", x, arguments[0]) for n, x in enumerate(held)]
    return {conform(name, k, arguments[0]): conform(f"{name}.{k}", x, arguments[1]) for k, x in held.items()}


def _table(name: str, value: Any, kind: Any) -> Any:
    hints = hints_of(kind)
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a table of {', '.join(hints)}; got {value!r}")
    for key in sorted(hints.keys() ^ value.keys(), key=str):
        what = "be given" if key in hints else f"not be given, which is none of {', '.join(hints)}"
        raise ValueError(f"{name}.{key} must {what}")
    return kind(**{key: conform(f"{name}.{key}", value[key], hint) for key, hint in hints.items()})
