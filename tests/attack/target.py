"""A function of a structure from outside, and the calls of it with one node of that wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tests.attack.case import Case
from tests.attack.mutated import GONE, Mutation, mutations


class Target(NamedTuple):
    """A function of a structure, and when what it makes of a changed one is right."""

    name: str
    call: Callable[[Any], Any]
    structure: Any
    argument: str
    words: tuple[str, ...] = ()  # what messages may call parts of the structure
    unread: tuple[str, ...] = ()  # fields by name that say nothing to it
    optional: tuple[str, ...] = ()  # fields by name that may be missing, or None
    alike: Callable[[Mutation], bool] = lambda _: False  # what may stand there and says the same
    another: Callable[[Mutation], bool] = lambda x: (
        x.is_number_for_number
    )  # what may stand there and says something else
    right: Callable[[Mutation, Any, Any], bool] = lambda change, result, base: True  # of what says something else


def target_cases(target: Target) -> Iterator[Case]:
    base = target.call(target.structure)
    call = partial(target.call, target.structure)
    yield Case(target.name, "as it should be", call, (), may_pass=True)
    for change in mutations(target.structure):
        named = (target.argument, *target.words, *change.names)
        wrong = partial(_wrong, target, change, base)
        yield Case(target.name, change.label, partial(target.call, change.value), named, wrong=wrong)


def _wrong(target: Target, change: Mutation, base: Any, result: Any) -> str:
    if set(target.unread) & set(change.names):
        return "" if same(result, base) else "changed by what it does not read"
    absent = change.after is GONE or change.after is None
    if absent and change.names and change.names[-1] in target.optional and change.path[-1] == change.names[-1]:
        return "" if target.right(change, result, base) else "is wrong without it"
    if target.alike(change):
        return "" if same(result, base) else "changed by what says the same"
    if not target.another(change):
        return "was accepted"
    return "" if target.right(change, result, base) else f"is wrong: {str(result)[:150]}"


def same(x: Any, y: Any) -> bool:
    """Whether two results are equal, in their types as well."""
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        alike = isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and x.shape == y.shape
        return alike and bool(((x == y) | ((x != x) & (y != y))).all())
    if type(x) is not type(y):
        return False
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, float) and math.isnan(x):
        return math.isnan(y)
    fields = getattr(x, "__dataclass_fields__", None)
    if fields is not None:
        return all(same(getattr(x, name), getattr(y, name)) for name in fields)
    return x is y or bool(x == y)
