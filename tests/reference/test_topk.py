"""The reference's likeliest tokens against literal numbers, 60-digit decimal arithmetic, and numerical derivatives."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from trajkern import reference
from trajkern._results import TopK

INF = math.inf


def of_logits(logits: list[float], k: int, **options: Any) -> TopK:
    """Of one row whose logits are these: a hidden state of one dimension, 1."""
    weight = torch.tensor(logits, dtype=torch.float64)[:, None]
    return reference.linear_topk(torch.ones(1, 1, dtype=torch.float64), weight, k, **options)


def exact(logits: list[float], k: int, temperature: float = 1.0) -> tuple[list[float], list[int], float]:
    """By the definition, in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        masses = [(Decimal(z) / Decimal(temperature)).exp() for z in logits]
        total = sum(masses)
        ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:k]
        rest = sum((m for i, m in enumerate(masses) if i not in ids), Decimal(0))
        tail = float((rest / total).ln()) if rest else -INF
        return [float((masses[i] / total).ln()) for i in ids], ids, tail


def log(*p: float) -> list[float]:
    return [math.log(x) for x in p]


def test_table() -> None:
    """p = (1/8, 1/2, 1/16, 1/4, 1/16)."""
    found = of_logits(log(1 / 8, 1 / 2, 1 / 16, 1 / 4, 1 / 16), 2, targets=torch.tensor([[3, 2, 2]]))
    assert found.ids.tolist() == [[1, 3]]
    assert found.logprobs[0].tolist() == pytest.approx(log(1 / 2, 1 / 4), rel=1e-14)
    assert float(found.tail) == pytest.approx(math.log(1 / 4), rel=1e-14)
    assert found.target_logprobs is not None
    assert found.target_logprobs[0].tolist() == pytest.approx(log(1 / 4, 1 / 16, 1 / 16), rel=1e-14)


def test_of_equal_tokens_the_lower_id_goes_first() -> None:
    found = of_logits([0.0, 1.0, -2.0, 1.0, 0.0, 0.0, 1.0], 5)
    assert found.ids.tolist() == [[1, 3, 6, 0, 4]]


def test_all_tokens_leave_no_tail() -> None:
    found = of_logits(log(1 / 4, 3 / 4), 2)
    assert found.ids.tolist() == [[1, 0]] and found.tail.tolist() == [-INF]
    assert found.logprobs[0].tolist() == pytest.approx(log(3 / 4, 1 / 4), rel=1e-14)


@pytest.mark.parametrize("k", [1, 4, 22])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_exact(k: int, temperature: float) -> None:
    logits = [3 * math.sin(2.7 * j) for j in range(23)]
    found, (logprobs, ids, tail) = of_logits(logits, k, temperature=temperature), exact(logits, k, temperature)
    assert found.ids[0].tolist() == ids
    assert found.logprobs[0].tolist() == pytest.approx(logprobs, rel=1e-13)
    assert float(found.tail) == pytest.approx(tail, rel=1e-13)


@pytest.mark.parametrize("margin", [40.0, 800.0])
def test_a_tiny_tail_keeps_its_precision(margin: float) -> None:
    """1 - sum p is 0 in float64: of two tokens with all the mass, and of one."""
    logits = [margin, 0.0, margin + 0.5, 0.25, -1.0]
    for k in (2, 3):
        assert float(of_logits(logits, k).tail) == pytest.approx(exact(logits, k)[2], rel=1e-13)
    alone = [margin, 0.0, -1.0]
    assert float(of_logits(alone, 1).tail) == pytest.approx(exact(alone, 1)[2], rel=1e-13)


def test_a_tail_near_0_keeps_its_precision() -> None:
    """One of 4096 equal tokens: log(1 - p), which is nearly -p."""
    logits = [0.0] * 4096
    assert float(of_logits(logits, 1).tail) == pytest.approx(math.log1p(-1 / 4096), rel=1e-12)


class TestLogits:
    """Logits (0, ln 2), so that p is (1/3, 2/3), or (1/5, 4/5) at half the temperature."""

    LOG_2 = math.log(2)

    def test_bias_is_scaled(self) -> None:
        bias = torch.tensor([0.25, self.LOG_2], dtype=torch.float64)
        found = of_logits([-0.25, -self.LOG_2 / 2], 1, bias=bias, logit_scale=2.0)
        assert found.ids.tolist() == [[1]] and float(found.logprobs) == pytest.approx(math.log(2 / 3), rel=1e-13)

    def test_softcap_is_behind_the_scale_and_before_the_temperature(self) -> None:
        bent = 3 * math.atanh(self.LOG_2 / 3)  # 3 tanh(bent / 3) = ln 2
        found = of_logits([0.0, bent / 4], 1, softcap=3.0, logit_scale=4.0, temperature=0.5)
        assert float(found.logprobs) == pytest.approx(math.log(4 / 5), rel=1e-13)
        assert float(found.tail) == pytest.approx(math.log(1 / 5), rel=1e-13)

    def test_temperatures_of_rows(self) -> None:
        hidden, weight = torch.ones(2, 1).double(), torch.tensor([[0.0], [self.LOG_2]]).double()
        rows = torch.tensor([1, 0, 1])
        found = reference.linear_topk(hidden, weight, 1, temperature=torch.tensor([1.0, 0.5]), rows=rows)
        assert found.logprobs[:, 0].exp().tolist() == pytest.approx([4 / 5, 2 / 3, 4 / 5], rel=1e-7)

    def test_a_bias_of_minus_infinity_takes_an_id_out(self) -> None:
        """It comes after all others, in the order of ids, and is no part of the tail."""
        bias = torch.tensor([0, -INF, 0, -INF], dtype=torch.float64)
        found = of_logits([self.LOG_2, 9.0, 0.0, 9.0], 3, bias=bias)
        assert found.ids.tolist() == [[0, 2, 1]] and found.tail.tolist() == [-INF]
        assert found.logprobs[0].exp().tolist() == pytest.approx([2 / 3, 1 / 3, 0], rel=1e-13)


