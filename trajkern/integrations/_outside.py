"""Nested values from outside, read along a path that an error names, each node held against what it must be."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from trajkern._checks import check_count, check_tensor, check_valued, describe, is_fake, shown
from trajkern.integrations._arguments import NUMBERS

MOST_ID = 2**63 - 1  # what int64 holds
MOST_REAL = torch.finfo(torch.float32).max


def decoded(content: bytes) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or an object's key stands in it twice."""
    return json.loads(content, object_pairs_hook=_once, parse_constant=_no_number)


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON's")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:200]!r} stands twice in an object")
    return found


class Outside(NamedTuple):
    """A value and its place: ``path`` in ``whose``, "logprobs[2]" in "choice 0"."""

    whose: str
    value: Any
    path: str = ""

    @property
    def name(self) -> str:
        return f"{self.path} of {self.whose}" if self.path else self.whose

    def refuse(self, what: str) -> TypeError:
        return TypeError(f"{self.name} must be {what}, got {describe(self.value)}")

    def get(self, key: str) -> Outside | None:
        """A mapping's entry, or an object's attribute; None where there is none or it is None."""
        if isinstance(self.value, Mapping):
            found = self.value.get(key)
        elif _is_leaf(self.value):
            raise self.refuse(f"a mapping or an object with {key}")
        else:
            found = getattr(self.value, key, None)
        return None if found is None else Outside(self.whose, found, f"{self.path}.{key}" if self.path else key)

    def at(self, key: str, why: str = "") -> Outside:
        """Likewise; ValueError where there is none."""
        found = self.get(key)
        if found is None:
            has = sorted(map(str, self.value)) if isinstance(self.value, Mapping) else describe(self.value)
            raise ValueError(f"{self.name} must have {key}{', ' * bool(why)}{why}; it has {shown(has)}")
        return found

    def each(self) -> list[Outside]:
        return [Outside(self.whose, x, f"{self.path}[{i}]") for i, x in enumerate(self.sequence())]

    def sequence(self, what: str = "a list") -> Sequence[Any]:
        if not is_list(self.value):
            raise self.refuse(what)
        return self.value

    def mapping(self) -> Mapping[Any, Any]:
        if not isinstance(self.value, Mapping):
            raise self.refuse("a mapping")
        return self.value

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.refuse("a text")
        return self.value

    def count(self, low: int | None = 0) -> int:
        return check_count(self.name, self.value, low=low, high=MOST_ID)

    def ids(self) -> list[int]:
        """Whole numbers, of tokens and the like."""
        return self._all(lambda x: type(x) is int and 0 <= x <= MOST_ID, "integers of at least 0 that int64 holds")

    def tensors(self, dtypes: tuple[torch.dtype, ...] = NUMBERS, device: torch.device | None = None) -> list[Tensor]:
        """Of one dimension each, on one device."""
        found = list(self.sequence("a list of tensors"))
        for i, x in enumerate(found):
            check_tensor(f"{self.name}[{i}]", x, dtypes=dtypes, ndim=1, device=device)
            device = x.device
        return found

    def values(self) -> list[Any]:
        """Of a list, or of a tensor or array of one dimension; Python's own in place of their scalars."""
        x: Any = self.value
        if isinstance(x, Tensor):
            check_tensor(self.name, x, dtypes=NUMBERS, ndim=1)
            check_valued(self.name, x)
        elif not is_list(x) and getattr(x, "ndim", None) != 1:
            raise self.refuse("a list of a value each")
        found = x.tolist() if hasattr(x, "tolist") else list(x)
        return [y.item() if getattr(y, "ndim", None) == 0 and not is_shape_alone(y) else y for y in found]

    def reals(self, *, missing: bool = False, flags: bool = False) -> list[float]:
        """Finite numbers, that float32 holds; NaN and None, as NaN, where they may be ``missing``."""

        def legal(x: Any) -> bool:
            if x is None or (type(x) is float and x != x):
                return missing
            return (flags or type(x) is not bool) and isinstance(x, (int, float)) and abs(x) <= MOST_REAL

        values = self._replace(value=self.values())._all(legal, "finite numbers")
        return [math.nan if x is None else float(x) for x in values]

    def real(self, *, missing: bool = False) -> float:
        """A number, True and False included."""
        return self._replace(value=[self.value]).reals(missing=missing, flags=True)[0]

    def choice(self) -> bool:
        return self._replace(value=[self.value]).choices()[0]

    def tensor(
        self,
        shape: Sequence[int] | None = None,
        dtypes: tuple[torch.dtype, ...] = NUMBERS,
        device: torch.device | None = None,
        ndim: int | None = None,
    ) -> Tensor:
        """Of values that can be read, where they lie."""
        check_tensor(self.name, self.value, dtypes=dtypes, ndim=ndim, device=device)
        check_valued(self.name, self.value)
        if shape is not None and tuple(self.value.shape) != tuple(shape):
            raise ValueError(f"{self.name} must have shape {list(shape)}; got {describe(self.value)}")
        return self.value

    def choices(self) -> list[bool]:
        """True and False, or 1 and 0."""
        values = self._replace(value=self.values())
        return [bool(x) for x in values._all(lambda x: isinstance(x, (int, float)) and x in (0, 1), "True or False")]

    def flags(self) -> list[bool]:
        return self._all(lambda x: type(x) is bool, "True or False each")

    def _all(self, legal: Callable[[Any], bool], what: str) -> list[Any]:
        values = list(self.sequence())
        if (bad := first_not(legal, values)) is not None:
            kind = ValueError if type(values[bad]) in (int, float) else TypeError
            raise kind(f"{self.name} must be {what}; entry {bad} of {len(values)} is {describe(values[bad])}")
        return values


def is_list(x: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(x, Sequence) and not isinstance(x, (str, bytes, bytearray, memoryview))


def is_shape_alone(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_meta or is_fake(x))


def first_not(legal: Callable[[Any], bool], values: Iterable[Any]) -> int | None:
    """Where the first value stands that is not legal."""
    return next((i for i, x in enumerate(values) if not legal(x)), None)


def _is_leaf(x: Any) -> bool:
    return x is None or isinstance(x, (str, bytes, int, float, complex, Tensor)) or is_list(x)
