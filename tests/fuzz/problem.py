"""What a case of the fuzz is: an op, the values of its options by name, and the numbers drawn for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern.testing.pairs import Pair
from trajkern.testing.registry import Case, Inputs, OpSpec, Variant

Options = dict[str, Any]  # a value's name, or the value itself, for each option
Factors = dict[str, tuple[Any, ...]]  # the values of each option, the plainest first


class Problem(NamedTuple):
    spec: OpSpec  # of the gradients that are asked for
    inputs: Inputs
    fixed: Options = {}  # more arguments of the op, which the reference does not take
    luck: float = 1.5  # share of the budget that passes in one case: of thousands torch's own error is small in some


@dataclass(frozen=True)
class Target:
    """An op under some of its options."""

    factors: Factors
    make: Callable[[Options, int], Problem]  # of all options and a seed
    refused: Iterable[Pair] = field(default=())
    variants: tuple[Variant, ...] = ()  # besides the registry's


class Undecided(Exception):
    """The numbers are so close to a tie that the precision decides it."""


LAID_OUT: Factors = {"layout": ("whole", "strided", "offset"), "integers": ("int64", "int32")}


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def of_case(spec: OpSpec, options: Options, seed: int, make: Callable[[torch.Generator], Inputs]) -> Inputs:
    """The arguments, in the dtype and the layout that the options say."""
    inputs = spec.inputs(Case("fuzz", make, "drawn"), getattr(torch, options["dtype"]), seed=seed)
    return {name: laid_out(x, options) for name, x in inputs.items()}


def laid_out(x: Any, options: Mapping[str, Any]) -> Any:
    """The same values elsewhere in memory: every second element of it, or behind an odd number of bytes' elements."""
    if not isinstance(x, Tensor) or x.ndim == 0:
        return x
    if x.dtype == torch.int64:
        x = x.to(getattr(torch, options.get("integers", "int64")))
    layout = options.get("layout", "whole")
    if layout == "strided":
        return torch.stack((x, x), -1)[..., 0]
    if layout == "offset":
        return torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape)
    return x


def terms_of(
    inputs: Inputs, values: Tensor, group: Tensor, counted: Tensor, of_variance: bool = False
) -> Any:  # [N] each
    """The size of what the gradient in each of the ``values``, divided by its group's standard deviation, is the
    difference of, ``[N]``: where it is 0, it is found to that size's rounding.

    A deviation of s about values as large as x makes terms of 1 / s, each known to x / s roundings, as the distances
    from the mean are; values that are equal have terms of 1 / eps. Where eps is ``of_variance``, s is sqrt(var + eps).
    """
    x, eps = values.detach().double(), inputs["eps"]
    terms = torch.full_like(x, max(8.0, 1 / eps if eps else 0.0))
    times = counted.long() if inputs.get("weights") is None else counted.long() * inputs["weights"].long()
    for number in group[counted].unique().tolist():
        members = (group == number) & counted
        every = x[members].repeat_interleave(times[members])
        if len(every) > 1:
            variance = float(every.var(correction=inputs["ddof"]))
            squared = variance + eps if of_variance else (variance**0.5 + eps) ** 2
            if squared > 0:
                terms[members] = max(8.0, float(every.abs().max()) / squared)
    return terms


def bounds(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def some(g: torch.Generator, shape: Any, name: str, share: float = 0.7) -> Tensor | None:
    """A mask by the name of what it leaves."""
    if name == "none":
        return None
    return torch.rand(shape, generator=g) < (share if name == "some" else 0.0)


def given(**arguments: Any) -> Inputs:
    return {name: x for name, x in arguments.items() if x is not None}
