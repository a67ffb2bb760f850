"""What an expression of credit comes to: values of rollouts, spans and tokens that add up, and who learns from them.

Sums and weights leave values where they are; they are spread to tokens once, at the end, or where an operation acts on
a token's sum of several kinds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from trajkern._checks import check_shape, check_tensor, describe
from trajkern.credit.result import to_tokens
from trajkern.credit.rollouts import Rollouts
from trajkern.layouts.spans import Spans
from trajkern.ops.span import span_reduce, spread

Function = Callable[[Rollouts], Tensor]


@dataclass(frozen=True)
class Part:
    """What an expression comes to: the advantage of a token is its rollout's plus its spans' plus its own.

    Attributes:
        rows: ``[N]``, of rollouts.
        spans: name -> ``[S]``.
        tokens: ``[T]``.
        learns: who learns, any of: (rollouts that are kept ``[N]``, or None for all; the tokens ``[T]`` that this is
            restricted to, or None).
        divergences: (term, weight of each token ``[T]``).
    """

    rows: Tensor | None = None
    spans: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    learns: tuple[tuple[Tensor | None, Tensor | None], ...] = ()
    divergences: tuple[tuple[Any, Tensor], ...] = ()

    def kinds(self) -> int:
        return (self.rows is not None) + len(self.spans) + (self.tokens is not None)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Part:
        """With every value changed; right for what distributes over sums, or where there is one kind."""
        return Part(
            None if self.rows is None else change(self.rows),
            {name: change(x) for name, x in self.spans.items()},
            None if self.tokens is None else change(self.tokens),
            self.learns,
            self.divergences,
        )

    def plus(self, other: Part) -> Part:
        learns = self.learns + tuple(x for x in other.learns if not any(_same(x, y) for y in self.learns))
        spans = dict(self.spans)
        for name, x in other.spans.items():
            spans[name] = spans[name] + x if name in spans else x
        divergences = self.divergences + other.divergences
        return Part(added(self.rows, other.rows), spans, added(self.tokens, other.tokens), learns, divergences)


def added(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _added_into(x: Tensor, y: Tensor) -> Tensor:
    """The sum; x is nobody else's, and new memory costs as much as a pass over it."""
    return x.add_(y) if torch.promote_types(x.dtype, y.dtype) == x.dtype else x + y


def _same(x: tuple[Any, Any], y: tuple[Any, Any]) -> bool:
    return all(a is b for a, b in zip(x, y, strict=True))


