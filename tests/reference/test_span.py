"""The span family's reference against literal tables and plain Python loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trajkern import Branch, Spans, Tree, reference
from trajkern.testing.span import random_spans

INF, NAN = math.inf, math.nan
# tokens 1-3, none, 4, 6-7 of 9
SPANS = Spans(
    torch.tensor([1, 4, 4, 6]), torch.tensor([4, 4, 5, 8]), torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 9
)
X = torch.tensor([NAN, 2.0, -1.0, 2.0, 7.0, INF, -3.0, -3.0, -INF], dtype=torch.float64)


@pytest.mark.parametrize(
    ("op", "expected", "gradient"),
    (
        ("sum", [3, 0, 7, -6], [0, 1, 1, 1, 3, 0, 4, 4, 0]),
        ("mean", [1, 0, 7, -3], [0, 1 / 3, 1 / 3, 1 / 3, 3, 0, 2, 2, 0]),
        ("max", [2, -INF, 7, -3], [0, 1, 0, 0, 3, 0, 4, 0, 0]),
        ("min", [-1, INF, 7, -3], [0, 0, 1, 0, 3, 0, 4, 0, 0]),
    ),
)
def test_literal(op: str, expected: list[float], gradient: list[float]) -> None:
    x = X.clone().requires_grad_()
    out = reference.span_reduce(x, SPANS, op)
    assert out.tolist() == expected
    out.backward(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
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


def _loop(x: Tensor, spans: Spans, op: str) -> list[float]:
    rows = [x[a:b].tolist() for a, b in zip(spans.start.tolist(), spans.end.tolist(), strict=True)]
    if op in ("max", "min"):
        empty = -INF if op == "max" else INF
        return [(max if op == "max" else min)(row, default=empty) for row in rows]
    return [math.fsum(row) / (max(len(row), 1) if op == "mean" else 1) for row in rows]


@pytest.mark.parametrize("op", ("sum", "mean", "max", "min"))
def test_against_plain_loops(op: str) -> None:
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        spans = random_spans(g, 30, 6)
        x = torch.randn(spans.num_tokens, generator=g, dtype=torch.float64)
        expected = torch.tensor(_loop(x, spans, op), dtype=torch.float64)
        torch.testing.assert_close(reference.span_reduce(x, spans, op), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("op", ("sum", "mean"))
def test_gradients(op: str) -> None:
    spans = random_spans(torch.Generator().manual_seed(1), 6, 4)
    x = torch.randn(spans.num_tokens, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference.span_reduce(x, spans, op), x)
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: reference.spread(v, spans), values)
