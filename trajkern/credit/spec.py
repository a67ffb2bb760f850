"""The algebra: a credit is an expression of terms, and is computed by calling it with rollouts."""

from __future__ import annotations

import abc
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_instance, check_number, describe, did_you_mean, readable, suggesting
from trajkern.credit.part import Call, Function, Part, added, check_name, needs_of, resolved_function, written
from trajkern.credit.result import Credit
from trajkern.credit.rollouts import Rollouts
from trajkern.ops._agreement import agreed
from trajkern.ops.advantage import whiten
from trajkern.ops.span import spread
from trajkern.recipes.dro import GATES
from trajkern.recipes.dro import gate as judged
from trajkern.recipes.trees import of_rollouts

GateSet = frozenset["Gate"]


class Spec(abc.ABC):
    """An expression of credit. Immutable; equal where written alike; ``repr`` writes it as Python.

    ``spec(rollouts)`` computes it. Expressions add, subtract, and are multiplied by numbers; the methods restrict and
    bend them.
    """

    children: ClassVar[tuple[str, ...]] = ("spec",)
    __array_ufunc__: ClassVar[None] = None  # numpy's numbers leave products to us

    def __call__(self, rollouts: Rollouts) -> Credit:
        """The credit of each token.

        Reads no value of a tensor on the host, but for a term of a tree behind a gate, which prunes the tree.

        Raises:
            ValueError: something that the expression needs is not among the rollouts, by the term that reads it; on a
                CPU also an advantage that its dtype does not hold.
        """
        check_instance("rollouts", rollouts, Rollouts)
        self._agree(rollouts)
        self.check(rollouts.names)
        call = Call(rollouts)
        part = self.part(call, frozenset())
        advantages = call.tokens(part).mul_(call.learning(part))
        if readable(advantages) and not bool(advantages.isfinite().all()):  # a product is not
            raise ValueError(f"{self!r} must give advantages that {str(advantages.dtype)[6:]} holds; some overflow it")
        mask, keep = call.mask(part).clone(), call.kept(part).clone()  # nobody else's
        positive = (advantages > 0).sum(dtype=torch.float32) / torch.count_nonzero(mask)
        metrics = call.metrics | {"kept": keep.float().mean(), "positive": positive}
        whole = part.rows is not None and part.kinds() == 1 and all(x.only is None for x in part.learns)
        rows = torch.where(keep, part.rows, 0) if whole and part.rows is not None else None
        divergences = tuple((term, torch.where(mask, weight, 0)) for term, weight in part.divergences)
        return Credit(advantages, mask, keep, metrics, call.reached, divergences, rollouts, rows)

    def _agree(self, rollouts: Rollouts) -> None:
        """Raises on every rank where one has another expression, or lacks what it needs: they would part half-way."""
        if rollouts.process_group is not None and rollouts.device.type == "cpu":  # elsewhere nothing here waits
            written = re.sub(r" at 0x[0-9a-f]+", "", repr(self))  # of what has no name
            shared = {"the expression": written, "what it reads of the rollouts": sorted(self.needs & rollouts.names)}
            agreed("a credit", rollouts.process_group, "process_group", shared, device=rollouts.device)

    @abc.abstractmethod
    def part(self, call: Call, gates: GateSet) -> Part:
        """What this comes to behind the gates."""

    @property
    def own_needs(self) -> frozenset[str]:
        """What this node itself reads."""
        return frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """The names of what has to be known of rollouts: a reward's own, "span_rewards:NAME", "spans:NAME",
        "flags:NAME", "tree", "score", "texts", "rows", "rows:COLUMN", "teacher_logprobs"."""
        return self.own_needs.union(*(child.needs for child in self.inner))

    @property
    def inner(self) -> tuple[Spec, ...]:
        return tuple(getattr(self, name) for name in self.children)

    def check(self, names: set[str]) -> None:
        """ValueError where something that this reads is not among ``names``, a set."""
        if not isinstance(names, (set, frozenset)):
            raise TypeError(f"names must be a set, got {describe(names)}")
        for child in self.inner:
            child.check(names)
        for name in sorted(self.own_needs - names):
            kind = name.partition(":")[0] + ":" if ":" in name else ""
            if kind == "rows:" and "rows:*" in names:
                continue
            same = sorted(x for x in names if x.startswith(kind) and (kind or ":" not in x))
            near = did_you_mean(name.removeprefix(kind), [x.removeprefix(kind) for x in same])
            raise ValueError(
                f"{self!r} needs {name!r}, which the rollouts do not have; they have {', '.join(same)}{near}"
            )

    def __add__(self, other: Any) -> Spec:
        if type(other) is int and other == 0:  # sum() begins with it
            return self
        return _added(self, other) if isinstance(other, Spec) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> Spec:
        return _added(self, -other) if isinstance(other, Spec) else NotImplemented

    def __neg__(self) -> Spec:
        return self * -1.0

    def __mul__(self, factor: Any) -> Spec:
        if isinstance(factor, Spec):
            return NotImplemented
        factor = float(check_number("factor", factor, dtype=torch.float32))
        if isinstance(self, Scaled):
            return self.spec * (factor * self.factor)
        return Scaled(factor, self)

    __rmul__ = __mul__

    @suggesting
    def gate(self, flag: str | Function, mode: str = "drop_rollout", threshold: float = 0.5) -> Spec:
        """Only rollouts that pass are compared and learn; a judgement, which never becomes a reward.

        Each term's units (rollouts, their spans, a tree's leaves) are restricted before its statistic is formed.
        Several gates intersect, each judging all rollouts of the group, so their order does not matter.

        Args:
            flag: the name of one of the rollouts' flags; or a function of them, or its "package.module:name", that
                returns bool ``[N]``.
            mode, threshold: what becomes of the group, as in :func:`trajkern.recipes.dro.gate`.
        """
        threshold = float(check_number("threshold", threshold, low=0, high=1))
        return Gated(self, Gate(resolved_function("flag", flag), check_choice("mode", mode, GATES), threshold))

    def on(self, span: str) -> Spec:
        """0 outside the spans of this name; the tokens there still count in the loss's normaliser."""
        check_name("span", span)
        return On(self, span)

    def only(self, span: str) -> Spec:
        """As :meth:`on`, and the tokens outside do not learn: they leave the loss's mask and normaliser."""
        check_name("span", span)
        return Only(self, span)

    @suggesting
    def asymmetric(self, positive: float = 1.0, negative: float = 1.0) -> Spec:
        """Positive advantages times ``positive``, negative ones times ``negative``, token by token: success and failure
        teach differently."""
        return Asymmetric(self, _weight("positive", positive), _weight("negative", negative))

    def whiten(self) -> Spec:
        """(A - mean) / sqrt(variance + 1e-8), over the learning tokens of the rollouts that are kept, of all ranks."""
        return Whitened(self)

    @suggesting
    def clip(self, low: float, high: float) -> Spec:
        """Each token's advantage, at least ``low`` and at most ``high``; 0 lies between the two."""
        low, high = (float(check_number(name, x)) for name, x in (("low", low), ("high", high)))
        if not low <= 0 <= high:
            raise ValueError(f"low must be at most 0 and high at least 0; got {low} and {high}")
        return Clipped(self, low, high)


