"""Running an op with its gradients, and the error budget that its result must keep.

A result may differ from float64 by at most twice the worst error of the plain torch expression at its precision, plus
one rounding. Inputs are quantised first, so that only arithmetic is measured. A float64 result has no better oracle
than float64: its budget is float32's scaled by the ratio of the two roundings, plus the oracle's own error.

The expression's worst error is one draw of its rounding where a single number stands out. So it is taken in several
orders of the sums, and, where a result is still beyond twice of it, on neighbouring inputs: see :func:`budget_shares`.

Where inputs are in float16 the upstream gradient is as large as a loss scaler makes it: :func:`loss_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trajkern import reference
from trajkern._checks import (
    check_count,
    check_instance,
    check_number,
    check_shape,
    check_tensor,
    check_valued,
    describe,
)
from trajkern._dtypes import FLOATS, INTEGERS
from trajkern.testing.registry import MOST_SEED, Inputs, OpSpec, check_parts

Outcome = dict[str, Tensor]
LARGEST_LOSS_SCALE = 2.0**16  # that torch's GradScaler begins with
ROOM = 4.0  # between the largest gradient and float16's largest number
NEIGHBOURS = 16  # of the inputs, at most, on which the reference's rounding is drawn again
FLOAT64_STEP = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps  # in float32's roundings
BEYOND_LUCK = 8.0  # a share of the budget that no further draw brings to 1


def run(
    spec: OpSpec, function: Callable[..., Any], inputs: Inputs, upstream_seed: int = 1, scale: float | None = None
) -> Outcome:
    """Outputs and gradients of ``function`` for a fixed random upstream times ``scale``, detached.

    Without one it is what ``loss_scale`` says.
    """
    check_parts(spec, function, inputs)
    upstream_seed = check_count("upstream_seed", upstream_seed, low=0, high=MOST_SEED)
    scale = loss_scale(spec, inputs, upstream_seed) if scale is None else check_number("scale", scale)
    inputs = {k: _leaf(v) if k in spec.differentiable and v is not None else v for k, v in inputs.items()}
    outputs = spec.outputs(function(**inputs))
    if not isinstance(outputs, dict) or not all(isinstance(x, Tensor) for x in outputs.values()):
        raise TypeError(f"spec.outputs must name the tensors of a result in a dict, got {describe(outputs)}")
    outcome = {k: v.detach() for k, v in outputs.items()}
    generator, loss = torch.Generator().manual_seed(upstream_seed), None
    for name, x in outputs.items():
        upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x.device)
        if x.requires_grad and name not in spec.no_grad_outputs:
            term = (x * (scale * upstream).to(x.dtype)).sum()
            loss = term if loss is None else loss + term
    if loss is not None:
        loss.backward()
        for name in spec.differentiable:
            if isinstance(inputs.get(name), Tensor):
                grad = inputs[name].grad
                outcome[f"grad_{name}"] = torch.zeros_like(inputs[name]).detach() if grad is None else grad
    return outcome


def loss_scale(spec: OpSpec, inputs: Inputs, upstream_seed: int = 1) -> float:
    """1, and for float16 a power of two: the largest up to 2^16 at which no gradient overflows."""
    given = (inputs.get(name) for name in spec.typed)
    if not any(isinstance(x, Tensor) and x.dtype == torch.float16 for x in given):
        return 1.0
    exact = run(spec, getattr(reference, spec.name), cast(inputs, torch.float64), upstream_seed, 1.0)
    gradients = [x.abs().amax() for name, x in exact.items() if name.startswith("grad_") and x.numel()]
    largest = max((float(x) for x in gradients if x.isfinite()), default=0.0)
    if largest == 0:
        return LARGEST_LOSS_SCALE
    return min(LARGEST_LOSS_SCALE, 2.0 ** math.floor(math.log2(torch.finfo(torch.float16).max / ROOM / largest)))


def _leaf(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().requires_grad_()


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def oracle(spec: OpSpec, inputs: Inputs) -> tuple[Outcome, Outcome]:
    """(the reference in float64, the worst of its results at the inputs' precision, float32 for float64)."""
    check_parts(spec, run, inputs)
    scale = loss_scale(spec, inputs)
    high, result = _two_precisions(spec, inputs, scale)
    low = _lower(spec, inputs)
    for order in spec.orders:  # one order of a sum is one draw of its rounding; the worst of some is steadier
        turned = run(spec, getattr(reference, spec.name), order(low), scale=scale)
        for name, x in _turned_back(spec, order, low, turned).items():
            if x.is_floating_point() and x.shape == high[name].shape:
                if _worst_error(x, high[name]) > _worst_error(result[name], high[name]):
                    result[name] = x
    return high, result


def _two_precisions(spec: OpSpec, inputs: Inputs, scale: float) -> tuple[Outcome, Outcome]:
    function = getattr(reference, spec.name)
    high = run(spec, function, cast(inputs, torch.float64), scale=scale)
    return high, run(spec, function, _lower(spec, inputs), scale=scale)


def _lower(spec: OpSpec, inputs: Inputs) -> Inputs:
    """The inputs at a precision whose error float64 can measure."""
    return cast(inputs, torch.float32) if _in_float64(spec, inputs) else inputs


def _in_float64(spec: OpSpec, inputs: Inputs) -> bool:
    return any(isinstance(inputs.get(k), Tensor) and inputs[k].dtype == torch.float64 for k in spec.typed)


def _worst_error(low: Tensor, high: Tensor) -> Tensor:
    """Over the numbers that are finite in both."""
    low, high = low.double(), high.double()
    if high.numel() == 0:
        return high.new_zeros(())
    return torch.where(torch.isfinite(low) & torch.isfinite(high), (low - high).abs(), 0).max()


def neighbours(spec: OpSpec, inputs: Inputs) -> Iterator[Inputs]:
    """The inputs times numbers a little below 1: what is equal, 0, ordered or a bound of the other stays so."""
    for k in range(1, NEIGHBOURS + 1):
        yield inputs | {
            name: (inputs[name].double() * (1 - k / 512)).to(inputs[name].dtype)
            for name in spec.typed
            if isinstance(inputs.get(name), Tensor)
        }


def _turned_back(spec: OpSpec, order: Callable[[Inputs], Inputs], inputs: Inputs, outcome: Outcome) -> Outcome:
    """What inputs in this order gave, with the gradients as ``inputs`` lie."""
    names = [name for name in spec.differentiable if f"grad_{name}" in outcome]
    turned = order(inputs | {name: outcome[f"grad_{name}"] for name in names})
    return outcome | {f"grad_{name}": turned[name] for name in names}


def budget_share(spec: OpSpec, name: str, actual: Tensor, high: Tensor, low: Tensor) -> float:
    """The worst error as a share of its budget: at most 1 passes. NaN and infinity must stand in the same places."""
    check_instance("spec", spec, OpSpec)
    if not isinstance(name, str):
        raise TypeError(f"name must be that of an output, got {describe(name)}")
    for label, x in {"actual": actual, "high": high, "low": low}.items():
        check_tensor(label, x, dtypes=(torch.bool, *INTEGERS, *FLOATS))
        check_valued(label, x)
    check_shape("low", low, tuple(high.shape), "that of high")
    if actual.shape != high.shape or actual.is_floating_point() != high.is_floating_point():
        return math.inf
    return float(shares_of_numbers(spec, name, actual, high, low).max()) if actual.numel() else 0.0


def shares_of_numbers(spec: OpSpec, name: str, actual: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Each number's error as a share of its budget, infinity where NaN or infinity stand in one of the two alone."""
    if not actual.is_floating_point():
        return torch.where(actual == high.to(actual.dtype), 0.0, math.inf)
    epsilon = torch.finfo(actual.dtype).eps
    actual, low = actual.double(), low.double()
    special = ~torch.isfinite(high)
    same = (actual == high) | (actual.isnan() & high.isnan())
    apart = (special & ~same) | (actual.isnan() & ~high.isnan())
    actual, high, low = (torch.where(special, 0, x) for x in (actual, high, low))
    low_error = _worst_error(low, high)
    rounding = epsilon * high.abs().clamp_min(spec.term_scale.get(name, 0.0))
    rounding = rounding.clamp_min(torch.finfo(torch.float32).tiny)
    budget = 2 * low_error + rounding
    if epsilon == torch.finfo(torch.float64).eps:
        low_error = low_error * FLOAT64_STEP
        rounding = rounding.clamp_min(epsilon * spec.oracle_term)
        budget = 3 * low_error + 2 * rounding
    return torch.where(apart, math.inf, ((actual - high).abs() / budget).nan_to_num(math.inf, posinf=math.inf))


def errors(spec: OpSpec, function: Callable[..., Any], inputs: Inputs) -> dict[str, float]:
    """Share of the budget that ``function`` uses in every output and gradient."""
    return budget_shares(spec, run(spec, function, inputs), inputs)


def budget_shares(spec: OpSpec, actual: Outcome, inputs: Inputs) -> dict[str, float]:
    """Share of the budget that a result takes in every output and gradient.

    Where it is above 1, and not by far, the reference errs on neighbouring inputs as well, until one of its errors
    there makes the budget large enough: an error of a few roundings in the largest number of all is no fault because
    the reference happened to have none there.
    """
    high, low = oracle(spec, inputs)
    check_names(spec, actual, high)
    shares = {name: budget_share(spec, name, actual[name], high[name], low[name]) for name in high}
    draws = _error_draws(spec, inputs, high)
    while doubtful := [name for name, share in shares.items() if 1 < share <= BEYOND_LUCK]:
        drawn = next(draws, None)
        if drawn is None:
            break
        for name in drawn.keys() & doubtful:
            share = budget_share(spec, name, actual[name], high[name], high[name] + drawn[name])
            shares[name] = min(shares[name], share)
    return shares


def check_names(spec: OpSpec, actual: Outcome, high: Outcome) -> None:
    """Refuse a result that lacks a tensor, or has one of its own."""
    lacking = sorted(high.keys() - actual.keys())
    if lacking and all(name.startswith("grad_") for name in lacking):
        raise AssertionError(f"{spec.name} has no gradient of {', '.join(name[5:] for name in lacking)}")
    if actual.keys() != high.keys():
        raise AssertionError(f"{spec.name} returned {sorted(actual)}, the reference {sorted(high)}")


def _error_draws(spec: OpSpec, inputs: Inputs, high: Outcome) -> Iterator[Outcome]:
    """Errors of the reference on neighbouring inputs, and of the float64 oracle itself.

    These are seen where its gradients, which are linear in the upstream, change by more than the upstream did.
    """
    scale, function = loss_scale(spec, inputs), getattr(reference, spec.name)
    names = [name for name, x in high.items() if x.is_floating_point()]
    for k, near in enumerate(neighbours(spec, inputs), 1):
        there, erring = _two_precisions(spec, near, scale)
        yield {name: erring[name].double() - there[name] for name in names}
        if _in_float64(spec, inputs):
            factor = 1 - k / 512
            again = run(spec, function, cast(inputs, torch.float64), scale=scale * factor)
            gradients = [name for name in names if name.startswith("grad_")]
            yield {name: (again[name] / factor - high[name]) / FLOAT64_STEP for name in gradients}