def test_mask_and_rows() -> None:
    """What is masked is 0 and not read; a row may be asked twice, and another not at all."""
    hidden = torch.tensor([[1.0], [math.nan], [-1.0]], dtype=torch.float64)
    weight = torch.tensor(log(1 / 2, 1 / 4, 1 / 4), dtype=torch.float64)[:, None]
    rows, mask = torch.tensor([2, -9, 0, 2]), torch.tensor([True, False, True, True])
    targets = torch.tensor([0, -100, 0, 2])
    found = reference.linear_topk(hidden, weight, 2, rows=rows, mask=mask, targets=targets)
    assert found.ids.tolist() == [[1, 2], [0, 0], [0, 1], [1, 2]]  # of the negative state 2, 4, 4 in tenths
    assert found.logprobs.exp().flatten().tolist() == pytest.approx([0.4, 0.4, 1, 1, 0.5, 0.25, 0.4, 0.4], rel=1e-13)
    assert found.tail.exp().tolist() == pytest.approx([0.2, 1, 0.25, 0.2], rel=1e-13)
    assert found.target_logprobs is not None
    assert found.target_logprobs.exp().tolist() == pytest.approx([0.2, 1, 0.5, 0.4], rel=1e-13)


def test_infinite_and_undefined_logits_make_their_row_undefined() -> None:
    for z in (INF, math.nan):
        found = of_logits([0.0, z, 1.0], 2, targets=torch.tensor([0]))
        assert found.target_logprobs is not None
        assert all(bool(x.isnan().all()) for x in (found.logprobs, found.tail, found.target_logprobs))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_gradcheck(k: int) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((5, 3), (9, 3), (9,))
    leaves = [torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_() for shape in shapes]
    options: dict[str, Any] = {"softcap": 2.5, "logit_scale": 1.3, "temperature": 0.7}
    options |= {"mask": torch.tensor([True, False, True, True]), "rows": torch.tensor([0, 4, 2, 0])}
    options["targets"] = torch.randint(9, (4, 2), generator=g)

    def of(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        found = reference.linear_topk(h, w, k, bias=b, **options)
        assert found.target_logprobs is not None
        return found.logprobs, found.tail, found.target_logprobs

    assert torch.autograd.gradcheck(of, tuple(leaves))


def test_gradient_of_a_tail() -> None:
    """p = (1/2, 1/4, 1/8, 1/8), k = 2: q - p at the others, q = (1/2, 1/2), and -p at the k."""
    logits = torch.tensor(log(1 / 2, 1 / 4, 1 / 8, 1 / 8), dtype=torch.float64)[:, None].requires_grad_()
    reference.linear_topk(torch.ones(1, 1, dtype=torch.float64), logits, 2).tail.sum().backward()
    assert logits.grad is not None
    assert logits.grad[:, 0].tolist() == pytest.approx([-1 / 2, -1 / 4, 3 / 8, 3 / 8], rel=1e-13)


def test_no_tail_has_no_gradient() -> None:
    logits = torch.tensor([[0.5], [0.25]], dtype=torch.float64, requires_grad=True)
    reference.linear_topk(torch.ones(1, 1, dtype=torch.float64), logits, 2).tail.sum().backward()
    assert logits.grad is not None and logits.grad.tolist() == [[0], [0]]


def test_a_tail_of_one_token_has_its_gradient() -> None:
    """d log p(3) / dz of z = (0, 1, 2, -1): -p, and 1 more at the token left out."""
    z = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    weight = torch.eye(4, dtype=torch.float64)
    hidden = z[None].clone().requires_grad_()
    reference.linear_topk(hidden, weight, 3).tail.sum().backward()
    p = [math.exp(x) / sum(map(math.exp, z.tolist())) for x in z.tolist()]
    expected = [-p[0], -p[1], -p[2], 1 - p[3]]
    assert hidden.grad[0].tolist() == pytest.approx(expected, rel=1e-13)
