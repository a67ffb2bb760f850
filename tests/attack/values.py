"""Hostile values: what must be refused for an argument of some kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

HUGE = 10**400
BOUNDS = ("cu_seqlens", "cu_beliefs")


def without_memory(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors like ``x`` of which the memory, or a part of it, is gone."""
    freed, shrunk, view = x.clone(), x.clone(), torch.cat((x, x))[x.shape[0] :]
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(shrunk.nbytes - 1)
    view.untyped_storage().resize_(2 * x.nbytes - 1)
    yield from (("freed", freed), ("shrunk", shrunk), ("a view of what was shrunk", view))
    yield "efficient zeros", torch._efficientzerotensor(x.shape, dtype=x.dtype)


def of_other_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "sparse", x.to_sparse()
    yield "nested", torch.nested.nested_tensor([x, x])
    yield "nested, one", torch.nested.nested_tensor([x])
    if x.is_floating_point():
        yield "jagged", torch.nested.nested_tensor([x, x], layout=torch.jagged)
        if x.dtype != torch.float64:  # which it has none of
            yield "mkldnn", x.to_mkldnn()
        yield "quantised", torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint8)
    if x.ndim == 2:
        yield "sparse rows", x.to_sparse_csr()
    yield "meta", torch.empty_like(x, device="meta")


def boundaries(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    for values in ([0, 2**40, 4], [0, 3, 9], [1, 2, 4], [0, 9, 4], [0, 2, 3], [0, -1, 4], [0, -(2**62), 4], [-1, 2, 4]):
        yield f"boundaries {values}", torch.tensor(values)
    yield "no boundary", x[:0]
    yield "int32 boundaries", torch.tensor([0, 9, 4], dtype=torch.int32)


FLAGS = ["no", "x", "", 0, 1, 0.5, None, [], [True], torch.tensor([True, False])]
NUMBERS = [HUGE, -HUGE, 10**5000, Fraction(HUGE), math.nan, math.inf, "1", [1.0], {}, None, True, 1j]
NUMBERS += [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor(1.0, device="meta"), np.array("x")]
CHOICES = [np.array([1, 2]), np.array(["mean", "std"]), [], {}, ["mean"], None, 0.5, b"mean", torch.ones(2), object()]
COUNTS = [HUGE, 10**5000, 2**62, -1, 1.5, "1", math.nan, None, True, torch.ones(2), np.array([1, 2])]
OBJECTS = [None, 3, "x", {}, (), torch.ones(2)]


def hostile(name: str, kind: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(label, value) of what must be refused for a parameter of the annotated kind that is given as ``value``."""
    if isinstance(value, Tensor):
        yield from without_memory(value)
        yield from of_other_layouts(value)
        yield from ((repr(x), x) for x in (3, "x", [1.0], object, np.ones(2)) if not _is_legal(name, kind, x))
        if name in BOUNDS:
            yield from boundaries(value)
        return
    given = OBJECTS
    if kind.startswith("bool"):
        given = FLAGS
    elif re.match(r"(float|Tensor \| float)", kind):
        given = NUMBERS
    elif kind.startswith("int"):
        given = COUNTS
    elif kind.startswith("str"):
        given = CHOICES
    elif kind.startswith("Mapping"):
        given = [None, 3, "x", (), [], torch.ones(2)]
    elif kind.startswith("device"):
        given = [None, 3.5, "x", {}, [], torch.ones(2)]
    elif kind.startswith(("Any", "Sequence", "torch.dtype", "tuple", "Tensor")):
        given = [x for x in OBJECTS if x not in ((), "x")] if kind.startswith("Sequence") else [3, "x", {}, []]
    for x in given:
        if not _is_legal(name, kind, x):
            yield shown(x), x


def shown(x: Any) -> str:
    """A value on a line of a table."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
    if isinstance(x, int) and abs(x) >= 2**63:
        return f"{x.bit_length()} bits"
    words = " ".join((type(x).__name__ if type(x) is object else repr(x)).split())
    return re.sub(r" at 0x[0-9a-f]+", "", words)[:40]  # the same in every process


LARGE = ("chunk_size", "seed", "upstream_seed", "workspace_bytes", "min_length", "max_length", "max_completion_length")
LARGE += ("max_steps", "dp_size", "top_k", "k", "general", "capacity", "failures", "growth", "lines", "lesson_length")
NEGATIVE = ("chunk_size", "seed")  # of which the first says nothing to us


def _is_legal(name: str, kind: str, x: Any) -> bool:
    if x is None:
        return "| None" in kind
    if name == "value":  # of padding, in a tensor of floats
        return isinstance(x, (bool, float)) or (isinstance(x, int) and abs(x) < 2**64)
    if name == "top_k" and isinstance(x, float) and x == 1.5:  # a bound of a mean
        return True
    if name == "beyond" and isinstance(x, float):
        return math.isnan(x)
    if name in ("index", "dtypes") and isinstance(x, list):
        return not x
    if not isinstance(x, int):
        return False
    return (x == 3 and "float" in kind) or (x == 2**62 and name in LARGE) or (x == -1 and name in NEGATIVE)