class Call:
    """One call of a credit: the rollouts, and what has been computed of them."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts
        self.metrics: dict[str, Tensor] = {}
        self._known: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def asked(self, function: Function, dtypes: tuple[torch.dtype, ...] | None, count: int, what: str) -> Tensor:
        """What a function of the rollouts returns, called once."""
        x = self.once(("function", function), lambda: function(self.rollouts))
        check_tensor(f"the result of {named(function)}", x, dtypes=dtypes, device=self.rollouts.device)
        check_shape(f"the result of {named(function)}", x, (count,), what)
        return x.detach()

    def passed(self, gates: frozenset[Any]) -> Tensor | None:
        """The rollouts that all of the gates let through, ``[N]``; None without a gate."""
        return self.once(("passed", gates), lambda: self._passed(gates)) if gates else None

    def _passed(self, gates: frozenset[Any]) -> Tensor:
        return reduce(torch.logical_and, [self.once(gate, partial(gate.judge, self)) for gate in gates])

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
        return self.once("scored", lambda: self.rollouts.batch.loss_mask.float())

    def inside(self, name: str) -> Tensor:
        """Whether a token is in a span of this name, bool ``[T]``."""
        return self.once(("inside", name), lambda: self._marked(self.rollouts.spans[name]) != 0)

    def _marked(self, spans: Spans) -> Tensor:
        return spread(torch.ones(len(spans), device=self.rollouts.device), spans)

    def tokens(self, part: Part) -> Tensor:
        """The advantage of each token, ``[T]``, 0 where nothing of the part learns."""
        fresh = [spread(x, self.rollouts.spans[name]) for name, x in part.spans.items()]
        if part.rows is not None:
            fresh.append(to_tokens(part.rows, self.rollouts))
        total = reduce(_added_into, fresh) if fresh else None
        if part.tokens is not None:
            total = part.tokens.clone() if total is None else _added_into(total, part.tokens)
        if total is None:
            return torch.zeros(self.rollouts.batch.num_tokens, device=self.rollouts.device)
        return total.mul_(self.learning(part))

    def kept(self, part: Part) -> Tensor:
        """The rollouts that some term keeps, ``[N]``."""
        count, device = len(self.rollouts), self.rollouts.device
        if not part.learns:
            return torch.zeros(count, dtype=torch.bool, device=device)
        if any(keep is None for keep, _ in part.learns):
            return torch.ones(count, dtype=torch.bool, device=device)
        return reduce(torch.logical_or, [keep for keep, _ in part.learns if keep is not None])

    def mask(self, part: Part) -> Tensor:
        """The tokens that learn, bool ``[T]``."""
        learning = self.learning(part)
        return self.rollouts.batch.loss_mask if learning is self.scored else learning != 0

    def learning(self, part: Part) -> Tensor:
        """1 for the tokens that learn, else 0; ``[T]``."""
        key = "learning", tuple((id(x), id(y)) for x, y in part.learns)
        return self.once(key, lambda: (self._learning(part), part.learns))[0]  # what is known by its id must not die

    def _learning(self, part: Part) -> Tensor:
        if any(keep is None and only is None for keep, only in part.learns):
            return self.scored
        if all(only is None for _, only in part.learns):
            return to_tokens(self.kept(part).float(), self.rollouts).mul_(self.scored)
        learns = torch.zeros_like(self.rollouts.batch.loss_mask)
        for keep, only in part.learns:
            rows = torch.ones_like(learns) if keep is None else to_tokens(keep.float(), self.rollouts) != 0
            learns |= rows if only is None else rows & only
        return self.scored * learns

    def report_tokens(self, name: str, values: Tensor, part: Part) -> None:
        """As :meth:`report`, of values of tokens, 0 where nothing of the part learns."""
        total = torch.count_nonzero(self.learning(part))
        mean, square = (
            span_reduce(x, self.rollouts.whole, "sum").double().sum() / total for x in (values, values.square())
        )
        self._note(name, mean, (square - mean.square()).clamp_min(0), values.dtype)

    def report(self, name: str, values: Tensor, weights: Tensor) -> None:
        """The mean and deviation of a term over the tokens that it reaches, ``weights`` of them for each value."""
        x, w = values.double(), weights.double()
        total = w.sum()
        mean = (w * x).sum() / total
        self._note(name, mean, (w * (x - mean).square()).sum() / total, values.dtype)

    def _note(self, name: str, mean: Tensor, variance: Tensor, dtype: torch.dtype) -> None:
        number, label = 2, name
        while f"{label}/mean" in self.metrics:
            label, number = f"{name}#{number}", number + 1
        self.metrics |= {f"{label}/mean": mean.to(dtype), f"{label}/std": variance.sqrt().to(dtype)}


def resolved_function(value: str | Function) -> str | Function:
    """A name as it is; the function that "package.module:name" says."""
    if callable(value):
        return value
    if not isinstance(value, str):
        raise TypeError(f"a name or a function of the rollouts is expected, got {describe(value)}")
    return load(value) if ":" in value else value


def load(name: str) -> Any:
    """What "package.module:name" says. Raises ValueError where there is no such thing."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for step in path.split("."):
            found = getattr(found, step)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f'"package.module:name" is expected, got {name!r}: {error}') from None
    return found


def named(function: Any) -> str:
    """A function as "package.module:name"."""
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", None)
    return repr(function) if name is None else f"{function.__module__}:{name}"


def written(value: Any) -> str:
    """A name or a function as Python would read it back."""
    is_plain = isinstance(value, str) or hasattr(value, "__qualname__")
    return repr(named(value)) if is_plain else repr(value)


def written_call(name: str, x: Any, first: str = "", last: frozenset[str] = frozenset()) -> str:
    """A dataclass as a call of ``name`` that makes it, with what is not the default.

    The field ``first`` is an argument by position; those in ``last`` come last.
    """
    given = [each.name for each in fields(x) if each.init and getattr(x, each.name) != each.default]
    given.sort(key=lambda name: (name != first, name in last))
    shown = (f"{'' if name == first else name + '='}{written(getattr(x, name))}" for name in given)
    return f"{name}({', '.join(shown)})"


def needs_of(function: Any) -> frozenset[str]:
    """What a function of rollouts says that it reads, in its attribute ``needs``."""
    return frozenset(getattr(function, "needs", ()))
