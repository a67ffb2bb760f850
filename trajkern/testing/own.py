"""A function that is not trajkern's, called as the op that it is like."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern import reference
from trajkern._checks import check_callable
from trajkern.testing.registry import Case, Inputs, OpSpec

Function = Callable[..., Any]


def taken(function: Function) -> set[str] | None:
    """The names of the arguments that it takes by keyword; None where it takes any, or does not tell."""
    try:
        parameters = _signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _signature(function: Function) -> inspect.Signature:
    """Of a module that of its ``forward``: every module can be called with anything."""
    return inspect.signature(function.forward if isinstance(function, torch.nn.Module) else function)


def check_arguments(spec: OpSpec, function: Function) -> None:
    """Refuse what cannot be called as the op at all."""
    check_callable("function", function, "a function of the op's arguments")
    names, parameters = taken(function), inspect.signature(getattr(tk, spec.name)).parameters
    if names is None:
        return
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if missing := [name for name in needed if name not in names]:
        raise TypeError(
            f"function must take the arguments of {spec.name} by name, {', '.join(needed)}; it does not take "
            f"{', '.join(missing)} but {', '.join(sorted(names)) or 'nothing'}"
        )
    own = _signature(function).parameters.values()
    given = parameters.keys() | {name for case in spec.cases[:1] for name in case.make(torch.Generator())}
    if strange := [p.name for p in own if p.default is p.empty and p.name in names - given]:
        raise TypeError(f"function needs {', '.join(strange)}, which {spec.name} does not give: bind it, or default it")


def untaken(spec: OpSpec, function: Function, inputs: Inputs) -> list[str]:
    """The options among ``inputs`` that it does not take and that are not at the op's defaults."""
    names = taken(function)
    if names is None:
        return []
    defaults = inspect.signature(getattr(tk, spec.name)).parameters
    return [k for k, x in inputs.items() if k not in names and not (k in defaults and _equal(x, defaults[k].default))]


def _equal(x: Any, default: Any) -> bool:
    return x is default or (not isinstance(x, Tensor) and type(x) is type(default) and bool(x == default))


def called(spec: OpSpec, function: Function) -> Function:
    """It with the op's arguments: an option at its default is left out where it does not take it, others raise."""
    names = taken(function)
    if names is None:
        return function

    def call(**inputs: Any) -> Any:
        if strange := untaken(spec, function, inputs):
            raise TypeError(f"does not take {', '.join(strange)} (ignore_options=True skips such cases)")
        return function(**{k: x for k, x in inputs.items() if k in names})

    return call


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
}


def put_back(function: Function) -> Function:
    """It as one that raises where it leaves torch's settings at others, by which the oracle would compute, too."""

    def call(**inputs: Any) -> Any:
        before = {name: read() for name, (read, _) in _SETTINGS.items()}
        try:
            return function(**inputs)
        finally:
            found = {name: now for name, (read, _) in _SETTINGS.items() if (now := read()) != before[name]}
            for name in found:
                _SETTINGS[name][1](before[name])
            if found:
                name, now = next(iter(found.items()))
                raise ValueError(f"must leave {name} at {before[name]}, and left it at {now}")

    return call


def kept(inputs: Inputs) -> Inputs:
    """The arguments with copies of the tensors."""
    return {k: x.detach().clone() if isinstance(x, Tensor) else x for k, x in inputs.items()}


def written(before: Inputs, inputs: Inputs) -> list[str]:
    """The tensors among ``inputs`` that are no longer what they were."""
    tensors = {k: (before[k], x.detach()) for k, x in inputs.items() if isinstance(x, Tensor)}
    return [k for k, pair in tensors.items() if not _same(*pair)]


def _same(x: Tensor, y: Tensor) -> bool:
    """A NaN is the same as a NaN, and as nothing else."""
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def outputs_of(spec: OpSpec, result: Any) -> dict[str, Tensor]:
    """Its outputs by name: those of the op's own kind of result, or of a dict of some of them."""
    if isinstance(result, dict):
        return result
    try:
        outputs = spec.outputs(result)
    except Exception:  # whatever reading another kind of result raises
        outputs = {}
    if not outputs or not all(isinstance(x, Tensor) for x in outputs.values()):
        raise TypeError(
            f"returned {type(result).__name__}: return what {spec.name} returns, or a dict of those of its outputs "
            "that it computes"
        )
    return outputs


def held(spec: OpSpec, function: Function, backward: bool) -> OpSpec:
    """The op as this function is held against it: without what it leaves out of a dict, and without gradients if so."""
    names = _names(spec, function)

    def outputs(result: Any) -> dict[str, Tensor]:
        found = outputs_of(spec, result)
        return found if names is None else {name: found[name] for name in names if name in found}

    return replace(spec, outputs=outputs, differentiable=spec.differentiable if backward else ())


def _names(spec: OpSpec, function: Function) -> list[str] | None:
    """The outputs that it gives as a dict; None where it gives none. Refuses names that the op does not have."""
    inputs = spec.inputs(spec.cases[0], torch.float32)
    try:
        result = put_back(called(spec, function))(**inputs)
    except Exception:  # is found again, and told, in the cases
        return None
    if not isinstance(result, dict):
        return None
    known = spec.outputs(getattr(reference, spec.name)(**inputs))
    if not result or not result.keys() <= known.keys():
        got = ", ".join(map(str, result)) or "none"
        raise TypeError(f"function must return outputs of {spec.name}, {', '.join(known)}; got {got}")
    return [name for name in known if name in result]


def sorted_out(spec: OpSpec, function: Function, cases: Iterable[Case]) -> tuple[list[Case], dict[str, list[str]]]:
    """(the cases whose options it takes, option that it does not take -> the cases that give it)."""
    fitting: list[Case] = []
    skipped: dict[str, list[str]] = {}
    for case in cases:
        options = untaken(spec, function, case.make(torch.Generator().manual_seed(0)))
        for option in options:
            skipped.setdefault(option, []).append(case.name)
        if not options:
            fitting.append(case)
    return fitting, skipped


def name_of(function: Function) -> tuple[str, tuple[str, ...]]:
    """(what code calls it, the imports before that): for a lambda or a local function a name to be given to it."""
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", None)
    if not name.isidentifier():
        short = getattr(function, "__name__", "")
        short = short if short.isidentifier() and not short.startswith("__") else "f"
        return short, (f"# {short}: your function",)
    if module in (None, "__main__", "builtins"):
        return name, ()
    return name, (f"from {module} import {name}",)
