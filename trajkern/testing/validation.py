"""Holding an implementation against the registry: accuracy, repeatability, independence of the batch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

import trajkern as tk
from trajkern._backends import OWNERS
from trajkern._checks import check_choice, check_count, check_device, check_flag, check_sequence, renamed
from trajkern.testing.findings import Difference, Failure, Result, Results, compared
from trajkern.testing.numerics import Outcome, budget_shares, run
from trajkern.testing.own import (
    Function,
    called,
    check_arguments,
    held,
    kept,
    name_of,
    put_back,
    sorted_out,
    written,
)
from trajkern.testing.registry import MOST_SEED, Case, Inputs, OpSpec

FRESH = {0: 0, 1: 1, 2: 4, 3: 20}  # intensity -> draws of each small case besides the registry's own


def check(
    function: Function,
    *,
    like: str,
    cases: str | Sequence[str] | None = None,
    ignore_options: bool = False,
    backward: bool = True,
    dtypes: torch.dtype | Sequence[torch.dtype] | None = None,
    device: str = "cpu",
    intensity: int = 1,
    seed: int = 0,
) -> Results:
    """Hold ``function`` against the cases of the op that it is like.

    It is called with that op's keyword arguments, and returns what the op returns or a dict of those of its outputs
    that it computes, such as ``{"loss": loss}``. Each output and each gradient may be off from float64 by twice as much
    as ``trajkern.reference`` is at that precision, plus one rounding.

    Args:
        like: the name of an op, as in ``trajkern.token_logprobs``.
        cases: names of cases, or patterns of them such as ``"v*"``; by default all. ``spec_of(like).cases`` has them.
        ignore_options: skip the cases that give an option which ``function`` does not take, such as ``temperature``;
            ``result.skipped`` has them. Otherwise these cases fail.
        backward: hold its gradients against the reference, too.
        dtypes: of the inputs; by default all that the op takes.
        device: where the inputs are.
        intensity: 0 to 3; how many fresh draws of each case there are.
        seed: of these draws.

    Returns:
        One :class:`Result` a dtype. ``passed``, of each and of them all, is whether there was a case and every error is
        within its budget. They print in a few lines: the smallest failure, why its case is there, the worst number, and
        code that shows it again. Bits that differ between two runs or two packs are reported as ``repeatable`` and
        ``invariant``, and fail nothing.

    Raises:
        TypeError: ``function`` does not take the op's own arguments by name, or returns names that it does not have.
        ValueError: there is no such op, case, dtype, device or intensity.
    """
    intensity = check_choice("intensity", intensity, FRESH)
    seed = check_count("seed", seed, low=0, high=MOST_SEED)
    ignore_options, backward = check_flag("ignore_options", ignore_options), check_flag("backward", backward)
    check_device("device", device)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch {torch.__version__} has; got {device!r}, and it sees no GPU")
    with renamed({"name": "like"}):
        spec = spec_of(like)
    precisions = [dtypes] if isinstance(dtypes, torch.dtype) else spec.dtypes if dtypes is None else dtypes
    precisions = check_sequence("dtypes", precisions, "dtypes")
    for dtype in precisions:
        check_choice("dtypes", dtype, spec.dtypes)
    check_arguments(spec, function)
    chosen = _chosen(spec, cases)
    skipped: dict[str, list[str]] = {}
    if ignore_options:
        chosen, skipped = sorted_out(spec, function, chosen)
    spec = replace(held(spec, function, backward), cases=tuple(chosen))
    call, imports = name_of(function)
    results = Results()
    for dtype in precisions:
        result = Result(like, "", device, _name(dtype), skipped=skipped, call=call, imports=imports, backward=backward)
        own = put_back(called(spec, function))
        for _ in examine(result, spec, own, dtype, intensity, range(seed, seed + 1)):
            pass
        results.append(result)
    return results


def _chosen(spec: OpSpec, cases: str | Sequence[str] | None) -> list[Case]:
    """The cases that a name or a pattern fits, each of which fits one."""
    patterns = [cases] if isinstance(cases, str) else ["*"] if cases is None else cases
    patterns = check_sequence("cases", patterns, "names")
    if not patterns:
        raise ValueError("cases must name at least one, got none")
    for pattern in patterns:
        if not isinstance(pattern, str) or not any(fnmatchcase(case.name, pattern) for case in spec.cases):
            check_choice("cases", pattern, [case.name for case in spec.cases])
    return [case for case in spec.cases if any(fnmatchcase(case.name, pattern) for pattern in patterns)]


def spec_of(name: str) -> OpSpec:
    """The op called ``name``. Raises ValueError with the list of names where there is none."""
    from trajkern.testing import SPECS

    name = check_choice("name", name, [spec.name for spec in SPECS])
    return next(spec for spec in SPECS if spec.name == name)


def plan_compiled(ops: Iterable[str], dtypes: Iterable[torch.dtype]) -> list[tuple[OpSpec, Result]]:
    """A result to fill for every op and precision of a GPU kernel, on CPU tensors: see trajkern.testing.compiled."""
    dtypes, planned = list(dtypes), []
    for spec in map(spec_of, ops):
        precisions = [d for d in spec.triton_dtypes or spec.dtypes if d in dtypes]
        planned += [(spec, _result(spec, OWNERS[spec.family]["cuda"], "cpu", d)) for d in precisions]
    return planned


def plan(ops: Iterable[str], devices: Iterable[str], dtypes: Iterable[torch.dtype]) -> list[tuple[OpSpec, Result]]:
    """A result to fill for every op, backend and precision that this machine can run."""
    dtypes, planned = list(dtypes), []
    for spec in map(spec_of, ops):
        for device in devices:
            for backend in _backends_of(spec, device):
                precisions = spec.triton_dtypes if backend == "triton" else spec.dtypes
                planned += [(spec, _result(spec, backend, device, d)) for d in precisions if d in dtypes]
    return planned


def _result(spec: OpSpec, backend: str, device: str, dtype: torch.dtype) -> Result:
    """To be filled with what trajkern's own op does, whose bits are a promise."""
    imports, within = ("import trajkern as tk",), f'tk.use_backend("{backend}")'
    return Result(
        spec.name, backend, device, _name(dtype), call=f"tk.{spec.name}", imports=imports, within=within, bits=True
    )


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
) -> Iterator[None]:
    """Fill ``result``; with its ``bits``, results that differ from run to run or with the batch are failures, too."""
    for case, draw in cases_of(spec, result, intensity, seeds):
        inputs = spec.inputs(case, dtype, result.device, draw)
        failure = _failure(result, spec, function, inputs, case, draw)
        if failure is not None:
            result.failures.append(failure)
        result.cases += 1
        yield


