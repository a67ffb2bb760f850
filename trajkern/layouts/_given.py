"""What a layout was made of: its own copies of what kernels read, and whether anyone has written into the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from trajkern._checks import check_device, check_memory, check_valued

L = TypeVar("L")
T = TypeVar("T")
P = ParamSpec("P")
MOST_TOKENS = 2**31 - 1  # of a layout: attention by segments counts them in int32


def check_tokens(name: str, count: int) -> None:
    if count > MOST_TOKENS:
        raise ValueError(f"{name} must be at most {MOST_TOKENS} tokens, got {count}")


def savable(make: Callable[P, T]) -> Callable[P, T]:
    """Makes what autograd may save, also under ``torch.inference_mode``: a layout outlives the sampling it began in."""

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        if is_dynamo_compiling() or not torch.is_inference_mode_enabled():
            return make(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **kwargs)

    return made


@savable
def owned(x: Tensor) -> Tensor:
    """A contiguous copy that nobody else has."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def check_fields(layout: Any) -> None:
    """Refuses fields without values, once the first is a tensor; one on another device is refused as such."""
    for field in fields(layout):
        if isinstance(x := getattr(layout, field.name), Tensor) and x.device == layout.device:
            check_valued(field.name, x)


@savable
def moved(layout: L, device: torch.device | str, non_blocking: bool) -> L:
    """A layout whose fields lie on another device, not validated again, and without what is derived from them."""
    check_device("device", device)
    there: L = object.__new__(type(layout))
    for field in fields(layout):  # type: ignore[arg-type]
        x = getattr(layout, field.name)
        object.__setattr__(there, field.name, None if x is None else x.to(device, non_blocking=non_blocking))
    return there


class Given:
    """The tensors that a layout was made of and its own that it shows, as they were: torch counts what writes into
    them."""

    def __init__(self, layout: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        self.layout, self.tensors, self.own = layout, tensors, own
        watched = {**tensors, **own}
        self._counted = {name: x for name, x in watched.items() if not x.is_inference()}
        self._versions = [x._version for x in self._counted.values()]
        self._storages = [x.untyped_storage() for x in watched.values()]
        self._sizes = [x.nbytes() for x in self._storages]

    def check(self) -> None:
        if is_dynamo_compiling():  # kernels read the layout's own copies
            return
        versions = [x._version for x in self._counted.values()]
        if versions != self._versions:
            pairs = zip(self._counted, self._versions, versions, strict=True)
            name, count = next((name, now - before) for name, before, now in pairs if now != before)
            which, when = name, f" once a {self.layout} is made of it"
            if name in self.own:
                which, when = f"{self.layout}.{name}", ""
            raise ValueError(
                f"{which} must not be written into{when}; it was, {count} times: make another {self.layout}"
            )
        if [x.nbytes() for x in self._storages] != self._sizes:
            for name, x in {**self.tensors, **self.own}.items():
                check_memory(name, x)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy's tensors have versions of their own."""
        return Given, (self.layout, self.tensors, self.own)


class derived(Generic[T]):
    """A property that is computed once, of one tensor or several, and not shown again once they are written into."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make, self._name, self.__doc__ = savable(make), make.__name__, make.__doc__

    @overload
    def __get__(self, layout: None, owner: type) -> derived[T]: ...
    @overload
    def __get__(self, layout: object, owner: type) -> T: ...
    def __get__(self, layout: object | None, owner: type) -> derived[T] | T:
        if layout is None:
            return self
        if is_dynamo_compiling():
            return self._make(layout)
        shown = layout.__dict__.setdefault("_shown", {})
        if self._name not in shown:
            value = self._make(layout)
            parts = {self._name: value} if isinstance(value, Tensor) else _numbered(self._name, value)
            shown[self._name] = value, Given(owner.__name__, {}, parts)
        value, given = shown[self._name]
        given.check()
        return value


def _numbered(name: str, values: Any) -> dict[str, Tensor]:
    return {f"{name}[{i}]": x for i, x in enumerate(values) if isinstance(x, Tensor)}
