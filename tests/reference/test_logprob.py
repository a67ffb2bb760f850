"""The reference log-probs against literal numbers and against 160-digit decimal arithmetic."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from torch import Tensor

from trajkern import reference

INF = math.inf
LOG_1_TO_4 = [math.log(k) for k in (1, 2, 3, 4)]  # probabilities 0.1, 0.2, 0.3, 0.4


def exact_row(logits: list[float], target: int, temperature: float) -> dict[str, list[float]]:
    """Every statistic of one row and both gradients, by the definition, in 160 digits."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 160, -(10**8), 10**8
        scale = Decimal(temperature)
        masses = [Decimal(z) / scale for z in logits]
        masses = [Decimal(0) if z == Decimal(-INF) else z.exp() for z in masses]
        total = sum(masses)
        p = [m / total for m in masses]
        log_p = [q.ln() if q else Decimal(0) for q in p]
        entropy = -sum(q * u for q, u in zip(p, log_p, strict=True))
        return {
            "logprobs": [float(log_p[target])],
            "entropy": [float(entropy)],
            "sum_sq_probs": [float(sum(q * q for q in p))],
            "grad_logprobs": [float(((j == target) - q) / scale) for j, q in enumerate(p)],
            "grad_entropy": [float(-q * (u + entropy) / scale) for q, u in zip(p, log_p, strict=True)],
        }


def of_reference(logits: Tensor, target: int, temperature: float) -> dict[str, Tensor]:
    row = logits[None].clone().requires_grad_()
    stats = reference.token_stats(
        row, torch.tensor([target]), outputs=("entropy", "sum_sq_probs"), temperature=temperature
    )
    (grad_logprobs,) = torch.autograd.grad(stats.logprobs.sum(), row, retain_graph=True)
    (grad_entropy,) = torch.autograd.grad(stats.entropy.sum(), row)
    return {
        "logprobs": stats.logprobs.detach(),
        "entropy": stats.entropy.detach(),
        "sum_sq_probs": stats.sum_sq_probs,
        "grad_logprobs": grad_logprobs[0],
        "grad_entropy": grad_entropy[0],
    }


def margin(nats: float, others: int = 49) -> list[float]:
    return [nats] + [0.0] * others


def wavy(n: int, offset: float = 0.0) -> list[float]:
    return [offset + 3 * math.sin(2.7 * j) for j in range(n)]


ROWS = {  # id -> (logits, target, temperature)
    "four_tokens": (LOG_1_TO_4, 2, 1.0),
    "wavy": (wavy(97), 5, 1.0),
    "two_tokens": ([0.25, -1.5], 1, 1.0),
    "margin_17": (margin(17.0), 0, 1.0),
    "margin_40": (margin(40.0), 0, 1.0),
    "margin_40_against": (margin(40.0), 7, 1.0),
    "margin_300": (margin(300.0), 0, 1.0),
    "uniform": ([0.0] * 64, 3, 1.0),
    "offset_1e4": (wavy(50, 1e4), 11, 1.0),
    "all_near_minus_1e4": (wavy(50, -1e4), 11, 1.0),
    "cold": (wavy(31), 4, 0.125),
    "hot": (wavy(31), 4, 7.5),
    "offset_and_temperature": (wavy(50, 1e4), 11, 0.7),
    "banned_tokens": ([-INF, 1.0, -INF, 0.5, 2.0], 3, 1.0),
    "only_the_target_left": ([-INF, 1.0, -INF], 1, 1.0),
}