def _failure(result: Result, spec: OpSpec, function: Function, inputs: Inputs, case: Case, draw: int) -> Failure | None:
    """Run the case, and fill in what it adds to ``result``."""
    size, bits, first, given = _size(inputs), "", None, inputs
    if not result.bits:
        inputs = kept(inputs)  # what a function may have written into is no input of the reference
    try:
        began = time.perf_counter()
        first = run(spec, function, given)
        _wait(result.device)
        if (spoilt := written(inputs, given)) and not given.get("inplace_backward"):
            raise ValueError(f"writes into its argument {', '.join(spoilt)}")
        result.seconds += time.perf_counter() - began
        shares = budget_shares(spec, first, inputs)
        name = max(shares, key=shares.__getitem__)
        if not shares[name] <= result.worst:
            result.worst, result.worst_case = shares[name], f"{case.name}: {name}"
        over = {name: share for name, share in shares.items() if not share <= 1}
        why = ", ".join(f"{name} is off by {share:.3g} times its budget" for name, share in over.items())
        again = differing(first, run(spec, function, given))
        packed = dependent(spec, function, given) if draw == 0 else ""
        result.repeatable &= not again
        result.invariant &= not packed
        if result.bits:
            bits = ", ".join([f"{again} differs from run to run"] * bool(again) + [packed] * bool(packed))
            why = ", ".join(part for part in (why, bits) if part)
    except Exception as error:
        why, result.worst = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300], math.inf
        first = None
    if not why:
        return None
    smallest = size < min((failure.size for failure in result.failures), default=math.inf)
    worst = _compared(spec, first, inputs) if first is not None and smallest else {}
    return Failure(case.name, draw, size, why, case.reason, bits, worst)


def _compared(spec: OpSpec, actual: Outcome, inputs: Inputs) -> dict[str, Difference]:
    """Nothing where the result has other tensors than the reference's, which has been said."""
    try:
        return compared(spec, actual, inputs)
    except AssertionError:
        return {}


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
