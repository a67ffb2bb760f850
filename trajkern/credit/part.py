"""What an expression of credit comes to: values of rollouts, spans and tokens that add up, and who learns from them.

Sums and weights leave values where they are; they are spread to tokens once, at the end, or where an operation acts on
a token's sum of several kinds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._checks import check_shape, check_tensor, describe, readable
from trajkern.credit.result import to_tokens
from trajkern.credit.rollouts import Rollouts, check_whole
from trajkern.ops.span import span_reduce, spread

Function = Callable[[Rollouts], Tensor]


class Learns(NamedTuple):
    """Who learns from a term."""

    keep: Tensor | None = None  # the rollouts that it keeps [N], None for all
    only: Tensor | None = None  # the tokens that it is restricted to [T], None for all
    idle: Tensor | None = None  # of those it keeps, the rollouts in which it had nothing to score [N], None for none


@dataclass(frozen=True)
class Part:
    """What an expression comes to: the advantage of a token is its rollout's plus its spans' plus its own.

    Its values are nobody else's and change in place, since new memory costs more than a pass over it; they are 0 in the
    rollouts, and outside of the tokens, that ``learns`` leaves out.

    Attributes:
        rows: ``[N]``, of rollouts.
        spans: name -> ``[S]``.
        tokens: ``[T]``.
        learns: who learns from any of the terms.
        abstains: the rollouts that some term was to score and could not ``[N]``, None for none.
        divergences: (term, weight of each token ``[T]``).
    """

    rows: Tensor | None = None
    spans: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    learns: tuple[Learns, ...] = ()
    divergences: tuple[tuple[Any, Tensor], ...] = ()
    abstains: Tensor | None = None

    def kinds(self) -> int:
        return (self.rows is not None) + len(self.spans) + (self.tokens is not None)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Part:
        """With every value changed; right for what distributes over sums, or where there is one kind."""
        return replace(
            self,
            rows=None if self.rows is None else change(self.rows),
            spans={name: change(x) for name, x in self.spans.items()},
            tokens=None if self.tokens is None else change(self.tokens),
        )

    def plus(self, other: Part) -> Part:
        learns = self.learns + tuple(x for x in other.learns if not any(_same(x, y) for y in self.learns))
        spans = dict(self.spans)
        for name, x in other.spans.items():
            spans[name] = spans[name] + x if name in spans else x
        rows, tokens = added(self.rows, other.rows), added(self.tokens, other.tokens)
        abstains = self.abstains if other.abstains is None else other.abstains
        if self.abstains is not None and other.abstains is not None:
            abstains = self.abstains | other.abstains
        return Part(rows, spans, tokens, learns, self.divergences + other.divergences, abstains)


def added(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum of what there is, in place of x where that can hold it."""
    if x is None or y is None:
        return y if x is None else x
    return x.add_(y) if torch.promote_types(x.dtype, y.dtype) == x.dtype else x + y


def _same(x: Learns, y: Learns) -> bool:
    return all(a is b for a, b in zip(x, y, strict=True))


