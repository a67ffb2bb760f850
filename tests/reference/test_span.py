"""The span family's reference against literal tables and plain Python loops."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch

from trajkern import Branch, Spans, Tree, reference
from trajkern.ops.span import REDUCTIONS
from trajkern.testing.span import random_spans

INF, NAN = math.inf, math.nan
# tokens 1-3, none, 4, 6-7 of 9
SPANS = Spans(
    torch.tensor([1, 4, 4, 6]), torch.tensor([4, 4, 5, 8]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 9
)
X = torch.tensor([NAN, 2.0, -1.0, 2.0, 7.0, INF, -3.0, -3.0, -INF], dtype=torch.float64)


UPSTREAM = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
LITERAL: dict[str, tuple[list[float], list[float]]] = {  # op -> the results, and the gradient for UPSTREAM
    "sum": ([3, 0, 7, -6], [0, 1, 1, 1, 3, 0, 4, 4, 0]),
    "mean": ([1, 0, 7, -3], [0, 1 / 3, 1 / 3, 1 / 3, 3, 0, 2, 2, 0]),
    "max": ([2, -INF, 7, -3], [0, 1, 0, 0, 3, 0, 4, 0, 0]),
    "min": ([-1, INF, 7, -3], [0, 0, 1, 0, 3, 0, 4, 0, 0]),
}
LOOPS: dict[str, Callable[[list[float]], float]] = {  # op -> a span's result
    "sum": math.fsum,
    "mean": lambda row: statistics.fmean(row) if row else 0.0,
    "max": lambda row: max(row, default=-INF),
    "min": lambda row: min(row, default=INF),
}


@pytest.mark.parametrize("op", REDUCTIONS)
def test_literal(op: str) -> None:
    expected, gradient = LITERAL[op]
    x = X.clone().requires_grad_()
    out = reference.span_reduce(x, SPANS, op)
    assert out.tolist() == expected
    out.backward(UPSTREAM)
    torch.testing.assert_close(x.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("op", ("max", "min"))
def test_nan_stays_in_its_span(op: str) -> None:
    x = torch.where(torch.arange(9) == 2, NAN, X).requires_grad_()
    out = reference.span_reduce(x, SPANS, op)
    assert math.isnan(out[0].item()) and out[2:].tolist() == [7, -3]
    out[0].backward()
    assert x.grad.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_spread() -> None:
    values = torch.tensor([5.0, NAN, 2.0, -1.0], requires_grad=True)
    out = reference.spread(values, SPANS)
    assert out.tolist() == [0, 5, 5, 5, 2, 0, -1, -1, 0]
    (out * torch.arange(9)).sum().backward()
    assert values.grad.tolist() == [6, 0, 4, 13]


def test_spread_over_nodes_and_of_a_branch() -> None:
    tree = Tree(torch.tensor([-1, 0, 0]), torch.tensor([2, 0, 3]))
    values = torch.arange(3.0, requires_grad=True)
    out = reference.spread(values, tree)
    assert out.tolist() == [0, 0, 2, 2, 2]
    out.sum().backward()
    assert values.grad.tolist() == [2, 0, 3]
    branch = Branch(*(torch.arange(3.0) + k for k in range(6)))
    spread = reference.spread(branch, tree)
    assert [x.tolist() for x in spread] == [[k, k, k + 2, k + 2, k + 2] for k in range(6)]


@pytest.mark.parametrize("op", REDUCTIONS)
def test_against_plain_loops(op: str) -> None:
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        spans = random_spans(g, 30, 6)
        x = torch.randn(spans.num_tokens, generator=g, dtype=torch.float64)
        rows = [x[a:b].tolist() for a, b in zip(spans.start.tolist(), spans.end.tolist(), strict=True)]
        expected = torch.tensor([LOOPS[op](row) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(reference.span_reduce(x, spans, op), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_gradients(op: str) -> None:
    g = torch.Generator().manual_seed(1)
    spans = random_spans(g, 6, 4)
    x = torch.randn(spans.num_tokens, generator=g, dtype=torch.float64, requires_grad=True)
    held = spans.lengths > 0  # an extreme of none is infinite
    assert torch.autograd.gradcheck(lambda x: reference.span_reduce(x, spans, op)[held], x)


def test_gradients_of_a_spread() -> None:
    g = torch.Generator().manual_seed(1)
    spans = random_spans(g, 6, 4)
    values = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: reference.spread(v, spans), values)