@dataclass(frozen=True)
class Gate:
    """A judgement of rollouts and what becomes of their groups."""

    flag: Any  # str | Function
    mode: str
    threshold: float

    def judge(self, call: Call) -> Tensor:
        """Whom it lets through, ``[N]``."""
        rollouts = call.rollouts
        if callable(self.flag):
            flags = call.asked(self.flag, (torch.bool,), len(rollouts), "one flag a rollout")
        else:
            flags = rollouts.flags[self.flag]
        if self.mode == "drop_rollout":
            return flags
        groups = rollouts.batch.group_ids.long()
        return rollouts.ranks.over_all(partial(judged, mode=self.mode, threshold=self.threshold), flags, groups)


@dataclass(frozen=True, repr=False)
class Sum(Spec):
    children: ClassVar = ()
    parts: tuple[Spec, ...]

    @property
    def inner(self) -> tuple[Spec, ...]:
        return self.parts

    def part(self, call: Call, gates: GateSet) -> Part:
        total = Part()
        for spec in self.parts:
            total = total.plus(spec.part(call, gates))
        return total

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


def _added(first: Spec, second: Spec) -> Sum:
    parts: list[Spec] = []
    for spec in (first, second):
        parts += spec.parts if isinstance(spec, Sum) else (spec,)
    return Sum(tuple(parts))


@dataclass(frozen=True, repr=False)
class Scaled(Spec):
    factor: float
    spec: Spec

    def part(self, call: Call, gates: GateSet) -> Part:
        part, factor = self.spec.part(call, gates), self.factor
        scaled = part.mapped(lambda x: x.mul_(factor))
        weighed = tuple((term, weight * factor) for term, weight in part.divergences)
        return replace(scaled, divergences=weighed)

    def __repr__(self) -> str:
        return f"{self.factor!r} * {_bracketed(self.spec)}"


