"""Holding an implementation against the registry: accuracy, repeatability, independence of the batch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._backends import OWNERS
from trajkern._checks import check_choice
from trajkern.testing.numerics import Outcome, budget_shares, run
from trajkern.testing.registry import Case, Inputs, OpSpec

Function = Callable[..., Any]
FRESH = {0: 0, 1: 1, 2: 4, 3: 20}  # intensity -> draws of each small case besides the registry's own


@dataclass(frozen=True)
class Failure:
    """A case that an implementation fails, and how many numbers it takes."""

    case: str
    seed: int
    size: int
    why: str


@dataclass
class Result:
    """What was found of one op on one backend at one precision."""

    op: str
    backend: str  # "" for a function that is not trajkern's
    device: str
    dtype: str
    cases: int = 0
    worst: float = 0.0  # error as a share of its budget: at most 1 passes
    worst_case: str = ""
    repeatable: bool = True  # the same bits twice
    invariant: bool = True  # the same bits in another order or pack
    seconds: float = 0.0  # in the function, forward and backward
    failures: list[Failure] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def smallest(self) -> Failure:
        """The failure of the fewest numbers."""
        return min(self.failures, key=lambda failure: failure.size)


def check(
    function: Function,
    *,
    like: str,
    dtypes: Sequence[torch.dtype] | None = None,
    device: str = "cpu",
    intensity: int = 1,
    seed: int = 0,
) -> list[Result]:
    """Hold ``function`` against the cases of the op that it is like.

    It is called with that op's keyword arguments and must return what the op returns.

    Args:
        like: the name of an op, as in ``trajkern.token_logprobs``.
        dtypes: of the inputs; by default all that the op takes.
        device: where the inputs are.
        intensity: 0 to 3; how many fresh draws of each case there are.
        seed: of these draws.

    Returns:
        One :class:`Result` a dtype; all of ``result.passed`` where every error is within its budget. Bits that differ
        between two runs or two packs are reported as ``repeatable`` and ``invariant``, and fail nothing.
    """
    check_choice("intensity", intensity, FRESH)
    spec = spec_of(like)
    results = []
    for dtype in spec.dtypes if dtypes is None else dtypes:
        result = Result(like, "", device, _name(dtype))
        for _ in examine(result, spec, function, dtype, intensity, range(seed, seed + 1), bits=False):
            pass
        results.append(result)
    return results


def spec_of(name: str) -> OpSpec:
    """The op called ``name``. Raises ValueError with the list of names where there is none."""
    from trajkern.testing import SPECS

    check_choice("op", name, [spec.name for spec in SPECS])
    return next(spec for spec in SPECS if spec.name == name)


def plan_compiled(ops: Iterable[str], dtypes: Iterable[torch.dtype]) -> list[tuple[OpSpec, Result]]:
    """A result to fill for every op and precision of a GPU kernel, on CPU tensors: see trajkern.testing.compiled."""
    dtypes, planned = list(dtypes), []
    for spec in map(spec_of, ops):
        precisions = [d for d in spec.triton_dtypes or spec.dtypes if d in dtypes]
        planned += [(spec, Result(spec.name, OWNERS[spec.family]["cuda"], "cpu", _name(d))) for d in precisions]
    return planned


def plan(ops: Iterable[str], devices: Iterable[str], dtypes: Iterable[torch.dtype]) -> list[tuple[OpSpec, Result]]:
    """A result to fill for every op, backend and precision that this machine can run."""
    dtypes, planned = list(dtypes), []
    for spec in map(spec_of, ops):
        for device in devices:
            for backend in _backends_of(spec, device):
                precisions = spec.triton_dtypes if backend == "triton" else spec.dtypes
                planned += [(spec, Result(spec.name, backend, device, _name(d))) for d in precisions if d in dtypes]
    return planned


def _backends_of(spec: OpSpec, device: str) -> list[str]:
    """The owner on the device, and Triton's kernels on a CPU where this process interprets them."""
    owner, available = OWNERS[spec.family][device], tk.backends()
    backends = [owner if available[owner] == "available" else "reference"]
    if device == "cpu" and available["triton"] == "available" and not torch.cuda.is_available() and spec.triton_dtypes:
        backends.append("triton")
    return backends


def validate(result: Result, spec: OpSpec, intensity: int, seeds: range) -> Iterator[None]:
    """Fill ``result`` with what the op does on its backend; yields after every case."""
    dtype, owner = getattr(torch, result.dtype), OWNERS[spec.family].get(result.device)
    chosen = contextlib.nullcontext() if result.backend == owner else tk.use_backend(result.backend)
    with chosen:
        yield from examine(result, spec, getattr(tk, spec.name), dtype, intensity, seeds)


