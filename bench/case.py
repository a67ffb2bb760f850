"""A case of the benchmark: an op on inputs of one size, its contenders, and the gate each must pass to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern import reference
from trajkern.testing import SPECS, budget_share
from trajkern.testing.numerics import Outcome, cast
from trajkern.testing.registry import Inputs

OPS = {spec.name: spec for spec in SPECS}
OURS, COMPILED, BARE = "trajkern", "torch.compile", "bare pass"
# A rival need only compute the same function: its error may be this many times what trajkern's may be.
RIVAL_BUDGET = 16.0

Function = Callable[..., Outcome]  # an op's keyword arguments -> those of its outputs that it computes


def with_compiled(form: Function) -> dict[str, Function]:
    """It, and compiled: what compiles is loaded by the first call, for many runs have none."""

    @cache
    def compiled() -> Function:
        return torch.compile(form, fullgraph=True, dynamic=False)

    return {"eager": form, COMPILED: lambda **inputs: compiled()(**inputs)}


def _whole(name: str, x: Tensor) -> Tensor:
    return x


@dataclass
class Problem:
    """An op's arguments, and who computes it on them."""

    op: str
    inputs: Inputs
    rivals: dict[str, Function]
    bare: Callable[[], Any]  # torch's own passes over the same data, which compute nothing: see bare.py
    bytes: int  # fewest that must move through memory: inputs read once, results written once
    grad: bool = False  # record the graph
    upstream: dict[str, Tensor] = field(default_factory=dict)  # gradients of outputs; run the backward with them
    pick: Callable[[str, Tensor], Tensor] = _whole  # the part of a tensor that the gate compares
    small: Inputs | None = None  # inputs of the gate where the reference could not hold the timed ones
    flops: int = 0  # of the matrix products that any implementation needs
    compose: Callable[[Function], Function] | None = None  # a function of linear_logprobs' arguments -> one of the op's
    peers: dict[str, Function] = field(default_factory=dict)

    @property
    def functions(self) -> dict[str, Function]:
        return {OURS: self._ours, **self.rivals, **self.peers}

    def step(self, name: str) -> Callable[[], Outcome]:
        """What is timed of a contender, on differentiable arguments of its own: an in-place backward destroys them."""
        function, inputs = self.functions[name], self._leaves(self.inputs)
        if not self.upstream:
            return partial(function, **inputs)
        return lambda: self._gradients(function(**inputs), inputs, self.upstream)

    def budget_shares(self, name: str) -> dict[str, float]:
        """Worst error of each output and gradient as a share of what is allowed; at most 1 passes."""
        outcome = self._outcome(self.functions[name], self.small or self.inputs, self.upstream)
        high, low = self._expected
        allowed = 1.0 if name == OURS else RIVAL_BUDGET
        return {
            k: budget_share(OPS[self.op], k, self.pick(k, x).cpu(), high[k], low[k]) / allowed
            for k, x in outcome.items()
        }

    @cached_property
    def _expected(self) -> tuple[Outcome, Outcome]:
        """The reference in float64 and at the inputs' precision, on the part that the gate compares."""

        def picked(xs: dict[str, Any]) -> dict[str, Any]:
            return {k: self.pick(k, x).cpu() if isinstance(x, Tensor) else x for k, x in xs.items()}

        def oracle(**inputs: Any) -> Outcome:
            return OPS[self.op].outputs(getattr(reference, self.op)(**inputs))

        inputs, upstream = picked(self.small or self.inputs), picked(self.upstream)
        return self._outcome(oracle, cast(inputs, torch.float64), upstream), self._outcome(oracle, inputs, upstream)

    def _ours(self, **inputs: Any) -> Outcome:
        return OPS[self.op].outputs(getattr(tk, self.op)(**inputs))

    def _outcome(self, function: Function, inputs: Inputs, upstream: dict[str, Tensor]) -> Outcome:
        inputs = self._leaves(inputs)
        outputs = function(**inputs)
        outcome = {k: x.detach() for k, x in outputs.items()}
        return outcome | self._gradients(outputs, inputs, upstream) if upstream else outcome

    def _leaves(self, inputs: Inputs) -> Inputs:
        if not self.grad:
            return inputs
        names = [k for k in OPS[self.op].differentiable if isinstance(inputs.get(k), Tensor)]
        leaves = {k: inputs[k].detach().clone().requires_grad_() for k in names}
        if inputs.get("inplace_backward"):  # a leaf may not be overwritten
            leaves = {k: x * 1 for k, x in leaves.items()}
        return inputs | leaves

    def _gradients(self, outputs: Outcome, inputs: Inputs, upstream: dict[str, Tensor]) -> Outcome:
        leaves = {k: inputs[k] for k in OPS[self.op].differentiable if isinstance(inputs.get(k), Tensor)}
        grad_outputs = [upstream[k].to(outputs[k].dtype) for k in upstream]
        grads = torch.autograd.grad([outputs[k] for k in upstream], list(leaves.values()), grad_outputs)
        return {f"grad_{k}": grad for k, grad in zip(leaves, grads, strict=True)}


@dataclass(frozen=True)
class Target:
    """A bound on trajkern: at most ``bound`` "times" as long as the rival takes, at least ``bound`` times as "fast",
    at most so many "seconds", or a peak "memory" of less than so many times the size of ``TimedCase.memory_of``."""

    unit: str
    bound: float
    rival: str = ""
    devices: tuple[str, ...] = ("cpu",)

    def met(self, value: float) -> bool:
        if self.unit == "memory":
            return value < self.bound
        return value >= self.bound if self.unit == "fast" else value <= self.bound


@dataclass(frozen=True)
class TimedCase:
    """An op on inputs of one size, how it is timed, and what is asked of it."""

    op: str
    work: str  # "forward", "forward + backward", ...
    shape: str  # how the table names the inputs
    make: Callable[[str], Problem]  # device -> problem
    targets: tuple[Target, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    memory_of: str | None = None  # measure the peak memory beside this argument's size
    host: bool = False  # time what the call costs its caller, not the device
    outside: str = "recipes"  # the family of what is no op of the registry

    @property
    def family(self) -> str:
        return OPS[self.op].family if self.op in OPS else self.outside

    @property
    def name(self) -> str:
        return f"{self.op}, {self.work}, {self.shape}"
