"""The reference divergences against literal numbers, 60-digit decimal arithmetic, and numerical derivatives."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from trajkern import reference

BETAS = (0.0, 0.25, 0.5, 0.9, 1.0)
HALF, QUARTER, EIGHTH = (math.log(x) for x in (1 / 2, 1 / 4, 1 / 8))
INF = math.inf


def of_logprobs(student: list[float], teacher: list[float], **options) -> Tensor:
    """linear_divergence of heads whose logits are these: hidden states of one dimension, 1."""
    one = torch.ones(1, 1, dtype=torch.float64)
    weights = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (student, teacher))
    student_weight, teacher_weight = weights
    return reference.linear_divergence(one, student_weight, one, teacher_weight, **options)[0]


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        # student (1/2, 1/2), teacher (1/4, 3/4)
        (0.0, 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),  # KL(teacher || student)
        (1.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),  # KL(student || teacher)
        # m = (3/8, 5/8): t / m = (2/3, 6/5), s / m = (4/3, 4/5)
        (0.5, (math.log(2 / 3) + 3 * math.log(6 / 5)) / 8 + (math.log(4 / 3) + math.log(4 / 5)) / 4),
        # m = (5/16, 11/16): t / m = (4/5, 12/11), s / m = (8/5, 8/11)
        (0.75, (math.log(4 / 5) + 3 * math.log(12 / 11)) * 3 / 16 + (math.log(8 / 5) + math.log(8 / 11)) / 8),
    ],
)
def test_table(beta: float, expected: float) -> None:
    actual = of_logprobs([HALF, HALF], [QUARTER, math.log(0.75)], beta=beta)
    assert float(actual) == pytest.approx(expected, rel=1e-14)


def exact(student: list[float], teacher: list[float], beta: float, temperature: float) -> float:
    """By the definition, in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        b = Decimal(beta)

        def softmax(logits: list[float]) -> list[Decimal]:
            masses = [(Decimal(z) / Decimal(temperature)).exp() for z in logits]
            return [m / sum(masses) for m in masses]

        def kl(p: list[Decimal], q: list[Decimal]) -> Decimal:
            return sum((x * (x / y).ln() for x, y in zip(p, q, strict=True)), Decimal(0))

        s, t = softmax(student), softmax(teacher)
        if beta in (0, 1):
            return float(kl(t, s) if beta == 0 else kl(s, t))
        m = [(1 - b) * x + b * y for x, y in zip(s, t, strict=True)]
        return float(b * kl(t, m) + (1 - b) * kl(s, m))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_exact(beta: float, temperature: float) -> None:
    student, teacher = [3 * math.sin(2.7 * j) for j in range(23)], [2 * math.cos(1.3 * j) for j in range(23)]
    actual = of_logprobs(student, teacher, beta=beta, temperature=temperature)
    assert float(actual) == pytest.approx(exact(student, teacher, beta, temperature), rel=1e-13)


class TestLogits:
    """Of one side at a time: logits (0, ln 2), so that p is (1/3, 2/3), or (1/5, 4/5) at half the temperature."""

    LOG_2 = math.log(2)
    SIDES = ("", "teacher_")

    def _of(self, prefix: str, logits: list[float], shared: dict[str, float] | None = None, **options) -> float:
        """KL(teacher || student), the other one even."""
        options = {f"{prefix}{name}": value for name, value in options.items()} | (shared or {})
        pair = (logits, [0.0, 0.0]) if prefix == "" else ([0.0, 0.0], logits)
        return float(of_logprobs(*pair, **options))

    def _expected(self, prefix: str, p: float) -> float:
        one, other = ((0.5, p), (0.5, 1 - p)) if prefix == "" else ((p, 0.5), (1 - p, 0.5))
        return sum(a * math.log(a / b) for a, b in (one, other))

    @pytest.mark.parametrize("prefix", SIDES)
    def test_bias_is_scaled(self, prefix: str) -> None:
        bias = torch.tensor([0.25, self.LOG_2], dtype=torch.float64)
        actual = self._of(prefix, [-0.25, -self.LOG_2 / 2], bias=bias, logit_scale=2.0)
        assert actual == pytest.approx(self._expected(prefix, 1 / 3), rel=1e-13)

    @pytest.mark.parametrize("prefix", SIDES)
    def test_softcap_is_behind_the_scale_and_before_the_temperature(self, prefix: str) -> None:
        bent = 3 * math.atanh(self.LOG_2 / 3)  # 3 tanh(bent / 3) = ln 2
        actual = self._of(prefix, [0.0, bent / 4], {"temperature": 0.5}, softcap=3.0, logit_scale=4.0)
        assert actual == pytest.approx(self._expected(prefix, 1 / 5), rel=1e-13)

    @pytest.mark.parametrize("prefix", SIDES)
    def test_ids_from_the_vocabulary_on_are_in_no_softmax(self, prefix: str) -> None:
        """Whatever they hold, and with them however many rows the two weights have."""
        actual = self._of(prefix, [0.0, self.LOG_2, 9.0, math.nan], {"vocabulary": 2})
        assert actual == pytest.approx(self._expected(prefix, 1 / 3), rel=1e-13)

    @pytest.mark.parametrize("beta", BETAS)
    def test_a_bias_of_minus_infinity_takes_an_id_out(self, beta: float) -> None:
        student, teacher = [0.3, -1.0, 2.0, 0.0], [1.0, 0.5, -0.5, 0.2]
        out = torch.tensor([0, -INF, 0, 0], dtype=torch.float64)
        actual = of_logprobs(student, teacher, bias=out, teacher_bias=out, beta=beta)
        without = of_logprobs([student[i] for i in (0, 2, 3)], [teacher[i] for i in (0, 2, 3)], beta=beta)
        assert float(actual) == pytest.approx(float(without), rel=1e-13)

    def test_what_only_one_side_takes_out(self) -> None:
        """Student (1/2, 1/2, 0), teacher (1/3, 1/3, 1/3), and the other way round."""
        out = torch.tensor([0, 0, -INF], dtype=torch.float64)
        of = {
            beta: [of_logprobs([0.0] * 3, [0.0] * 3, beta=beta, **{s: out}) for s in ("bias", "teacher_bias")]
            for beta in (0, 1)
        }
        assert [float(x) for x in of[0]] == [INF, pytest.approx(math.log(3 / 2))]
        assert [float(x) for x in of[1]] == [pytest.approx(math.log(3 / 2)), INF]