@pytest.mark.parametrize(("logits", "target", "temperature"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_exact(logits: list[float], target: int, temperature: float, dtype: torch.dtype) -> None:
    """log p and its gradient to their own relative precision; the rest to that of numbers of order 1."""
    row = torch.tensor(logits, dtype=torch.float64).to(dtype)
    expected = exact_row(row.tolist(), target, temperature)
    eps = torch.finfo(dtype).eps
    for name, actual in of_reference(row, target, temperature).items():
        want = torch.tensor(expected[name], dtype=dtype)
        absolute = 0.0 if name in ("logprobs", "grad_logprobs") else 60 * eps
        # exp turns an absolute error of the exponent (at most 40 roundings here) into a relative one
        torch.testing.assert_close(actual, want, rtol=200 * eps, atol=absolute, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [1.0, 1e4], ids=["plain", "near_the_limit_of_fp16"])
def test_narrow_logits_are_read_exactly(dtype: torch.dtype, scale: float) -> None:
    row = (torch.tensor(wavy(40), dtype=torch.float64) * scale).to(dtype)
    expected = exact_row(row.tolist(), 8, 1.0)
    stats = reference.token_stats(row[None], torch.tensor([8]))
    assert stats.logprobs.dtype == stats.entropy.dtype == torch.float32
    torch.testing.assert_close(stats.logprobs, torch.tensor(expected["logprobs"]), rtol=2e-6, atol=0)
    torch.testing.assert_close(stats.entropy, torch.tensor(expected["entropy"]), rtol=2e-6, atol=2e-6)


class TestLiterals:
    def test_four_tokens(self) -> None:
        logits = torch.tensor([LOG_1_TO_4] * 4, dtype=torch.float64)
        stats = reference.token_stats(logits, torch.arange(4), outputs=("entropy", "sum_sq_probs", "is_top1"))
        expected = [-2.302585092994046, -1.6094379124341003, -1.2039728043259361, -0.9162907318741551]
        assert stats.logprobs.tolist() == pytest.approx(expected, rel=1e-15)
        assert stats.entropy.tolist() == pytest.approx([1.2798542258336676] * 4, rel=1e-15)
        assert stats.sum_sq_probs.tolist() == pytest.approx([0.3] * 4, rel=1e-15)
        assert stats.is_top1.tolist() == [False, False, False, True]

    def test_gradient_of_four_tokens(self) -> None:
        logits = torch.tensor([LOG_1_TO_4], dtype=torch.float64, requires_grad=True)
        reference.token_logprobs(logits, torch.tensor([2]), temperature=2.0).backward()
        roots = [1, math.sqrt(2), math.sqrt(3), 2]  # temperature 2: square roots of the masses
        expected = [((j == 2) - x / sum(roots)) / 2 for j, x in enumerate(roots)]
        assert logits.grad[0].tolist() == pytest.approx(expected, rel=1e-14)

    def test_margin_of_40_nats_in_float32(self) -> None:
        """log p = -log(1 + 49 e^-40) = -2.0817...e-16, where 1 - p is 0 in float32."""
        logits = torch.tensor([margin(40.0)], requires_grad=True)
        logprob = reference.token_logprobs(logits, torch.tensor([0]))
        logprob.backward()
        assert logprob.item() == pytest.approx(-49 * math.exp(-40), rel=1e-6)
        assert logits.grad[0, 0].item() == pytest.approx(49 * math.exp(-40), rel=1e-6)
        assert logits.grad[0, 1].item() == pytest.approx(-math.exp(-40), rel=1e-6)

    def test_one_token_vocabulary_is_certain(self) -> None:
        logits = torch.tensor([[3.0], [-1e4]], requires_grad=True)
        stats = reference.token_stats(logits, torch.tensor([0, 0]), outputs=("entropy", "sum_sq_probs", "is_top1"))
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
        assert stats.logprobs.tolist() == [0, 0] and stats.entropy.tolist() == [0, 0]
        assert stats.sum_sq_probs.tolist() == [1, 1] and stats.is_top1.tolist() == [True, True]
        assert logits.grad.tolist() == [[0], [0]]

    @pytest.mark.parametrize("vocabulary", [2, 3, 1000, 50257])
    def test_uniform(self, vocabulary: int) -> None:
        stats = reference.token_stats(
            torch.full((1, vocabulary), -3.5, dtype=torch.float64),
            torch.tensor([1]),
            outputs=("entropy", "sum_sq_probs", "is_top1"),
        )
        assert stats.logprobs.item() == pytest.approx(-math.log(vocabulary), rel=1e-13)
        assert stats.entropy.item() == pytest.approx(math.log(vocabulary), rel=1e-13)
        assert stats.sum_sq_probs.item() == pytest.approx(1 / vocabulary, rel=1e-13)
        assert stats.is_top1.item(), "a tie counts"

    def test_banned_target_is_impossible(self) -> None:
        logits = torch.tensor([[0.0, -INF, 0.0]], dtype=torch.float64)
        stats = reference.token_stats(logits, torch.tensor([1]), outputs=("entropy", "is_top1"))
        assert stats.logprobs.item() == -INF and not stats.is_top1.item()
        assert stats.entropy.item() == pytest.approx(math.log(2))

    @pytest.mark.parametrize("offset", [1e4, -1e4, 0.0])
    def test_common_offset_changes_nothing(self, offset: float) -> None:
        """Offsets and logits on a grid of 1/64, so that adding them rounds nowhere."""
        base = torch.tensor([[round(z * 64) / 64 for z in wavy(80)]])
        targets = torch.tensor([17])
        plain, moved = (reference.token_stats(z, targets) for z in (base, base + offset))
        torch.testing.assert_close(moved.logprobs, plain.logprobs, rtol=1e-6, atol=0)
        torch.testing.assert_close(moved.entropy, plain.entropy, rtol=1e-6, atol=0)


class TestArguments:
    def _logits(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3

    def test_leading_shape_and_temperature_per_token(self) -> None:
        logits, targets = self._logits(2, 3, 11), torch.tensor([[0, 10, 4], [7, 7, 1]])
        temperature = torch.tensor([[0.5, 1.0, 2.0], [0.25, 4.0, 1.5]], dtype=torch.float64)
        stats = reference.token_stats(logits, targets, temperature=temperature)
        for i in range(2):
            for j in range(3):
                row = exact_row(logits[i, j].tolist(), int(targets[i, j]), float(temperature[i, j]))
                assert stats.logprobs[i, j].item() == pytest.approx(row["logprobs"][0], rel=1e-13)
                assert stats.entropy[i, j].item() == pytest.approx(row["entropy"][0], rel=1e-13)

    def test_masked_rows_are_zero_whatever_stands_there(self) -> None:
        logits, targets = self._logits(4, 9), torch.tensor([2, -100, 5, 9])
        logits[1], logits[3] = math.nan, INF
        mask = torch.tensor([True, False, True, False])
        alone = reference.token_stats(logits[::2], targets[::2], outputs=("entropy", "sum_sq_probs", "is_top1"))
        logits.requires_grad_()
        stats = reference.token_stats(logits, targets, mask=mask, outputs=("entropy", "sum_sq_probs", "is_top1"))
        for whole, scored in zip(stats[:4], alone[:4], strict=True):
            assert torch.equal(whole[mask], scored) and whole[~mask].tolist() == [0, 0]
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
        assert logits.grad[~mask].eq(0).all() and logits.grad[mask].ne(0).all()

    @pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
    def test_no_rows(self, shape: tuple[int, ...]) -> None:
        logits = torch.empty(shape, requires_grad=True)
        stats = reference.token_stats(logits, torch.empty(shape[:-1], dtype=torch.int64))
        (stats.logprobs.sum() + stats.entropy.sum()).backward()
        assert stats.logprobs.shape == stats.entropy.shape == shape[:-1] and logits.grad.shape == shape

    def test_only_what_is_asked_for(self) -> None:
        logits, targets = self._logits(3, 5), torch.tensor([0, 1, 2], dtype=torch.int32)
        asked = reference.token_stats(logits, targets, outputs=("is_top1",))
        assert asked.entropy is None and asked.sum_sq_probs is None and asked.is_top1.dtype == torch.bool
        assert torch.equal(asked.logprobs, reference.token_logprobs(logits, targets))

    def test_what_has_a_gradient(self) -> None:
        stats = reference.token_stats(
            self._logits(3, 5).requires_grad_(), torch.tensor([0, 1, 2]), outputs=("entropy", "sum_sq_probs")
        )
        assert stats.logprobs.requires_grad and stats.entropy.requires_grad
        assert not stats.sum_sq_probs.requires_grad

    @pytest.mark.parametrize("temperature", [1.0, 0.6, "per_token"], ids=str)
    @pytest.mark.parametrize("masked", [False, True], ids=["all_scored", "masked"])
    def test_gradcheck(self, temperature: float | str, masked: bool) -> None:
        targets = torch.tensor([0, 4, 3, 2])
        if temperature == "per_token":
            temperature = torch.tensor([0.5, 1.0, 3.0, 0.8], dtype=torch.float64)
        mask = torch.tensor([True, False, True, True]) if masked else None

        def function(logits: Tensor) -> tuple[Tensor, Tensor]:
            return reference.token_stats(logits, targets, temperature=temperature, mask=mask)[:2]

        assert torch.autograd.gradcheck(function, (self._logits(4, 5).requires_grad_(),))

    def test_gradcheck_of_certain_and_banned_tokens(self) -> None:
        row = torch.tensor([[12.0, 0.0, -INF, 1.0], [-INF, 0.3, -INF, -0.4]], dtype=torch.float64)
        allowed = row.isfinite()

        def function(free: Tensor) -> tuple[Tensor, Tensor]:
            logits = row.masked_scatter(allowed, free)
            return reference.token_stats(logits, torch.tensor([0, 3]))[:2]

        assert torch.autograd.gradcheck(function, (row[allowed].requires_grad_(),), atol=1e-8)