class Call:
    """One call of a credit: the rollouts, and what has been computed of them."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts
        self.metrics: dict[str, Tensor] = {}
        self.reached: dict[str, Tensor] = {}
        self._known: dict[Any, Any] = {}
        self._last: tuple[Any, ...] = (None,)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def asked(
        self, function: Function, dtypes: tuple[torch.dtype, ...] | None, count: int, what: str, key: Any = None
    ) -> Tensor:
        """What a function of the rollouts returns, called once."""
        x = self.once(("function", key or function), lambda: function(self.rollouts))
        name = f"the result of {named(key[0] if key else function)}"
        check_tensor(name, x, dtypes=dtypes, device=self.rollouts.device)
        check_shape(name, x, (count,), what)
        if readable(x):
            check_whole(name, x)
        return x.detach()

    def passed(self, gates: frozenset[Any]) -> Tensor | None:
        """The rollouts that all of the gates let through, ``[N]``; None without a gate."""
        judged = (self.once(gate, partial(gate.judge, self)) for gate in gates)
        return self.once(("passed", gates), lambda: reduce(torch.logical_and, judged)) if gates else None

    def among_passed(self, flags: Tensor, gates: frozenset[Any]) -> Tensor:  # [N] bool
        """Of these rollouts those that the gates let through."""
        passed = self.passed(gates)
        return flags if passed is None else passed & flags

    @property
    def counts(self) -> Tensor:
        """Learning tokens of each rollout, ``[N]``, by the loss mask."""
        return self.once("counts", lambda: self._per_span(self.rollouts.whole))

    def span_counts(self, name: str) -> Tensor:
        """Tokens of the loss mask in each span, ``[S]``."""
        return self.once(("counts", name), lambda: self._per_span(self.rollouts.spans[name]))

    def _per_span(self, spans: Any) -> Tensor:
        return span_reduce(self.scored, spans, "sum")

    @property
    def scored(self) -> Tensor:
        """The loss mask as numbers, ``[T]``: a product is ten times as fast as a choice."""
        return self.once("scored", lambda: self.rollouts.batch.loss_mask.view(torch.uint8).float())

    def inside(self, name: str) -> Tensor:
        """Whether a token is in a span of this name, bool ``[T]``."""
        spans = self.rollouts.spans[name]
        ones = partial(torch.ones, len(spans), device=self.rollouts.device)
        return self.once(("inside", name), lambda: spread(ones(), spans).bool())

    def tokens(self, part: Part) -> Tensor:
        """The advantage of each token, ``[T]``, whether it learns or not."""
        kinds = [spread(x, self.rollouts.spans[name]) for name, x in part.spans.items()]
        if part.rows is not None:
            kinds.append(to_tokens(part.rows, self.rollouts))
        total = reduce(added, (*kinds, part.tokens), None)
        return (
            torch.zeros(self.rollouts.batch.num_tokens, dtype=torch.float32, device=self.rollouts.device)
            if total is None
            else total
        )

    def kept(self, part: Part) -> Tensor:
        """The rollouts that some term keeps, ``[N]``: one in which none scored anything leaves if one was to."""
        return self.once(("kept", *self._learns(part)), lambda: (self._kept(part), part))[0]

    def _learns(self, part: Part) -> tuple[Any, ...]:
        """Who learns of it, by the ids of tensors; who remembers this keeps the part, so that none of them dies."""
        return id(part.abstains), *(tuple(map(id, x)) for x in part.learns)

    def _kept(self, part: Part) -> Tensor:
        flags = partial(torch.full, (len(self.rollouts),), dtype=torch.bool, device=self.rollouts.device)
        scored = [x.keep if x.idle is None else x.keep & ~x.idle for x in part.learns if x.keep is not None]
        if any(x.keep is None for x in part.learns):
            return flags(fill_value=True)
        idle = [x.keep & x.idle for x in part.learns if x.keep is not None and x.idle is not None]
        if idle and part.abstains is not None:
            idle = [reduce(torch.logical_or, idle) & ~part.abstains]
        return reduce(torch.logical_or, scored + idle) if scored else flags(fill_value=False)

    def mask(self, part: Part) -> Tensor:
        """The tokens that learn, bool ``[T]``."""
        learning = self.learning(part)
        return self.rollouts.batch.loss_mask if learning is self.scored else learning.bool()

    def learning(self, part: Part) -> Tensor:
        """1 for the tokens that learn, else 0; ``[T]``. Only the last is remembered: memory that is reused is fast."""
        key = self._learns(part)
        if self._last[0] != key:
            self._last = key, self._learning(part), part
        return self._last[1]

    def _learning(self, part: Part) -> Tensor:
        if any(all(each is None for each in x) for x in part.learns):
            return self.scored
        kept = to_tokens(self.kept(part).float(), self.rollouts).mul_(self.scored)
        if all(x.only is None for x in part.learns):
            return kept
        learns = torch.zeros_like(self.rollouts.batch.loss_mask)
        for keep, only, _ in part.learns:
            rows = torch.ones_like(learns) if keep is None else to_tokens(keep.float(), self.rollouts) != 0
            learns |= rows if only is None else rows & only
        return kept.mul_(learns)

    def report_tokens(self, name: str, values: Tensor, part: Part) -> None:
        """As :meth:`report`, of values of tokens, 0 where nothing of the part learns."""
        learning = self.learning(part)
        total = self._sum(learning)
        mean = self._sum(values) / total
        apart = (values - mean.to(values.dtype)).square_().mul_(learning)
        self._note(name, mean, self._sum(apart) / total, total, values.dtype)

    def _sum(self, tokens: Tensor) -> Tensor:
        """Rollout by rollout, float64."""
        return span_reduce(tokens, self.rollouts.whole, "sum").double().sum()

    def report(self, name: str, values: Tensor, weights: Tensor) -> None:
        """The mean and deviation of a term over the tokens that it reaches, ``weights`` of them for each value."""
        x, w = values.double(), weights.double()
        total = w.sum()
        mean = (w * x).sum() / total
        self._note(name, mean, (x - mean).square_().mul_(w).sum() / total, total, values.dtype)

    def _note(self, name: str, mean: Tensor, variance: Tensor, total: Tensor, dtype: torch.dtype) -> None:
        number, label = 2, name
        while f"{label}/mean" in self.metrics:
            label, number = f"{name}#{number}", number + 1
        self.metrics |= {f"{label}/mean": mean.to(dtype), f"{label}/std": variance.sqrt().to(dtype)}
        self.reached[label] = total


def check_name(argument: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a name, got {describe(value)}")


def resolved_function(argument: str, value: str | Function) -> str | Function:
    """A name as it is; the function that "package.module:name" says. An error names the ``argument``."""
    if isinstance(value, str):
        if ":" not in value:
            return value
        name = value
        try:
            value = load(name)
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from None
        if not callable(value):
            raise TypeError(f"{argument} must be a function of the rollouts; at {name} is {describe(value)}")
    if not callable(value):
        raise TypeError(f"{argument} must be a name or a function of the rollouts, got {describe(value)}")
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"{argument} must be hashable, as a function of the rollouts; {value!r} is not") from None
    return value


def load(name: str) -> Any:
    """What "package.module:name" says. Raises ValueError where there is no such thing, or where its module fails."""
    check_name("name", name)
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for step in path.split("."):
            found = getattr(found, step)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'"package.module:name" is expected, got {name!r}: {error}') from None
    except (Exception, SystemExit) as error:  # of the module's own code
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f'"package.module:name" is expected, got {name!r}: to import it raised {what}') from error
    return found


def named(function: Any) -> str:
    """A function as "package.module:name"."""
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", None)
    return repr(function) if name is None else f"{function.__module__}:{name}"


def written(value: Any) -> str:
    """A name or a function as Python would read it back."""
    is_plain = isinstance(value, str) or (hasattr(value, "__qualname__") and not hasattr(value, "__self__"))
    return repr(named(value)) if is_plain else repr(value)


def written_call(name: str, x: Any, first: str = "", last: frozenset[str] = frozenset()) -> str:
    """A dataclass as a call of ``name`` that makes it, with what is not the default.

    The field ``first`` is an argument by position; those in ``last`` come last.
    """
    given = [each.name for each in fields(x) if each.init and getattr(x, each.name) != each.default]
    given.sort(key=lambda name: (name != first, name in last))
    shown = (f"{'' if name == first else name + '='}{written(getattr(x, name))}" for name in given)
    return f"{name}({', '.join(shown)})"


def needs_of(value: Any, kind: str = "") -> frozenset[str]:
    """A name behind its ``kind``; what an expression or a function of rollouts says that it reads in ``needs``."""
    needs = kind + value if isinstance(value, str) else getattr(value, "needs", ())
    if not isinstance(needs, str) and not (isinstance(needs, Collection) and all(isinstance(x, str) for x in needs)):
        raise TypeError(f"needs of {named(value)} must be a name or names of what it reads, got {describe(needs)}")
    return frozenset((needs,) if isinstance(needs, str) else needs)


class Value:
    """A function of rollouts that is a dataclass: equal where made alike, and written as the call that makes it."""

    def __repr__(self) -> str:
        return written_call(f"credit.{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}", self)
