"""What was found of an implementation, and how it is told: short lines, the worst number, code that shows it again."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_flag
from trajkern.testing.numerics import Outcome, budget_share, budget_shares, oracle, run, shares_of_numbers
from trajkern.testing.own import Function, called, held, kept, put_back, written
from trajkern.testing.registry import Inputs, OpSpec, check_parts

WIDTH = 80
NAMES = 6  # of cases, before "and 9 more"
DIGITS = {torch.float64: 17, torch.float32: 9}  # that tell two neighbours apart; else 6


@dataclass(frozen=True)
class Difference:
    """The number of an output or a gradient that is furthest from float64, by its budget.

    Args:
        share: its error as a share of what it may be: at most 1 passes.
        index: where it stands; None where the whole has another shape or another kind of dtype.
        got, expected: the two numbers, or the two shapes.
    """

    share: float
    index: tuple[int, ...] | None
    got: str
    expected: str

    def __str__(self) -> str:
        where = "" if self.index is None else f", worst at {list(self.index)}" if self.index else ""
        return f"{_share(self.share)}{where}: got {self.got}, expected {self.expected}"


class Differences(dict[str, Difference]):
    """The worst number of every output and gradient; prints a line each."""

    def __str__(self) -> str:
        wide = max(map(len, self), default=0)
        return "\n".join(f"{name:<{wide}}  {found}" for name, found in self.items())


def differences(spec: OpSpec, function: Function, inputs: Inputs, backward: bool = True) -> Differences:
    """Where ``function`` is furthest from the float64 reference, in every output and gradient.

    Args:
        spec: of the op that it is like: ``spec_of("token_logprobs")``.
        function: what :func:`~trajkern.testing.check` takes.
        inputs: the arguments, such as ``spec.inputs(spec.case("typical"), torch.float32)``.
        backward: compare its gradients, too.
    """
    check_parts(spec, function, inputs)
    backward = check_flag("backward", backward)
    if function is not getattr(tk, spec.name) or not backward:
        spec, function = held(spec, function, backward), put_back(called(spec, function))
    before = kept(inputs)
    actual = run(spec, function, inputs)
    if (spoilt := written(before, inputs)) and not inputs.get("inplace_backward"):
        raise ValueError(f"writes into its argument {', '.join(spoilt)}")
    return compared(spec, actual, before)


def compared(spec: OpSpec, actual: Outcome, inputs: Inputs) -> Differences:
    """:func:`differences` of a result that is there already."""
    shares = budget_shares(spec, actual, inputs)
    high, low = oracle(spec, inputs)
    return Differences({k: _worst(spec, k, share, actual[k], high[k], low[k]) for k, share in shares.items()})


def _worst(spec: OpSpec, name: str, share: float, actual: Tensor, high: Tensor, low: Tensor) -> Difference:
    if actual.shape != high.shape or actual.is_floating_point() != high.is_floating_point():
        told = [f"shape {list(x.shape)}" if actual.shape != high.shape else str(x.dtype)[6:] for x in (actual, high)]
        return Difference(share, None, *told)
    if not actual.numel():
        return Difference(budget_share(spec, name, actual, high, low), (), "nothing", "nothing")
    flat = int(shares_of_numbers(spec, name, actual, high, low).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat, device="cpu"), actual.shape))
    got, expected = actual.flatten()[flat].item(), high.flatten()[flat].item()
    digits = DIGITS.get(actual.dtype, 6)
    return Difference(share, index, *(f"{x:.{digits}g}" if isinstance(x, float) else str(x) for x in (got, expected)))


def _share(share: float) -> str:
    if not math.isfinite(share):
        return "more than any budget"
    return f"{share:.3g} times its budget"


@dataclass(frozen=True)
class Failure:
    """A case that an implementation fails.

    Args:
        case: its name; ``seed`` the draw.
        size: how many numbers it takes.
        why: what is wrong, in one line.
        bits: the part of it that is about bits that differ.
        reason: what the case is there for.
        worst: where the numbers are furthest off, by output and gradient; empty where none were given.
    """

    case: str
    seed: int
    size: int
    why: str
    reason: str = ""
    bits: str = ""
    worst: dict[str, Difference] = field(default_factory=dict)


@dataclass(repr=False)
class Result:
    """What was found of one op on one backend at one precision; prints in a few lines."""

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
    skipped: dict[str, list[str]] = field(default_factory=dict)  # option that is not taken -> the cases that give it
    call: str = ""  # the function's name in the code that shows a failure again
    imports: tuple[str, ...] = ()  # the lines before that code
    within: str = ""  # the context that the code runs in
    bits: bool = False  # whether bits that differ are a failure
    backward: bool = True  # whether gradients were compared

    @property
    def passed(self) -> bool:
        """Whether there was a case, and none failed."""
        return self.cases > 0 and not self.failures

    @property
    def smallest(self) -> Failure:
        """The failure of the fewest numbers."""
        return min(self.failures, key=lambda failure: failure.size)

    def __repr__(self) -> str:
        return f"<{self.title}: {self.summary}>"

    def __str__(self) -> str:
        return "\n".join((*_wrapped(f"{self.title}: {self.summary}", ""), *self.details()))

    @property
    def title(self) -> str:
        return ", ".join(part for part in (self.op, self.backend or self.device, self.dtype) if part)

    @property
    def summary(self) -> str:
        if not self.cases:
            return "no case is left, so nothing was held against the reference"
        verdict = self.failing if self.failures else f"{self.cases} case{'s pass' if self.cases > 1 else ' passes'}"
        return f"{verdict}, worst {_share(self.worst)}" if math.isfinite(self.worst) else verdict

    @property
    def failing(self) -> str:
        return f"{len(self.failures)} of {self.cases} cases fail{'s' * (len(self.failures) == 1)}"

    def plain(self) -> dict[str, Any]:
        """For a file: what was found, without how it is shown."""
        shown = ("skipped", "call", "imports", "within", "bits", "backward")
        return {k: x for k, x in asdict(self).items() if k not in shown} | {"passed": self.passed}

    def details(self) -> Iterator[str]:
        """What was skipped, and the smallest failure with the code that shows it again."""
        yield from skipped_lines(self.skipped)
        if self.failures:
            yield from self.failure_lines()

    def failure_lines(self) -> Iterator[str]:
        failure = self.smallest
        yield from _wrapped(f"the smallest, {failure.case}{f' ({failure.reason})' * bool(failure.reason)}:")
        over = [f"{name} is off by {found}" for name, found in failure.worst.items() if not found.share <= 1]
        for text in [*over, *[failure.bits] * bool(failure.bits)] or [failure.why]:
            yield from _wrapped(text, "    ")
        if others := list(dict.fromkeys(f.case for f in self.failures if f.case != failure.case)):
            yield from _wrapped(f"also failing: {_listed(others)}")
        if self.worst_case and 1 < self.worst < math.inf and self.worst_case.partition(":")[0] != failure.case:
            yield from _wrapped(f"the worst, {_share(self.worst)}: {self.worst_case.replace(':', ',')}")
        yield from ("", *self.snippet())

    def snippet(self) -> Iterator[str]:
        """Lines of Python that can be pasted: the smallest failure, again."""
        failure = self.smallest
        yield "import torch"
        yield from self.imports
        yield f"from trajkern.testing import {'compiled, ' * self.within.startswith('compiled(')}differences, spec_of"
        if self.bits:
            yield "from trajkern.testing.validation import dependent"
        yield ""
        yield f'op = spec_of("{self.op}")'
        yield f'case = op.case("{failure.case}")'
        yield f'inputs = op.inputs(case, torch.{self.dtype}, "{self.device}", seed={failure.seed})'
        indent = "    " if self.within else ""
        if self.within:
            yield f"with {self.within}:"
        yield f"{indent}print(differences(op, {self.call}, inputs{', backward=False' * (not self.backward)}))"
        if self.bits:
            yield f"{indent}print(dependent(op, {self.call}, inputs))"


class Results(list[Result]):
    """One :class:`Result` a precision. ``passed`` where each is; prints a line each and the first failure in full."""

    @property
    def passed(self) -> bool:
        return bool(self) and all(result.passed for result in self)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        if not self:
            return "nothing was checked"
        first = self[0]
        lines = _wrapped(f"{first.call} like {first.op}, on {first.device}", "")
        lines += ["(budget: twice the reference's own error at that precision, plus one rounding)"]
        lines += [f"  {r.dtype:<9} {'ok  ' if r.passed else 'FAIL'} {r.summary}" for r in self]
        lines += skipped_lines(first.skipped)
        if failed := [result for result in self if result.failures]:
            lines += ["", f"{failed[0].dtype}: {failed[0].failing}"]
            lines += failed[0].failure_lines()
        return "\n".join(lines)


def skipped_lines(skipped: dict[str, list[str]]) -> Iterator[str]:
    """How many cases were left out, and for which option."""
    if skipped:
        count = len({case for cases in skipped.values() for case in cases})
        yield f"  skipped: {count} case{'s' * (count > 1)}, for an option that is not taken"
    for option, cases in skipped.items():
        yield from _wrapped(f"{option}: {_listed(cases)}", "    ")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES])
    return shown + f" and {len(names) - NAMES} more" * (len(names) > NAMES)


def _wrapped(text: str, indent: str = "  ") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False)
