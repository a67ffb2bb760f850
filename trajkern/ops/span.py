"""Reductions over spans of tokens, and the way back: every token its span's, its trajectory's or its node's value.

Over the n tokens t of one span:

    sum = sum x_t      mean = sum / max(n, 1)      max, min

A sum is formed in float64, in an order that depends on n alone.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import check_choice, check_shape, check_tensor, laid_out
from trajkern._dtypes import FLOATS, accumulator
from trajkern._results import Branch
from trajkern.layouts.batch import PackedBatch
from trajkern.layouts.spans import Spans
from trajkern.layouts.tree import Tree
from trajkern.ops._autograd import applied, differentiable_once, keep, kept
from trajkern.ops._library import define, recorded

# What a token has of its span's gradient: all of it, a length-th of it, all or nothing as a kernel chooses one token by
# x, or what a kernel makes of x.
Gradient = Literal["all", "share", "chosen", "kernel"]
GRADIENTS: dict[str, Gradient] = {"sum": "all", "mean": "share", "max": "chosen", "min": "chosen"}
REDUCTIONS = tuple(GRADIENTS)
SPREAD = ("all", "share")  # no kernel reads x
LINEAR = (*SPREAD, "chosen")  # no small change of x changes it
Values = TypeVar("Values", Tensor, Branch)

_span_reduce = define(
    "span",
    "span_reduce(Tensor x, Tensor start, Tensor end, int op) -> Tensor",
    lambda x, start, end, op: x.new_empty(start.shape[0]),
)
_span_reduce_backward = define(
    "span",
    "span_reduce_backward(Tensor grad_out, Tensor x, Tensor reduced, Tensor start, Tensor end, int op) -> Tensor",
    lambda grad_out, x, *_: torch.empty_like(x),
)
_spread = define(
    "span",
    "spread(Tensor values, Tensor start, Tensor end, SymInt tokens) -> Tensor",
    lambda values, start, end, tokens: values.new_empty(tokens),
)


class SpanReduce(torch.autograd.Function):
    """``apply(x, start, end, op)``: op's name; x is contiguous, start and end int64."""

    @staticmethod
    def forward(ctx: Any, x, start, end, op):
        out = _span_reduce(x, start, end, REDUCTIONS.index(op))
        keep(ctx, start, end, *(() if GRADIENTS[op] in SPREAD else (x, out)))
        ctx.op, ctx.tokens = op, x.shape[0]
        return out

    @staticmethod
    @differentiable_once("span_reduce", linear=lambda ctx: GRADIENTS[ctx.op] in LINEAR)
    def backward(ctx: Any, grad):
        start, end, *read = kept(ctx)
        if GRADIENTS[ctx.op] not in SPREAD:
            place = REDUCTIONS.index(ctx.op)
            return _span_reduce_backward(grad.contiguous(), *read, start, end, place), None, None, None
        if GRADIENTS[ctx.op] == "share":
            grad = grad / (end - start).clamp_min(1)
        return _spread(grad.contiguous(), start, end, ctx.tokens), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values, start, end, tokens):
        keep(ctx, start, end)
        return _spread(values, start, end, tokens)

    @staticmethod
    @differentiable_once("spread", linear=True)
    def backward(ctx: Any, grad):
        return _span_reduce(grad.contiguous(), *kept(ctx), REDUCTIONS.index("sum")), None, None, None


def _accumulated(x: Tensor) -> Tensor:
    return laid_out(x, accumulator(x))


@recorded
def span_reduce(
    x: Tensor,  # [T]
    spans: Spans,
    op: str = "mean",
) -> Tensor:
    """Reduce the tokens of every span.

    Args:
        x: float ``[T]``, read inside the spans only.
        spans: S ranges of tokens.
        op: "sum", "mean", "max" or "min". An empty span has sum and mean 0, max -inf and min inf.

    Returns:
        ``[S]`` float32 (float64 for float64), differentiable once; the gradient of an extreme goes to the first of
        equal tokens. A NaN in a span makes all of its results NaN, and has the gradient of an extreme.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    if not isinstance(spans, Spans):
        raise TypeError(f"spans must be a Spans, got {type(spans).__name__}")
    check_tensor("x", x, dtypes=FLOATS, ndim=1, device=spans.device)
    check_shape("x", x, (spans.num_tokens,), "one value a token")
    op = check_choice("op", op, REDUCTIONS)
    if _backends.wants_reference("span", x):
        return _backends.reference().span_reduce(x, spans, op)
    return applied(SpanReduce, _accumulated(x), *_ranges(spans), op)


@recorded
def spread(
    values: Values,  # [S], [N] or [M]
    layout: Spans | PackedBatch | Tree,
) -> Values:
    """Give every token its span's, its trajectory's or its node's value; 0 outside every span.

    Args:
        values: float ``[S]`` for :class:`Spans`, ``[N]`` for a :class:`PackedBatch`, ``[M]`` for a :class:`Tree`; or a
            whole :class:`Branch`.
        layout: whose tokens.

    Returns:
        ``[T]`` float32 (float64 for float64), differentiable once, the gradient being each range's sum; a
        :class:`Branch` of them for a branch.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    if isinstance(values, Branch):
        return Branch(*(spread(x, layout) for x in values))  # type: ignore[arg-type]
    if isinstance(layout, Spans):
        count, what = len(layout), "one value a span"
    elif isinstance(layout, Tree):
        count, what = layout.num_nodes, "one value a node"
    elif isinstance(layout, PackedBatch):
        count, what = layout.num_trajectories, "one value a trajectory"
    else:
        raise TypeError(f"layout must be a Spans, a PackedBatch or a Tree, got {type(layout).__name__}")
    check_tensor("values", values, dtypes=FLOATS, ndim=1, device=layout.device)
    check_shape("values", values, (count,), what)
    if _backends.wants_reference("span", values):
        return _backends.reference().spread(values, layout)
    return applied(_Spread, _accumulated(values), *_ranges(layout), layout.num_tokens)


def _ranges(layout: Spans | PackedBatch | Tree) -> tuple[Tensor, Tensor]:
    """(start, end) of each of the layout's ranges, int64."""
    if isinstance(layout, Spans):
        start, end = layout.ranges
        return laid_out(start, torch.int64), laid_out(end, torch.int64)
    offsets = laid_out(layout.bounds, torch.int64)
    return offsets[:-1], offsets[1:]
