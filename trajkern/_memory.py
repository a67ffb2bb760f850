"""What a tensor's elements lie in, which is asked before a pointer to them is taken."""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PLAIN = (Tensor, torch.nn.Parameter)
_CONTAINERS = (list, tuple, dict, set, frozenset)
_LONGEST = 200  # characters of a value in a message


def describe(x: Any) -> str:
    """A short description of a value for an error message."""
    if not isinstance(x, Tensor):
        return f"{shown(x)} ({type(x).__name__})"
    dtype = str(x.dtype).removeprefix("torch.")
    if x.is_nested:
        return f"nested {dtype} on {x.device}"
    layout = "" if x.layout is torch.strided else f"{_named(x.layout)} "
    return f"{layout}{dtype}{list(x.shape)} on {x.device}"


class _Words(reprlib.Repr):
    """What containers hold, with tensors by what they are: to print one is to read its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxstring = _LONGEST

    def repr1(self, x: Any, level: int) -> str:
        return describe(x) if isinstance(x, Tensor) else super().repr1(x, level)


def shown(value: Any) -> str:
    """A value's own words, cut short; of an integer that Python will not print, its size; of a tensor what it is."""
    if isinstance(value, int) and value.bit_length() > 1024:  # no float holds it
        return f"an integer of {value.bit_length()} bits"
    try:
        words = _Words().repr(value) if isinstance(value, (*_CONTAINERS, Tensor)) else repr(value)
    except Exception:  # whatever an object's own repr raises
        return f"a {type(value).__name__}"
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."


def _named(layout: torch.layout) -> str:
    return str(layout).removeprefix("torch.").removeprefix("_")


def is_fake(x: Tensor) -> bool:
    """Whether it has a shape and a device's name, and no values."""
    return isinstance(x, FakeTensor)


def check_plain(name: str, x: Any) -> None:
    """Refuses the subclasses of which the values lie elsewhere: sharded, quantised and nested tensors."""
    if is_lazy(x):
        raise ValueError(f"{name} must have a shape; got a {_kind(x)}")
    if type(x) in PLAIN or not is_traceable_wrapper_subclass(x):
        return
    kind, placed = _kind(x), getattr(x, "placements", None)
    if placed is None:
        raise TypeError(f"{name} must be a plain tensor, not a {kind}; got {describe(x)}")
    raise TypeError(
        f"{name} must be a plain tensor, not a {kind} with placements {tuple(placed)}: {name}.full_tensor() is one, "
        "and its grad_placements= says how the ranks' gradients are reduced"
    )


def check_memory(name: str, x: Tensor) -> None:
    """Refuses a tensor that is not strided, or whose elements do not all lie in memory."""
    if isinstance(x, FakeTensor):
        return
    if _is_wrapped(x):
        if not _is_transformed():
            raise TypeError(f"{name} must not be of a trace or transform that has ended; got {_kind(x)}")
        return
    if x.is_nested or x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor of strides; got {describe(x)}")
    if x.is_meta or x.numel() == 0:
        return
    if x._is_zerotensor():
        raise ValueError(f"{name} must have memory; got {describe(x)} that stands for zeros and holds none")
    memory, needed = x.untyped_storage(), _end(x)
    if memory.nbytes() < needed:
        raise ValueError(
            f"{name} must have memory; this was freed, as sharded models do outside of their forward: of the {needed} "
            f"bytes of {describe(x)} there are {memory.nbytes()}"
        )
    try:
        begin = memory.data_ptr()
    except RuntimeError:  # of a wrapper
        begin = 0
    if begin == 0:
        raise TypeError(
            f"{name} must be a plain tensor, not a {_kind(x)} whose values lie elsewhere; got {describe(x)}"
        )


def check_valued(name: str, x: Tensor) -> None:
    """Refuses what has a shape and no values, where they are read whatever the device."""
    if x.is_meta or is_fake(x):
        raise ValueError(f"{name} must have values, which are read here; got {describe(x)}, a tensor of a shape alone")
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise ValueError(f"{name} must have values, which are read here; got {describe(x)} inside of a transform")


def _is_wrapped(x: Tensor) -> bool:
    """Whether a trace or a transform stands for the values, and plain torch or an op's fake runs on it."""
    if isinstance(x, FunctionalTensor) or torch._is_functional_tensor(x):
        return True
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def _is_transformed() -> bool:
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


def _kind(x: Any) -> str:
    return type(x).__name__


def _end(x: Tensor) -> int:
    """The bytes of a storage up to the end of x's last element."""
    last = x.storage_offset() + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return int(last + 1) * x.itemsize
