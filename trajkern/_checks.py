"""Argument checks: every message names the argument, what it must be and what it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (Tensor, torch.nn.Parameter)


def describe(x: Any) -> str:
    """A short description of a value for an error message."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
    return f"{x!r} ({type(x).__name__})"


def readable(x: Tensor) -> bool:
    """Whether checking x's values costs no synchronisation (and no graph break)."""
    return x.is_cpu and not torch.compiler.is_compiling()


@overload
def laid_out(x: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def laid_out(x: None, dtype: torch.dtype) -> None: ...
def laid_out(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """``x`` contiguous and of ``dtype``; itself where it is that already (a no-op ``to`` takes 2 microseconds)."""
    if x is None or (x.dtype == dtype and x.is_contiguous()):
        return x
    return x.to(dtype).contiguous()


def check_plain(name: str, x: Any) -> None:
    """Refuses the subclasses of which the values lie elsewhere: sharded, quantised and nested tensors."""
    if type(x) in _PLAIN or not is_traceable_wrapper_subclass(x):
        return
    kind, placed = type(x).__name__, getattr(x, "placements", None)
    if placed is None:
        raise TypeError(f"{name} must be a plain tensor, not a {kind}; got {describe(x)}")
    raise TypeError(
        f"{name} must be a plain tensor, not a {kind} with placements {tuple(placed)}: {name}.full_tensor() is one, "
        "and its grad_placements= says how the ranks' gradients are reduced"
    )


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
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(x)}")
    check_plain(name, x)
    if dtypes is not None and x.dtype not in dtypes:
        check_dtype(name, x, dtypes)
    if ndim is not None and x.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim != 1)}; got {describe(x)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors; got {describe(x)}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)} ({meaning}); got {describe(x)}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    choices = tuple(choices)
    if value not in choices or isinstance(value, bool):  # True == 1
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_number(name: str, value: float, *, low: float | None = None, above: float | None = None) -> None:
    """``low``: the least legal value. ``above``: a bound that is itself illegal. NaN and infinity never are."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if low is not None and not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{name} must be greater than {above}, got {value}")
    if value != value:
        raise ValueError(f"{name} must be a number, got NaN")
    if value in (math.inf, -math.inf):
        raise ValueError(f"{name} must be finite, got {value}")


def check_finite(name: str, x: Tensor, where: Tensor | None = None) -> None:
    """Reads device values."""
    bad = ~torch.isfinite(x)
    if where is not None:
        bad &= where
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise ValueError(f"{name} must be finite; it is {float(x[at])} at index {at}")


def check_values(name: str, x: Tensor, low: float) -> None:
    """Finite and at least ``low``. Reads device values."""
    check_finite(name, x)
    if bool((x < low).any()):
        raise ValueError(f"{name} must be at least {low:g}; the smallest is {float(x.min())}")


def check_targets(targets: Tensor, vocabulary: int, mask: Tensor | None, name: str = "targets") -> None:
    """Reads device values."""
    bad = (targets < 0) | (targets >= vocabulary)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0, 0])
        value = int(targets.flatten()[row])
        raise ValueError(f"{name} must lie in [0, {vocabulary}) on every unmasked row; {name} is {value} at row {row}")


def check_cu_seqlens(cu_seqlens: Tensor, length: int) -> None:
    """Reads device values."""
    check_offsets("cu_seqlens", cu_seqlens, length, "tokens")


def check_equal_lengths(cu_seqlens: Tensor, group_ids: Tensor) -> None:
    """The rollouts of each group score the same reference. Reads device values."""
    lengths, (ids, group) = cu_seqlens.diff(), torch.unique(group_ids, return_inverse=True)
    least, most = (
        lengths.new_zeros(ids.shape).scatter_reduce(0, group, lengths, to, include_self=False)
        for to in ("amin", "amax")
    )
    uneven = (least != most).nonzero()
    if uneven.numel():
        at = int(uneven[0, 0])
        raise ValueError(
            "cu_seqlens must give all rollouts of a group references of equal length; "
            f"group {int(ids[at])} has lengths {lengths[group == at].unique().tolist()}"
        )


def check_offsets(name: str, offsets: Tensor, length: int, what: str = "entries") -> None:
    """Reads device values."""
    if offsets.numel() == 0:
        raise ValueError(f"{name} must hold at least its first 0; it is empty")
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != length:
        raise ValueError(f"{name} must run from 0 to the {length} {what}; it runs from {first} to {last}")
    falls = (offsets[1:] < offsets[:-1]).nonzero()  # a difference could overflow
    if falls.numel():
        at = int(falls[0, 0])
        pair = offsets[at : at + 2].tolist()
        raise ValueError(f"{name} must never decrease; it goes from {pair[0]} to {pair[1]} at index {at + 1}")
