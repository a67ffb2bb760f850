"""What the hosts ask of a credit before there is a batch, and what they log of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trajkern.credit import Credit, Spec, load
from trajkern.credit.spec import Gated, Only, Sum
from trajkern.credit.terms import Directive, Outcome, Signs


def spec_of(name: str, value: Any) -> Spec:
    """An expression, or what its "package.module:name" says; an error names the host's argument ``name``."""
    try:
        spec = load(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not isinstance(spec, Spec):
        raise TypeError(f"{name} must be an expression of trajkern.credit or its 'package.module:name', got {value!r}")
    return spec


def may_leave_out(spec: Spec) -> bool:
    """Whether whole rollouts can leave the loss by what the expression says; NaN rewards apart."""
    match spec:
        case Sum():
            return all(map(may_leave_out, spec.parts))
        case Gated() | Only():
            return True
        case Signs():
            return spec.kind != "w_reinforce"
        case Directive():
            return spec.where == "failed"
        case Outcome():
            return isinstance(spec.reward, Spec) and may_leave_out(spec.reward)
    return any(map(may_leave_out, spec.inner))


def check_given(spec: Spec, host: str, not_given: Mapping[str, str]) -> None:
    """ValueError where a credit needs what a host never has; ``not_given``: a need, or its kind with a colon -> why."""
    for need in sorted(spec.needs):
        kind = need.partition(":")[0] + ":"
        if why := not_given.get(need, not_given.get(kind)):
            raise ValueError(f"credit must do without {need!r} in {host}: {why}; got {spec!r}")


def metrics_of(found: Credit) -> dict[str, float]:
    """A credit's metrics as numbers by the names under which hosts log them, with one read of the device."""
    values = torch.stack([x.double() for x in found.metrics.values()]).tolist()
    return {f"credit/{name}": x for name, x in zip(found.metrics, values, strict=True)}