def cases_of(spec: OpSpec, result: Result, intensity: int, seeds: range) -> list[tuple[Case, int]]:
    """(case, draw) pairs: the registry's own draw, then fresh ones of the small cases, which seeds in a row share."""
    slow = result.device == "cpu" and result.backend in ("triton", "cuda")  # a GPU's kernels, on a CPU
    cases = [c for c in spec.cases if not (slow or result.backend == "triton") or not (c.mixed or c.large)]
    draws = range(seeds.start + 1, seeds.stop + FRESH[intensity]) if FRESH[intensity] else ()
    fresh = [(c, draw) for draw in draws for c in cases if not c.large]
    return [(c, 0) for c in cases] + fresh


def examine(
    result: Result,
    spec: OpSpec,
    function: Function,
    dtype: torch.dtype,
    intensity: int,
    seeds: range,
    bits: bool = True,
) -> Iterator[None]:
    """Fill ``result``; with ``bits``, results that differ from run to run or with the batch are failures, too."""
    for case, draw in cases_of(spec, result, intensity, seeds):
        inputs, why = spec.inputs(case, dtype, result.device, draw), ""
        try:
            began = time.perf_counter()
            first = run(spec, function, inputs)
            _wait(result.device)
            result.seconds += time.perf_counter() - began
            shares = budget_shares(spec, first, inputs)
            name = max(shares, key=shares.__getitem__)
            if not shares[name] <= result.worst:
                result.worst, result.worst_case = shares[name], f"{case.name}: {name}"
            over = {name: share for name, share in shares.items() if not share <= 1}
            why = ", ".join(f"{name} is off by {share:.3g} times its budget" for name, share in over.items())
            again = differing(first, run(spec, function, inputs))
            packed = dependent(spec, function, inputs) if draw == 0 else ""
            result.repeatable &= not again
            result.invariant &= not packed
            if bits and (again or packed):
                differences = [f"{again} differs from run to run"] * bool(again) + [packed] * bool(packed)
                why = ", ".join([why] * bool(why) + differences)
        except Exception as error:
            why, result.worst = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], math.inf
        if why:
            result.failures.append(Failure(case.name, draw, _size(inputs), why))
        result.cases += 1
        yield


def differing(left: Outcome, right: Outcome) -> str:
    """The first of the outputs whose bits are not the same, or ""."""
    return next((name for name, x in left.items() if not _same_bits(x, right[name])), "")


def dependent(spec: OpSpec, function: Function, inputs: Inputs) -> str:
    """What depends on how the same work is laid out, or ""."""
    if not any(isinstance(x, Tensor) and x.numel() for x in inputs.values()):
        return ""
    for variant in spec.variants:
        other, undo = variant.apply(inputs, torch.Generator().manual_seed(3))
        here, there = _for_ones(spec, function, inputs), _for_ones(spec, function, _like(other, inputs))
        for name, x in there.items():
            expected, got = here[name], undo(name, x)
            if got.shape != expected.shape:  # the variant keeps a part of the batch
                expected = undo(name, expected)
            if not _same_bits(got, expected):
                return f"{name} depends on what else is in the batch ({variant.name})"
    return ""


def _for_ones(spec: OpSpec, function: Function, inputs: Inputs) -> Outcome:
    """Outputs but scalars, and gradients for an upstream of ones, which permutes into itself."""
    leaves = {
        k: x.detach().requires_grad_() for k, x in inputs.items() if k in spec.differentiable and isinstance(x, Tensor)
    }
    outputs = spec.outputs(function(**inputs | leaves))
    outcome = {name: x.detach() for name, x in outputs.items() if x.ndim}
    total = sum(x.sum() for name, x in outputs.items() if x.requires_grad and name not in spec.no_grad_outputs)
    if isinstance(total, Tensor):
        total.backward()
        outcome |= {f"grad_{k}": x.grad for k, x in leaves.items() if x.grad is not None}
    return outcome


def _like(other: Inputs, inputs: Inputs) -> Inputs:
    device = next(x.device for x in inputs.values() if isinstance(x, Tensor))
    return {k: x.to(device) if isinstance(x, Tensor) else x for k, x in other.items()}


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.nan_to_num(123.0), right.nan_to_num(123.0))


def _size(inputs: Inputs) -> int:
    return sum(x.numel() for x in inputs.values() if isinstance(x, Tensor))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
