"""Every way in which a nested structure from outside can be wrong at one place: the node there is another, or gone."""

from __future__ import annotations

import copy
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.attack.values import HUGE, shown

Path = tuple[Any, ...]  # keys and attributes by name, elements by number
GONE = object()


class Mutation(NamedTuple):
    path: Path
    before: Any  # the node that stood there
    after: Any  # what stands there now, GONE where nothing does
    value: Any  # the whole structure

    @property
    def label(self) -> str:
        at = "".join(f"[{x!r}]" for x in self.path)
        return f"{at}: {'gone' if self.after is GONE else shown(self.after)}"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(x for x in self.path if isinstance(x, str))

    @property
    def is_number_for_number(self) -> bool:
        """Whether what stands there may be meant: a finite number in the place of one, a whole one of a whole one."""
        if type(self.after) not in (int, float) or type(self.before) not in (int, float):
            return False
        whole = type(self.before) is int
        return abs(self.after) < 2**63 and math.isfinite(self.after) and (type(self.after) is int or not whole)


def mutations(value: Any, path: Path = ()) -> Iterator[Mutation]:
    """The structure with one node replaced or taken out, at every path; of a list at its first and last entries."""
    for after in _hostile(value):
        yield Mutation(path, value, after, after)
    for key, node in _children(value):
        for x in mutations(node, (*path, key)):
            yield x._replace(value=_with(value, key, x.value))
        if not isinstance(key, int):
            yield Mutation((*path, key), node, GONE, _with(value, key, GONE))


def _hostile(value: Any) -> Iterator[Any]:
    arrays = (np.ndarray, Tensor)
    yield from (x for x in _plain() if type(x) is not type(value) or isinstance(x, arrays) or x != value)
    if isinstance(value, Tensor):
        yield from _tensors(value)
    elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and value:
        kind = type(value)
        yield kind([*value, value[-1]])
        yield value[:-1]
        yield kind([None, *value[1:]])
    elif isinstance(value, int):
        yield float(value)


def _plain() -> list[Any]:
    arrays = [np.array([1.0, 2.0]), torch.tensor([[1.0, math.nan]]), torch.tensor(1, device="meta")]
    numbers = [-1, 2, 2**64, HUGE, 0.5, math.nan, math.inf, -math.inf, True]
    return [None, "text", "", b"x", *numbers, [], {}, (), [[]], object(), *arrays]


def _tensors(x: Tensor) -> Iterator[Tensor]:
    yield x.to("meta")
    yield x.unsqueeze(-1)
    yield x.flatten().to(torch.complex64)
    if x.ndim:
        yield torch.cat((x, x[-1:]))
        yield x[:-1]
    if x.is_floating_point():
        yield x.long()
        for bad in (math.nan, math.inf):
            yield torch.full_like(x, bad)
    else:
        yield x.double() + 0.5
        yield torch.full_like(x, -1, dtype=torch.int64)
        yield torch.full_like(x, 2**62, dtype=torch.int64)
        yield torch.full_like(x, 2, dtype=torch.int64)


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if hasattr(value, "_fields"):
        return list(value._asdict().items())
    if isinstance(value, (list, tuple)):
        return [(i, value[i]) for i in sorted({0, len(value) - 1} & set(range(len(value))))]
    if isinstance(value, (SimpleNamespace, Namespace)) or (is_dataclass(value) and not isinstance(value, type)):
        return list(vars(value).items())
    return []


def _with(value: Any, key: Any, node: Any) -> Any:
    """A copy with another node at the key."""
    if isinstance(value, Mapping):
        changed = {**value, key: node}
        if node is GONE:
            del changed[key]
        return changed
    if hasattr(value, "_fields"):
        return value._replace(**{key: None if node is GONE else node})
    if isinstance(value, (list, tuple)):
        return type(value)([*value[:key], node, *value[key + 1 :]])
    changed = copy.copy(value)
    if node is GONE:
        object.__delattr__(changed, key)
    else:
        object.__setattr__(changed, key, node)
    return changed
