"""What a layout was made of: its own copies of what kernels read, and whether anyone has written into the rest."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from trajkern._checks import check_device

L = TypeVar("L")
MOST_TOKENS = 2**31 - 1  # of a layout: attention by segments counts them in int32


def owned(x: Tensor) -> Tensor:
    """A contiguous copy that nobody else has."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def moved(layout: L, device: torch.device | str, non_blocking: bool) -> L:
    """A layout whose fields lie on another device, not validated again, and without what is derived from them."""
    check_device("device", device)
    there: L = object.__new__(type(layout))
    for field in fields(layout):  # type: ignore[arg-type]
        x = getattr(layout, field.name)
        object.__setattr__(there, field.name, None if x is None else x.to(device, non_blocking=non_blocking))
    return there


class Given:
    """The tensors that a layout was made of, with the versions that they had: torch counts what writes into them."""

    def __init__(self, layout: str, tensors: dict[str, Tensor]) -> None:
        self.layout, self.tensors = layout, tensors
        counted = {name: x for name, x in tensors.items() if not x.is_inference()}
        self._versions = [(name, x, x._version) for name, x in counted.items()]

    def check(self) -> None:
        if is_dynamo_compiling():  # kernels read the layout's own copies
            return
        for name, x, version in self._versions:
            if x._version != version:
                raise ValueError(
                    f"{name} must not be written into once a {self.layout} is made of it; it was, "
                    f"{x._version - version} times: make another {self.layout}"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy's tensors have versions of their own."""
        return Given, (self.layout, self.tensors)
