"""Specs of the span family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trajkern.layouts.batch import PackedBatch
from trajkern.layouts.spans import Spans
from trajkern.layouts.tree import Tree
from trajkern.ops.span import REDUCTIONS
from trajkern.testing.registry import Case, Inputs, OpSpec, Variant
from trajkern.testing.tree import chain, random_tree, regular_tree

DTYPES = (torch.float32, torch.float64)
Layout = Spans | PackedBatch | Tree


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def spans_of(lengths: Tensor, gaps: Tensor, each: int = 5) -> Spans:
    """Spans of these lengths behind gaps of these (one more, the last behind all); ``each`` to a trajectory."""
    edges = torch.stack((gaps[:-1], lengths), 1).flatten().cumsum(0).view(-1, 2)
    number = torch.arange(lengths.shape[0])
    start, end = edges.unbind(1)
    return Spans(start, end, number // each, number % each, int(edges[-1, 1] + gaps[-1]))


def random_spans(g: torch.Generator, count: int, longest: int = 40) -> Spans:
    """Of up to ``longest`` tokens, some of none, and with or without tokens between them."""
    lengths = torch.randint(0, longest + 1, (count,), generator=g)
    return spans_of(lengths, torch.randint(-20, 20, (count + 1,), generator=g).relu())


def no_spans(tokens: int) -> Spans:
    none = torch.empty(0, dtype=torch.int64)
    return Spans(none, none, none, none, tokens)


def whole(tokens: int) -> Spans:
    zero = torch.zeros(1, dtype=torch.int64)
    return Spans(zero, zero + tokens, zero, zero, tokens)


def _randoms(op: str, layout: Callable[[torch.Generator], Spans] | None = None, centre: float = 0.0, **options: Any):
    """Random values of the tokens, rounded to ``levels``, with ``outside`` where no span is and some ``special``."""

    def make(g: torch.Generator) -> Inputs:
        spans = random_spans(g, 60) if layout is None else layout(g)
        x = _randn(g, spans.num_tokens) + centre
        if levels := options.get("levels"):
            x = (x * levels).round() / levels
        if "special" in options:
            x = torch.where(torch.rand(x.shape, generator=g) < 0.02, options["special"], x)
        if "outside" in options:
            x = torch.where(spans.token_span < 0, options["outside"], x)
        return {"x": x, "spans": spans, "op": op}

    return make


def _among_others(inputs: Inputs, g: torch.Generator):
    """The same spans with others before and after them."""
    spans, before, after = inputs["spans"].to("cpu"), random_spans(g, 7), random_spans(g, 9)
    shift, device = before.num_tokens, inputs["x"].device
    tokens = shift + spans.num_tokens
    parts = (before, 0), (spans, shift), (after, tokens)
    start, end = (torch.cat([getattr(s, name) + at for s, at in parts]) for name in ("start", "end"))
    number = torch.arange(start.shape[0])
    x = inputs["x"]
    around = [torch.rand(s.num_tokens, dtype=x.dtype).to(device) for s in (before, after)]
    wide = inputs | {
        "x": torch.cat((around[0], x, around[1])),
        "spans": Spans(start, end, number, torch.zeros_like(number), tokens + after.num_tokens).to(device),
    }

    def undo(name: str, y: Tensor) -> Tensor:
        first, count = (shift, spans.num_tokens) if name == "grad_x" else (len(before), len(spans))
        return y if y.shape[0] == count else y[first : first + count]

    return wide, undo


SPAN_REDUCE = OpSpec(
    name="span_reduce",
    family="span",
    outputs=lambda x: {"reduced": x},
    differentiable=("x",),
    typed=("x",),
    dtypes=DTYPES,
    cases=(
        *(Case(op, _randoms(op), f"{op} over random spans, some of them empty") for op in REDUCTIONS),
        *(Case(f"{op}_nan", _randoms(op, special=torch.nan), "NaN stays in its span") for op in REDUCTIONS),
        *(Case(f"{op}_outside", _randoms(op, outside=torch.nan), "tokens outside are not read") for op in REDUCTIONS),
        Case("sum_infinite", _randoms("sum", special=-torch.inf), "the log-prob of what cannot be"),
        Case("max_infinite", _randoms("max", special=-torch.inf), "-inf among others, and alone"),
        Case("min_infinite", _randoms("min", special=-torch.inf), "several -inf: the first has the gradient"),
        Case("max_ties", _randoms("max", levels=1), "equal tokens: the first has the gradient"),
        Case("min_ties", _randoms("min", levels=1), "equal tokens: the first has the gradient"),
        Case("mean_of_large", _randoms("mean", centre=10_000.0), "values near 10,000"),
        *(
            Case(f"{op}_{name}", _randoms(op, layout), why)
            for op in REDUCTIONS
            for name, layout, why in (
                ("no_spans", lambda g: no_spans(9), "S = 0"),
                ("no_tokens", lambda g: no_spans(0), "S = T = 0"),
                ("empty", lambda g: whole(0), "one span and T = 0"),
                ("one_token", lambda g: whole(1), "T = 1"),
                ("short", lambda g: random_spans(g, 60, 3), "less than a vector each"),
            )
        ),
        *(
            Case(f"{op}_{name}", _randoms(op, layout), why, large=True)
            for op in REDUCTIONS
            for name, layout, why in (
                ("many", lambda g: random_spans(g, 8000), "many threads"),
                ("long", lambda g: whole(100_001), "a span that no thread shares"),
            )
        ),
    ),
    variants=(Variant("among_other_spans", _among_others),),
    term_scale={"reduced": 1.0, "grad_x": 1.0},
)


def _spread(layout: Callable[[torch.Generator], Layout]):
    def make(g: torch.Generator) -> Inputs:
        target = layout(g)
        if isinstance(target, Spans):
            count = len(target)
        else:
            count = target.num_nodes if isinstance(target, Tree) else target.num_trajectories
        return {"values": _randn(g, count), "layout": target}

    return make


def _batch(g: torch.Generator) -> PackedBatch:
    bounds = torch.tensor([0, 4, 4, 5, 38])
    return PackedBatch(torch.arange(38), bounds, torch.zeros(38, dtype=torch.bool), torch.tensor([0, 0, 1, 1]))


SPREAD = OpSpec(
    name="spread",
    family="span",
    outputs=lambda x: {"spread": x},
    differentiable=("values",),
    typed=("values",),
    dtypes=DTYPES,
    cases=(
        Case("tree", _spread(lambda g: random_tree(g, 90)), "nodes, some of them empty"),
        Case("batch", _spread(_batch), "trajectories, one of them empty"),
        Case("spans", _spread(lambda g: random_spans(g, 60)), "spans, some of them empty, and tokens between them"),
        Case("no_spans", _spread(lambda g: no_spans(9)), "no token has a value"),
        Case("long", _spread(lambda g: regular_tree(5, 3, 500)), "many tokens a node", large=True),
        Case("many_spans", _spread(lambda g: random_spans(g, 8000)), "many threads", large=True),
        Case("empty", _spread(lambda g: chain(0)), "T = 0"),
        Case("no_tokens", _spread(lambda g: Tree(torch.tensor([-1, 0]), torch.tensor([0, 0]))), "only empty nodes"),
    ),
    term_scale={"spread": 1.0, "grad_values": 1.0},
)

SPECS = (SPAN_REDUCE, SPREAD)
