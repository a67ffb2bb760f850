"""Arguments that may be right, for the ops, layouts and recipes: each call is refused by name, or both of the CPU's
backends have its result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from tests.attack.case import REFUSALS, Case
from tests.attack.functions import good
from tests.attack.odd_values import odd
from tests.attack.values import shown

TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 2e-2}  # of what is rounded at its end, else 1e-4


def cases() -> Iterator[Case]:
    for function, arguments in good().items():
        parameters = inspect.signature(function).parameters
        for argument, parameter in parameters.items():
            value = arguments.get(argument, parameter.default)
            for label, x in odd(str(parameter.annotation), value):
                call = partial(agreed, function, {**arguments, argument: x})
                yield Case(function.__qualname__, f"{argument}: {label}", call, tuple(parameters), may_pass=True)


def agreed(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """The native backend's result, where the reference has it too; what it raises, where neither has one."""
    with tk.use_backend("reference"):
        expected = _came(function, arguments)
    with tk.use_backend("native"):
        found = _came(function, arguments)
    if isinstance(found, BaseException):
        raise found
    if isinstance(expected, REFUSALS):
        return found  # of what float32's sums, with which the reference adds float32, cannot hold
    if isinstance(expected, BaseException):
        raise expected
    if at := _difference(_tensors(found), _tensors(expected)):
        raise AssertionError(at)
    return found


def _came(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return function(**arguments)
    except Exception as error:
        return error


def _difference(found: list[Tensor], expected: list[Tensor]) -> str:
    if len(found) != len(expected):
        return f"{len(found)} tensors for {len(expected)}"
    lost = None  # where a number is lost, so may be the integers of its place
    for x, y in zip(found, expected, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"{shown(x)} for {shown(y)}"
        if not x.is_floating_point():
            unlike = (x != y) if lost is None or lost.shape != x.shape else (x != y) & ~lost
        else:
            lost = ~y.isfinite()  # which float32's sums may be where the kernel's are not
            unlike = ~torch.isclose(x.double(), y.double(), TOLERANCES.get(x.dtype, 1e-4), 1e-4) & ~lost
        if bool(unlike.any()):
            return f"{x[unlike][0].item()} for {y[unlike][0].item()}"
    return ""


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.detach()]
    if isinstance(result, (tuple, list)):
        return [x for part in result for x in _tensors(part)]
    if is_dataclass(result) and not isinstance(result, type):
        return [x for field in fields(result) for x in _tensors(getattr(result, field.name))]
    return []
