"""What the hosts ask of a credit before there is a batch."""

from __future__ import annotations

from typing import Any

from trajkern.credit import Spec, load
from trajkern.credit.spec import Gated, Only, Sum
from trajkern.credit.terms import Directive, Outcome, Signs


def spec_of(name: str, value: Any) -> Spec:
    """An expression, or what its "package.module:name" says; an error names the host's argument ``name``."""
    spec = load(value) if isinstance(value, str) else value
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
