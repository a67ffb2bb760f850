"""Argument checks: every message names the argument, what it must be and what it was."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from trajkern._dtypes import FLOATS, INTEGERS
from trajkern._memory import PLAIN, check_plain, shown
from trajkern._memory import check_memory as check_memory
from trajkern._memory import check_valued as check_valued
from trajkern._memory import describe as describe
from trajkern._memory import is_fake as is_fake
from trajkern._suggest import did_you_mean as did_you_mean
from trajkern._suggest import refuse_unknown as refuse_unknown
from trajkern._suggest import suggesting as suggesting


def readable(x: Tensor) -> bool:
    """Whether checking x's values costs no synchronisation (and no graph break)."""
    return x.is_cpu and not is_compiling() and (type(x) in PLAIN or not is_fake(x))


def resolved(x: Tensor) -> Tensor:
    """``x``, or a copy where its sign is a bit of the view: for what takes a pointer, and for torch's indexing."""
    return x if torch.compiler.is_dynamo_compiling() or not x.is_neg() else x.resolve_neg()


@overload
def laid_out(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def laid_out(x: None, dtype: torch.dtype) -> None: ...
def laid_out(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x`` contiguous and of ``dtype``; itself where it is that already (a no-op ``to`` takes 2 microseconds)."""
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.to(dtype).contiguous()


def check_dtype(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        expected = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have dtype {expected}; got {describe(x)}")


def check_tensor(
    name: str,
    x: Any,
    *,
    dtypes: tuple[torch.dtype, ...] | None = None,
    ndim: int | None = None,
    device: torch.device | None = None,
) -> None:
    """The gate in front of everything that takes a tensor's pointer.

    What lies in strides over memory of its own passes, and what has only a shape: meta and fake tensors, and those of
    traces and of torch.func's transforms.
    """
    if type(x) not in PLAIN:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(x)}")
        check_plain(name, x)
        if not is_dynamo_compiling():
            check_memory(name, x)
    elif not is_dynamo_compiling():
        try:
            memory = x.untyped_storage()
            begin = memory.data_ptr()
            whole = begin != 0 and x.is_contiguous() and x.data_ptr() - begin + x.nbytes <= memory.nbytes()
            whole = whole and (ndim == 1 or not x.is_nested)
        except (RuntimeError, NotImplementedError):  # it has no storage
            whole = False
        if not whole:
            check_memory(name, x)
    if dtypes is not None and x.dtype not in dtypes:
        check_dtype(name, x, dtypes)
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim != 1)}; got {describe(x)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors; got {describe(x)}")


# of what is not found in trajkern itself, by its part
HOMES = {"credit": "trajkern.credit.", "integrations": "", "testing": "trajkern.testing."}


def check_instance(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        home = HOMES.get(kind.__module__.split(".")[1], "trajkern.")
        raise TypeError(f"{name} must be a {home}{kind.__name__}, got {describe(value)}")


def check_device(name: str, value: Any) -> None:
    """What a layout may be moved to. Whether it is there is torch's to say."""
    try:
        if isinstance(value, (str, torch.device)) or type(value) is int:
            torch.device(value)
            return
    except (RuntimeError, ValueError):
        raise ValueError(f"{name} must be one that torch knows, such as 'cuda:0'; got {shown(value)}") from None
    raise TypeError(f"{name} must be a torch.device or its name, got {describe(value)}")


def check_places(name: str, x: Any, count: int, device: torch.device | None = None) -> None:
    """Integers that say which of ``count``; their values where reading them is free."""
    check_tensor(name, x, dtypes=INTEGERS, ndim=1, device=device)
    if readable(x):
        bad = (x < 0) | (x >= count)
        if bool(bad.any()):
            at = int(bad.nonzero()[0, 0])
            raise ValueError(f"{name} must lie in [0, {count}); it is {int(x[at])} at index {at}")


def check_divisor(name: str, value: Any, device: torch.device) -> None:
    """What a loss may be divided by, if it is 0 for another reason: a number or a tensor of one element, or None."""
    if isinstance(value, Tensor):
        check_tensor(name, value, dtypes=(*FLOATS, *INTEGERS), device=device)
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element; got {describe(value)}")
        value = value.detach().reshape(()) if readable(value) else None
    if value is not None:
        check_number(name, value, low=0)


def check_boundaries(name: str, x: Any, device: torch.device | None = None) -> None:
    """``[N+1]`` integers; their values are :func:`check_offsets`'s to check."""
    check_tensor(name, x, dtypes=INTEGERS, ndim=1, device=device)
    if x.shape[0] == 0:
        raise ValueError(f"{name} must hold at least its first 0; it is empty")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)} ({meaning}); got {describe(x)}")


