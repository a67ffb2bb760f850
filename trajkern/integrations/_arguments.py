"""Arguments that a host's names decide: each is held against its annotation, under its own name, before it is read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from trajkern._checks import check_count, check_flag, check_number, check_tensor, describe, readable, renamed
from trajkern._dtypes import FLOATS, INTEGERS

F = TypeVar("F", bound=Callable[..., Any])
NUMBERS = (*FLOATS, *INTEGERS, torch.bool, torch.uint8, torch.int8, torch.int16)  # no quantised or complex ones
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "a text"),
    "Sequence": (Sequence, "a sequence"),
    "Mapping": (Mapping, "a mapping"),
}
_CHECKS: dict[str, Callable[[str, Any], Any]] = {"float": check_number, "int": check_count, "bool": check_flag}


def by_annotation(names: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """A function that raises TypeError or ValueError where an argument is none of what its annotation says.

    Numbers must be finite, flags True or False, tensors dense, in memory, and on one device; what another library
    says a number with arrives as Python's.

    Args:
        names: what the host calls the arguments that an error from inside begins with.
    """

    def decorated(function: F) -> F:
        signature = inspect.signature(function)
        kinds = {name: parts_of(x.annotation) for name, x in signature.parameters.items()}

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            device: torch.device | None = None
            bound = signature.bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                if kinds[name]:
                    bound.arguments[name] = check_kind(name, value, kinds[name], device)
                if device is None and isinstance(value, Tensor) and value.ndim:
                    device = value.device
            with renamed(names or {}):
                return function(*bound.args, **bound.kwargs)

        return checked  # type: ignore[return-value]

    return decorated


def parts_of(annotation: Any) -> tuple[str, ...]:
    """Of a union in words; nothing where one of them may be anything."""
    parts = tuple(x.partition("[")[0] for x in str(annotation).split(" | "))
    return parts if all(x in ("Tensor", "None", *_KINDS, *_CHECKS) for x in parts) else ()


def check_kind(name: str, value: Any, parts: tuple[str, ...], device: torch.device | None) -> Any:
    """The value, a number as Python's: it is of one of the kinds, and a tensor on the device."""
    if value is None and "None" in parts:
        return value
    kinds = [x for x in parts if x != "None"]
    if len(kinds) > 1:  # what a value looks like decides which of them it is to be
        looks = "Tensor" if isinstance(value, Tensor) else "float" if isinstance(value, Real) else kinds[0]
        kinds = [looks] if looks in kinds else kinds
    kind = kinds[0]
    if kind == "Tensor":
        check_tensor(name, value, dtypes=NUMBERS, device=device)
    elif kind in _CHECKS:
        return _CHECKS[kind](name, value)
    elif not isinstance(value, _KINDS[kind][0]) or (kind == "Sequence" and isinstance(value, (str, bytes))):
        raise TypeError(f"{name} must be {_KINDS[kind][1]}, got {describe(value)}")
    return value


def choosing(name: str, mask: Tensor) -> Tensor:
    """A host's mask of any dtype as bool.

    A number between 0 and 1 weighs a token in a host's sums, and here would count in full: on a CPU it is refused.
    """
    check_tensor(name, mask, dtypes=NUMBERS)
    if mask.dtype != torch.bool and readable(mask):
        illegal = (mask != 0) & (mask != 1)
        if bool(illegal.any()):
            raise ValueError(f"{name} must hold 0 and 1 alone, which choose tokens; got {mask[illegal][0].item():g}")
    return mask != 0


def weighing(name: str, weights: Tensor) -> Tensor:
    """Weights as they are; negative ones, which change the sides of a clip, are refused on a CPU."""
    if readable(weights) and bool((illegal := weights < 0).any()):
        raise ValueError(f"{name} must be at least 0, got {weights[illegal][0].item():g}")
    return weights
