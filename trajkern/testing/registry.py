"""What an op spec is. Tests, validation and benchmarks iterate over the same specs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trajkern import reference
from trajkern._checks import check_callable, check_choice, check_count, check_device, check_instance, describe
from trajkern._dtypes import FLOATS

Inputs = dict[str, Any]
MOST_SEED = 2**63 - 1  # that a generator takes


@dataclass(frozen=True)
class Case:
    """One set of arguments of an op, and why it is worth running."""

    name: str
    make: Callable[[torch.Generator], Inputs]  # keyword arguments; floats in float64
    reason: str
    large: bool = False  # too slow for an interpreted kernel
    mixed: bool = False  # needs another family's ops, which a backend chosen for all may not have


@dataclass(frozen=True)
class Variant:
    """A way to lay out the same work differently that must give the same bits.

    ``apply`` maps the arguments to other arguments; ``undo`` maps each of the outcome's tensors back.
    """

    name: str
    apply: Callable[[Inputs, torch.Generator], tuple[Inputs, Callable[[str, Tensor], Tensor]]]


@dataclass(frozen=True)
class OpSpec:
    """A public op: how to call it, what comes out, on what it is tried."""

    name: str  # of the function in trajkern and in trajkern.reference
    family: str
    outputs: Callable[[Any], dict[str, Tensor]]  # names the tensors of a result
    differentiable: tuple[str, ...]  # arguments with a gradient
    typed: tuple[str, ...]  # float arguments that take the dtype under test
    dtypes: tuple[torch.dtype, ...]
    cases: tuple[Case, ...]
    triton_dtypes: tuple[torch.dtype, ...] = ()
    variants: tuple[Variant, ...] = ()
    term_scale: dict[str, float] = field(default_factory=dict)  # size of the terms of an output that is a sum
    no_grad_outputs: tuple[str, ...] = ()
    orders: tuple[Callable[[Inputs], Inputs], ...] = ()  # the same outputs, summed otherwise; taken twice each is none
    oracle_term: float = 8.0  # size of the terms that the float64 oracle sums, whose rounding is its own error
    own_sums: bool = True  # no sum is a BLAS library's, whose order may depend on the number of threads

    def case(self, name: str) -> Case:
        """The case of that name. Raises ValueError with the list of names where there is none."""
        name = check_choice("name", name, [case.name for case in self.cases])
        return next(case for case in self.cases if case.name == name)

    def inputs(self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """The case's arguments, its float tensors quantised to ``dtype``."""
        check_instance("case", case, Case)
        dtype = check_choice("dtype", dtype, FLOATS)
        check_device("device", device)
        seed = check_count("seed", seed, low=0, high=MOST_SEED)
        with torch.device("cpu"):  # whatever torch's default device is
            arguments = case.make(torch.Generator().manual_seed(seed))
        return {k: _typed(v, dtype if k in self.typed else None, device) for k, v in arguments.items()}


def check_parts(spec: Any, function: Any, inputs: Any) -> None:
    """An op's description, a function and arguments of both."""
    check_instance("spec", spec, OpSpec)
    if not callable(getattr(reference, spec.name, None)):
        raise ValueError(f"spec must have the name of an op, which the reference computes; got {spec.name!r}")
    check_callable("spec.outputs", spec.outputs, "a function of the op's result")
    check_callable("function", function, "a function of the op's arguments")
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping of {spec.name}'s arguments, got {describe(inputs)}")
    try:
        inspect.signature(getattr(reference, spec.name)).bind(**inputs)
    except TypeError as error:
        raise TypeError(f"inputs must be arguments of {spec.name}: {error}") from None


def _typed(x: Any, dtype: torch.dtype | None, device: str) -> Any:
    if isinstance(x, tuple):
        parts = (_typed(part, dtype, device) for part in x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if not isinstance(x, Tensor):
        return x.to(device) if hasattr(x, "to") else x  # a layout moves as a tensor does
    if not x.is_floating_point():
        return x.to(device)
    if dtype is None:
        dtype = torch.float32
    moved = torch.empty_strided(_extent(x), (1,), dtype=dtype, device=device)
    view = moved.as_strided(x.shape, x.stride())
    view.copy_(x)
    return view


def _extent(x: Tensor) -> tuple[int]:
    """Elements of storage that x's strides reach, so that a strided view keeps its strides."""
    if x.numel() == 0:
        return (0,)
    return (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)),)
