"""Tensors whose values lie elsewhere, as any one argument of an op: refused by name, never read at address 0."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import trajkern as tk
from trajkern.testing import SPECS, OpSpec


class Wrapper(Tensor):
    """Around a tensor, as torch's own for logging and masks are."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, x.shape, strides=x.stride(), dtype=x.dtype)  # type: ignore[return-value]

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is to be asked of it")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "Wrapper()"


def _left_over(x: Tensor) -> Tensor:
    """Of a vmap that has ended."""
    kept: list[Tensor] = []
    torch.vmap(lambda y: kept.append(y) or y)(torch.stack((x, x)))
    return kept[0]


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "wrapper": Wrapper,
    "functional": torch._to_functional_tensor,
    "left over": _left_over,
    "uninitialised": lambda x: torch.nn.UninitializedParameter(dtype=x.dtype, requires_grad=False),
}
CALLS = [
    (spec, name)
    for spec in SPECS
    for name, x in spec.inputs(spec.cases[0], spec.dtypes[0]).items()
    if isinstance(x, Tensor)
]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("op", "name"), CALLS, ids=lambda x: getattr(x, "name", x))
def test_refused(op: OpSpec, name: str, other: str) -> None:
    inputs = op.inputs(op.cases[0], op.dtypes[0])
    with pytest.raises((TypeError, ValueError)) as caught:
        getattr(tk, op.name)(**inputs | {name: OTHERS[other](inputs[name])})
    assert re.match(rf"{name} must (be a plain tensor|not be of a trace|have a shape)", str(caught.value))


@pytest.mark.parametrize(("op", "name"), CALLS, ids=lambda x: getattr(x, "name", x))
def test_one_that_has_a_shape_alone_gives_no_numbers(op: OpSpec, name: str) -> None:
    """But where it is not read."""
    inputs = op.inputs(op.cases[0], op.dtypes[0])
    wanted = op.outputs(getattr(tk, op.name)(**inputs))
    try:
        found = op.outputs(getattr(tk, op.name)(**inputs | {name: FakeTensorMode().from_tensor(inputs[name])}))
    except (AssertionError, RuntimeError, TypeError, ValueError):  # the first two are torch's
        return
    real = {key: x for key, x in found.items() if not isinstance(x, FakeTensor)}
    torch.testing.assert_close(real, {key: wanted[key] for key in real}, rtol=0, atol=0, equal_nan=True)
