"""One case of the fuzz: what is wrong with it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from tests.fuzz import heads, layouts, logits, losses, packs
from tests.fuzz.problem import Options, Target, Undecided
from tests.poison import poisoned
from trajkern.testing.numerics import budget_shares, run
from trajkern.testing.pairs import held
from trajkern.testing.registry import OpSpec
from trajkern.testing.validation import dependent, differing

TARGETS: dict[str, Target] = {
    **logits.TARGETS,
    **packs.TARGETS,
    **layouts.TARGETS,
    **losses.TARGETS,
    **heads.TARGETS,
}
ON_THREADS = 4000  # numbers, from which an op may share its work out


class Examined(NamedTuple):
    """All that is to hold of a case, and what does not; and the share of its budget that its worst error takes."""

    found: dict[str, str]
    share: float


def complete(target: str, options: Options) -> Options:
    """The options by name, those left out at their plainest values."""
    factors = TARGETS[target].factors
    for name, value in options.items():
        if value not in factors.get(name, ()):
            raise ValueError(f"{target} must have options {', '.join(factors)}; got {name}={value!r}")
    return {name: options.get(name, values[0]) for name, values in factors.items()}


def snippet(target: str, options: Options, seed: int) -> str:
    """What shows a case again; only options that are not the plainest are named."""
    factors = TARGETS[target].factors
    named = [f"{name}={value!r}" for name, value in options.items() if value != factors[name][0]]
    arguments = ", ".join([repr(target), f"seed={seed}", *named])
    return f"from tests.fuzz.examine import faults\nprint(faults({arguments}))"


def is_refused(target: str, options: Options) -> bool:
    return bool(held(options) & set(TARGETS[target].refused))


def faults(target: str, seed: int = 0, **options: Any) -> dict[str, str]:
    """What is wrong with one case, by what was to hold; its options are at their plainest but for those given.

    Raises:
        Undecided: a tie that the precision decides.
    """
    return {held: fault for held, fault in examined(target, complete(target, options), seed).found.items() if fault}


def examined(target: str, options: Options, seed: int) -> Examined:
    of = TARGETS[target]
    spec, inputs, fixed, luck = of.make(options, seed)

    def function(**arguments: Any) -> Any:
        return getattr(tk, spec.name)(**arguments | fixed)

    with poisoned():
        first = run(spec, function, inputs)
        shares = budget_shares(spec, first, inputs)
        worst = max(shares, key=lambda name: -math.inf if shares[name] <= luck else shares[name])
        off = "" if shares[worst] <= luck else f"{worst} is off by {shares[worst]:.3g} times its budget"
        found = {"against the reference": off, "twice": differing(first, run(spec, function, inputs))}
        if spec.variants:
            found["repacked"] = dependent(spec, function, inputs)
        if of.variants and inputs.get("batch_invariant", True):
            found["alone against in a batch"] = dependent(_of_rows(spec, of), function, inputs)
        if spec.own_sums and _size(inputs) >= ON_THREADS:
            with _threads(2):
                found["1 thread against 2"] = differing(first, run(spec, function, inputs))
    return Examined(found, max(shares.values(), default=0.0))


def _of_rows(spec: OpSpec, of: Target) -> OpSpec:
    """Without the gradients that are sums over the batch."""
    own = tuple(name for name in spec.differentiable if name not in ("weight", "bias"))
    return dataclasses.replace(spec, variants=of.variants, differentiable=own)


def _size(inputs: dict[str, Any]) -> int:
    return sum(x.numel() for x in inputs.values() if isinstance(x, Tensor))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["TARGETS", "Undecided", "complete", "examined", "faults", "is_refused"]
