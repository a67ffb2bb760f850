"""Odd values: what may be right for an argument of some kind. Every dtype, shape and layout of a tensor, numbers of all
kinds at their edges, names and flags as others write them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.attack.values import shown

DTYPES = tuple(dict.fromkeys(x for x in vars(torch).values() if isinstance(x, torch.dtype)))


class Named(str):
    pass


class Wrapped(Tensor):
    pass


class Agreeing(str):
    """A text that equals every other."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return True


class Willing(int):
    """A number that no bound refuses."""

    def __lt__(self, other: object) -> bool:
        return False

    def __gt__(self, other: object) -> bool:
        return False

    def __le__(self, other: object) -> bool:
        return True

    def __ge__(self, other: object) -> bool:
        return True


class Nine(list):
    """A list that says that it holds nine."""

    def __len__(self) -> int:
        return 9


SMALL = [0, 1, 2, 0.0, -0.0, 0.5, 2**31, Fraction(1, 3), np.float64(0.5), np.float32(0.5), np.float16(0.5), np.int64(1)]
SMALL += [np.longdouble(0.5), np.array(0.5), np.array(1, dtype=object), torch.tensor(0.5), torch.tensor(1)]
SMALL += [torch.tensor(0.5, dtype=x) for x in (torch.float64, torch.bfloat16, torch.float8_e4m3fn)]
NUMBERS = [-1, 2**63 - 1, 2**63, 2**64, -(2**64), 2**128, 10**308, 1e39, -1e39, 1e-46, 5e-324, 1.7e308, Fraction(2**70)]
NUMBERS += [Decimal("0.5"), Decimal("1e400"), Decimal("NaN"), 1 + 0j, np.uint64(2**63), np.datetime64("2020-01-01")]
NUMBERS += [torch.tensor(x) for x in (math.nan, True, [0.5], 1 + 1j)]
NUMBERS += [
    torch.tensor(1, dtype=torch.uint16),
    torch.tensor(0.5, requires_grad=True),
    memoryview(b"a"),
    float,
    math.sqrt,
]
FLAGS = [False, True, np.bool_(True)]
NAMES = [
    "",
    "x",
    " ",
    "MEAN",
    "mean ",
    Named("mean"),
    np.str_("mean"),
    "\ud800",
    "a\nb",
    "\0",
    "x" * 10**5,
    ("mean",),
    "no:where",
]
NUMBERS += [Willing(-1), Willing(10**9)]
NAMES += [Agreeing("x"), np.array("mean"), "no:where", ["mean"], {"mean"}, True, float, ..., NotImplemented]
OTHERS = [
    [],
    (),
    {},
    0,
    object(),
    [[]],
    b"",
    b"a",
    range(3),
    slice(3),
    [None],
    [math.nan],
    ["\ud800"],
    Nine(["a"]),
    Nine([1]),
]


def odd(kind: str, value: Any) -> Iterator[tuple[str, Any]]:
    yield from mild(kind, value)
    if isinstance(value, Tensor):
        yield from _of_dtypes(value)
        yield from _of_shapes(value)
        yield from _of_values(value, infinite=True)
        return
    if any(x in kind for x in ("bool", "float", "int")) and not kind.startswith("Callable"):
        yield from ((shown(x), x) for x in NUMBERS)
    if "str" in kind:
        yield from ((shown(x), x) for x in NAMES)
    yield from ((shown(x), x) for x in OTHERS)


def mild(kind: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What most functions take: other layouts and finite values, numbers of all kinds."""
    if isinstance(value, Tensor):
        yield from _of_layouts(value)
        yield from _of_values(value, infinite=False)
    elif kind.startswith("bool"):
        yield from ((shown(x), x) for x in FLAGS)
    elif any(x in kind for x in ("float", "int")) and not kind.startswith("Callable"):
        yield from ((shown(x), x) for x in SMALL)


def _of_dtypes(x: Tensor) -> Iterator[tuple[str, Any]]:
    for dtype in DTYPES:
        try:
            yield str(dtype), x.to(dtype)
        except (RuntimeError, NotImplementedError):
            try:
                yield str(dtype), torch.empty(x.shape, dtype=dtype)
            except (RuntimeError, NotImplementedError):  # this one has no tensors
                continue
    yield "numpy's", x.numpy()
    yield "a list", x.tolist()


def _of_shapes(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from (("empty", x[:0]), ("one short", x[:-1]), ("twice", torch.cat((x, x))), ("one", x[:1]))
    yield from (("in front", x[None]), ("behind", x[..., None]), ("flat", x.flatten()), ("0-d", x.flatten()[0]))
    if x.ndim == 2:
        yield from (("turned", x.T), ("no columns", x[:, :0]), ("one column", x[:, :1]))
    with torch.inference_mode():
        yield "of inference", x.clone()


def _of_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "strided", torch.stack((x, x), -1)[..., 0]
    yield "offset", torch.cat((x[:1], x))[1:]
    yield "expanded", x[:1].expand(x.shape)
    yield "a subclass", x.as_subclass(Wrapped)
    if x.ndim == 2:
        yield "by columns", x.T.contiguous().T
    if x.is_floating_point():
        yield "a parameter", torch.nn.Parameter(x.clone())
        yield "of a graph", x.clone().requires_grad_() * 1
        yield "a negative view", torch.view_as_complex(torch.stack((x, -x), -1)).conj().imag


def _of_values(x: Tensor, *, infinite: bool) -> Iterator[tuple[str, Tensor]]:
    if x.is_floating_point():
        limits = torch.finfo(x.dtype)
        given = [math.nan, math.inf, -math.inf] if infinite else [0.0, -0.0, limits.max, limits.min, limits.tiny / 4]
    elif x.dtype == torch.bool:
        given = [] if infinite else [False, True]
    else:
        given = [-1, -100, 2**31 - 1, 2**31, 2**62, 2**63 - 1, -(2**63)] if infinite else [0, 4, 5]
        given = [v for v in given if v in range(torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max + 1)]
    for v in given:
        yield f"all {v}", torch.full_like(x, v)
        for at in (0, -1):
            changed = x.clone()
            changed.view(-1)[at] = v
            yield f"{v} at {at}", changed