def test_ends_of_the_mixture() -> None:
    """Divided by beta it tends to KL(teacher || student), by 1 - beta to KL(student || teacher)."""
    student, teacher = [0.0, 1.0, -2.0], [1.5, 0.0, 0.5]
    for beta, end in ((1e-6, 0.0), (1 - 1e-6, 1.0)):
        slope = of_logprobs(student, teacher, beta=beta) / min(beta, 1 - beta)
        assert float(slope) == pytest.approx(float(of_logprobs(student, teacher, beta=end)), rel=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta: float) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias, teacher, teacher_weight, teacher_bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((4, 3), (7, 3), (7,), (4, 2), (8, 2), (8,))
    )
    options = {"softcap": 1.5, "logit_scale": 1.3, "teacher_softcap": 2.0, "teacher_logit_scale": 0.8, "vocabulary": 6}
    mask = torch.tensor([True, False, True, True])

    def of(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        biases = {"bias": b, "teacher_bias": teacher_bias}
        options_ = options | biases | {"beta": beta, "temperature": 0.7, "mask": mask}
        return reference.linear_divergence(h, w, teacher, teacher_weight, **options_)

    assert torch.autograd.gradcheck(of, (hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()))


class TestTopK:
    def test_all_ids_but_one_are_the_whole(self) -> None:
        student, teacher = [0.3, -1.0, 2.0, 0.0], [1.0, 0.5, -0.5, 0.2]
        rows = [torch.log_softmax(torch.tensor(x, dtype=torch.float64), 0) for x in (student, teacher)]
        for beta in BETAS:
            actual = reference.topk_divergence(rows[0][None, :3], rows[1][None, :3], beta=beta)
            assert float(actual) == pytest.approx(float(of_logprobs(student, teacher, beta=beta)), rel=1e-12)

    def test_table(self) -> None:
        """Student (1/4, 1/4 | 1/2), teacher (1/2, 1/4 | 1/4)."""
        student, teacher = torch.tensor([[QUARTER, QUARTER]]), torch.tensor([[HALF, QUARTER]])
        actual = reference.topk_divergence(student, teacher)
        assert float(actual) == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), rel=1e-6)

    @pytest.mark.parametrize("beta", BETAS)
    def test_gradcheck(self, beta: float) -> None:
        g = torch.Generator().manual_seed(1)
        student, teacher = (
            torch.log_softmax(torch.randn(5, 9, generator=g, dtype=torch.float64), -1)[:, :4] for _ in range(2)
        )
        mask = torch.tensor([True, True, False, True, True])
        assert torch.autograd.gradcheck(
            lambda x: reference.topk_divergence(x, teacher, beta=beta, mask=mask), (student.requires_grad_(),)
        )

    @pytest.mark.parametrize("beta", BETAS)
    def test_small_tail(self, beta: float) -> None:
        """A rest of 1e-9 beside a p that float32 holds only as its logarithm."""
        student, teacher = torch.tensor([[-1e-9]]), torch.tensor([[-4e-9]])
        s, t = float(-student.double().expm1()), float(-teacher.double().expm1())
        actual = float(reference.topk_divergence(student, teacher, beta=beta))
        m = (1 - beta) * s + beta * t
        terms = {0.0: t * math.log(t / s) + s - t, 1.0: s * math.log(s / t) + t - s}
        between = beta * (t * math.log(t / m)) + (1 - beta) * (s * math.log(s / m))
        assert actual == pytest.approx(terms.get(beta, between), rel=1e-5)

    @pytest.mark.parametrize("beta", BETAS)
    def test_impossible_ids(self, beta: float) -> None:
        """Where both have p = 0 nothing is added; a p that only the other has adds its share."""
        student, teacher = torch.tensor([[QUARTER, -INF, EIGHTH]]), torch.tensor([[HALF, -INF, EIGHTH]])
        whole = reference.topk_divergence(student.requires_grad_(), teacher, beta=beta)
        possible = reference.topk_divergence(student[:, [0, 2]], teacher[:, [0, 2]], beta=beta)
        assert torch.equal(whole, possible)
        whole.sum().backward()
        assert student.grad is not None and bool(student.grad.isfinite().all()) and float(student.grad[0, 1]) == 0
