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
from trajkern import credit
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


TWO, FLAGS, BOUNDS = torch.tensor([0, 2]), torch.tensor([False, True]), torch.tensor([0, 2])
BATCH = tk.PackedBatch(TWO, BOUNDS, FLAGS, torch.tensor([0]), old_logprobs=-torch.ones(2))
FIELDS = {
    "tokens": TWO,
    "cu_seqlens": BOUNDS,
    "loss_mask": FLAGS,
    "group_ids": torch.tensor([0]),
    "rewards": torch.tensor([1.0]),
    "old_logprobs": -torch.ones(2),
}
READING: list[tuple[str, Tensor, Callable[[Tensor], Any]]] = [
    *((name, x, lambda y, name=name: tk.PackedBatch(**FIELDS | {name: y})) for name, x in FIELDS.items()),
    ("loss_mask", FLAGS, lambda x: tk.Spans.turns(x, BOUNDS)),
    ("cu_seqlens", BOUNDS, lambda x: tk.Spans.turns(FLAGS, x)),
    ("start", TWO, lambda x: tk.Spans(x, TWO + 1, TWO, TWO, 4)),
    ("end", TWO + 1, lambda x: tk.Spans(TWO, x, TWO, TWO, 4)),
    ("parent", torch.tensor([-1, 0]), lambda x: tk.Tree(x, TWO)),
    ("node_lengths", TWO, lambda x: tk.Tree(torch.tensor([-1, 0]), x)),
    ("rewards", torch.ones(1), lambda x: credit.Rollouts(BATCH, rewards={"reward": x})),
    ("flags", torch.ones(1).bool(), lambda x: credit.Rollouts(BATCH, flags={"right": x})),
    ("teacher_logprobs", -torch.ones(2), lambda x: credit.Rollouts(BATCH, teacher_logprobs=x)),
]


@pytest.mark.parametrize(("name", "x", "make"), READING, ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_read_is_not_of_a_transform(name: str, x: Tensor, make: Callable[[Tensor], Any]) -> None:
    def mapped(y: Tensor) -> Tensor:
        make(y)
        return y

    make(x)
    with pytest.raises(ValueError, match=rf"{name}.* must have values, which are read here; got .* of a transform"):
        torch.vmap(mapped)(torch.stack((x, x)))