@dataclass(frozen=True, repr=False)
class Gated(Spec):
    spec: Spec
    judgement: Gate

    @property
    def own_needs(self) -> frozenset[str]:
        return needs_of(self.judgement.flag, "flags:")

    def part(self, call: Call, gates: GateSet) -> Part:
        return self.spec.part(call, gates | {self.judgement})

    def __repr__(self) -> str:
        gate = self.judgement
        threshold = f", threshold={gate.threshold!r}" if gate.threshold != 0.5 else ""
        return f"{_bracketed(self.spec)}.gate({written(gate.flag)}, mode={gate.mode!r}{threshold})"


@dataclass(frozen=True, repr=False)
class On(Spec):
    spec: Spec
    span: str

    @property
    def own_needs(self) -> frozenset[str]:
        return frozenset((f"spans:{self.span}",))

    def part(self, call: Call, gates: GateSet) -> Part:
        part, name = self.spec.part(call, gates), self.span
        inside, spans = call.inside(name), {}
        if part.rows is not None:
            spans[name] = part.rows[call.rollouts.spans[name].trajectory.long()]
        if name in part.spans:
            spans[name] = spans[name] + part.spans[name] if name in spans else part.spans[name]
        tokens = part.tokens
        for other, x in part.spans.items():
            if other != name:
                tokens = added(tokens, spread(x, call.rollouts.spans[other]))
        tokens = None if tokens is None else torch.where(inside, tokens, 0)
        weighed = tuple((term, torch.where(inside, weight, 0)) for term, weight in part.divergences)
        return replace(part, rows=None, spans=spans, tokens=tokens, divergences=weighed)

    def __repr__(self) -> str:
        return f"{_bracketed(self.spec)}.on({self.span!r})"


@dataclass(frozen=True, repr=False)
class Only(On):
    def part(self, call: Call, gates: GateSet) -> Part:
        part, inside = super().part(call, gates), call.inside(self.span)
        learns = tuple(x._replace(only=inside if x.only is None else inside & x.only) for x in part.learns)
        return replace(part, learns=learns)

    def __repr__(self) -> str:
        return f"{_bracketed(self.spec)}.only({self.span!r})"


class Bent(Spec):
    """A change of each token's advantage that is not linear: of values of one kind as they are, else of tokens."""

    spec: Spec

    @abc.abstractmethod
    def bend(self, x: Tensor) -> Tensor: ...

    def part(self, call: Call, gates: GateSet) -> Part:
        part = advantages_alone(self, self.spec.part(call, gates))
        if part.kinds() > 1:
            part = replace(part, rows=None, spans={}, tokens=call.tokens(part))
        return part.mapped(self.bend)


@dataclass(frozen=True, repr=False)
class Asymmetric(Bent):
    spec: Spec
    positive: float
    negative: float

    def bend(self, x: Tensor) -> Tensor:
        leaky = torch.nn.functional.leaky_relu_  # below 0 times a slope, in place
        return leaky(leaky(x, self.negative).neg_(), self.positive).neg_()

    def __repr__(self) -> str:
        return f"{_bracketed(self.spec)}.asymmetric({self.positive!r}, {self.negative!r})"


@dataclass(frozen=True, repr=False)
class Clipped(Bent):
    spec: Spec
    low: float
    high: float

    def bend(self, x: Tensor) -> Tensor:
        return x.clamp_(self.low, self.high)

    def __repr__(self) -> str:
        return f"{_bracketed(self.spec)}.clip({self.low!r}, {self.high!r})"


@dataclass(frozen=True, repr=False)
class Whitened(Spec):
    spec: Spec

    def part(self, call: Call, gates: GateSet) -> Part:
        part = advantages_alone(self, self.spec.part(call, gates))
        mask, rollouts = call.mask(part), call.rollouts
        tokens = whiten(call.tokens(part), mask=mask, process_group=rollouts.process_group)
        if part.rows is None or part.kinds() > 1 or any(x.only is not None for x in part.learns):
            return replace(part, rows=None, spans={}, tokens=tokens)
        return replace(part, rows=of_rollouts(tokens, mask, rollouts.batch.cu_seqlens))

    def __repr__(self) -> str:
        return f"{_bracketed(self.spec)}.whiten()"


def advantages_alone(spec: Spec, part: Part) -> Part:
    if part.divergences:
        raise ValueError(f"{spec!r}: a divergence is a term of the loss, and no advantage to be bent; add it behind")
    return part


def _bracketed(spec: Spec) -> str:
    return f"({spec!r})" if isinstance(spec, (Sum, Scaled)) else repr(spec)


def _weight(name: str, value: Any) -> float:
    return float(check_number(name, value, low=0, dtype=torch.float32))