def _unwrapped(value: Any) -> Any:
    """Python's own in place of numpy's scalars, of its arrays without dimensions, and of subclasses, which may compare
    as they like."""
    if value is None or isinstance(value, (Tensor, torch.dtype, bool)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__pos__(value)
    if isinstance(value, float):
        return float.__pos__(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> Any:
    """The choice that the value equals."""
    kind = type(value)
    if (kind is str or kind is int) and value in choices:
        return value
    choices, given = tuple(choices), value
    comparable = (value := _unwrapped(value)) is None or isinstance(value, (int, str, torch.dtype, float))
    if not comparable or isinstance(value, bool) or value not in choices:  # True == 1
        legal = f"{'one of ' * (len(choices) > 1)}{', '.join(map(repr, choices))}"
        raise ValueError(f"{name} must be {legal}; got {shown(given)}{did_you_mean(value, choices)}")
    return choices[choices.index(value)]


def check_sequence(name: str, value: Any, what: str) -> tuple[Any, ...]:
    """A list, a tuple or their like, read once; a text or a mapping is none, nor is a tensor."""
    if isinstance(value, (str, bytes, memoryview)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of {what}, got {describe(value)}")
    return tuple(value)


def check_callable(name: str, value: Any, what: str) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be {what}, got {describe(value)}")


def check_names(name: str, value: Any, choices: Iterable[str]) -> list[str]:
    """A sequence of some of the choices."""
    return [check_choice(name, x, choices) for x in check_sequence(name, value, "names")]


def as_number(name: str, value: Any) -> float:
    """A Python number: of Python's own, of numpy's, or of an array or a CPU tensor without dimensions."""
    if type(value) is float or type(value) is int:
        return value
    given: Any = value
    if isinstance(value, Tensor):
        check_tensor(name, value)
        if value.requires_grad:
            raise TypeError(f"{name} must not require a gradient, which it would not get; got {describe(value)}")
        if value.ndim == 0 and (not value.is_cpu or is_fake(value)):
            raise TypeError(f"{name} must be a number, or lie on the CPU: to read it would wait; got {describe(value)}")
        if is_compiling():
            raise TypeError(f"{name} must be a number in a graph, which cannot read a tensor; got {describe(value)}")
        value = value.item() if value.ndim == 0 else value
    value = _unwrapped(value)
    if isinstance(value, bool) or not isinstance(value, (int, Real)):
        raise TypeError(f"{name} must be a number, got {describe(given)}")
    try:
        return int(value) if isinstance(value, int) else float(value)
    except OverflowError:  # a fraction's
        raise ValueError(f"{name} must be finite, got {describe(given)}") from None


def check_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """The value as a Python number. NaN and infinity never are legal.

    Args:
        low, high: the least and the largest legal value.
        above: a bound that is itself illegal.
        dtype: of the kernel that reads it: there neither the value nor its reciprocal may become 0 or infinite.
    """
    value = as_number(name, value)
    if low is not None and not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {shown(value)}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above}, got {shown(value)}")
    if value != value:
        raise ValueError(f"{name} must be a number, got NaN")
    if abs(value) >= 2.0**63:
        if abs(value) > sys.float_info.max:  # or an integer that no float holds
            raise ValueError(f"{name} must be finite, got {shown(value)}")
        if isinstance(value, int):  # torch takes no larger one
            raise ValueError(f"{name} must be a float, or an integer of at most 64 bits; got {shown(value)}")
    if high is not None and not value <= high:
        raise ValueError(f"{name} must be at most {high}, got {shown(value)}")
    if dtype is not None and value != 0:
        least, most = REPRESENTABLE[dtype]
        if not least <= abs(value) <= most:
            raise ValueError(f"{name} must be {representable(dtype)}; got {shown(value)}")
    return value


def check_count(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """The value as a Python int, of Python's own or of numpy's."""
    number = value if type(value) is int else _unwrapped(value)
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    check_number(name, number, low=low, high=high)
    return number


def check_flag(name: str, value: Any) -> bool:
    """The value as a Python bool, of Python's own or of numpy's."""
    if isinstance(value, bool):
        return value
    if isinstance(flag := _unwrapped(value), bool):
        return flag
    raise TypeError(f"{name} must be True or False, got {describe(value)}")


def checked_field(owner: Any, check: Callable[..., Any], name: str, *args: Any, **limits: Any) -> None:
    """Puts what a check gives back in the place of a frozen dataclass's field."""
    object.__setattr__(owner, name, check(name, getattr(owner, name), *args, **limits))


def check_process_group(name: str, value: Any) -> None:
    if value is not None and not is_dynamo_compiling() and not isinstance(value, _process_groups()):
        raise TypeError(f"{name} must be a process group of torch.distributed, got {describe(value)}")


def _process_groups() -> tuple[type, ...]:
    return (torch.distributed.ProcessGroup,) if torch.distributed.is_available() else ()


# The magnitudes that are normal numbers of a dtype, as are their reciprocals.
REPRESENTABLE = {torch.float32: (2.0**-126, 2.0**126), torch.float64: (2.0**-1022, 2.0**1022)}


def representable(dtype: torch.dtype) -> str:
    least, most = REPRESENTABLE[dtype]
    kind = "float64" if dtype == torch.float64 else "float32"
    return f"of a magnitude between {least:.3g} and {most:.3g}, which {kind} and its reciprocals hold"


def largest_value(dtype: torch.dtype) -> float:
    """What a kernel squares may be this large: no sum of squares of differences overflows, nor a difference."""
    return 2.0 ** (480 if dtype == torch.float64 else 126)  # as kLargest in csrc/common/dtype.h


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """An error that begins with the name of an argument here begins with the caller's."""
    try:
        yield
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(" ")
        if name not in names:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{names[name]} {rest}") from None
