"""What the registry does not reach: rows with impossible tokens, precision, frozen parts, and stored log-probs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern import reference
from trajkern._native import divergence

BETAS = (0.0, 0.3, 1.0)
INF = math.inf


def _heads(tokens: int = 12, vocabulary: int = 70) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    shapes = ((tokens, 16), (vocabulary, 16), (tokens, 5), (vocabulary, 5))
    hidden, weight, *teacher = (torch.randn(shape, generator=g) for shape in shapes)
    return hidden.requires_grad_(), (weight / 4).detach().requires_grad_(), *teacher


def _rows(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The CPU's kernels on logits [R, V]: the divergence, and its gradient in the student's."""
    rows = student.shape[0]
    scale, saved = torch.ones(rows, dtype=torch.float64), torch.empty(rows, 6, dtype=torch.float64)
    values, grad = student.new_empty(rows), student.clone()
    divergence.rows(student, teacher, scale, beta, values, saved)
    divergence.gradient(grad, grad, teacher, scale, beta, saved, torch.ones_like(values), 0, 0.0, 1.0, None)
    return values, grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", BETAS)
def test_impossible_tokens(beta: float, dtype: torch.dtype) -> None:
    """A token that neither can sample changes nothing; one that only the divergence's second cannot, adds its share."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 101, generator=g, dtype=dtype).unbind()
    student[:, 50:60] = teacher[:, 50:60] = -INF
    if beta < 1:
        teacher[:, 60:70] = -INF
    if beta > 0:
        student[:, 70:80] = -INF
    values, grad = _rows(student, teacher, beta)
    z = student.double().requires_grad_()
    expected = reference.divergence._divergence(z.log_softmax(-1), teacher.double().log_softmax(-1), beta)
    expected.sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), z.grad, rtol=1e-5, atol=1e-7)
    assert bool((grad[:, 50:60] == 0).all())


def test_what_the_student_cannot_sample_is_infinitely_far() -> None:
    student, teacher = torch.zeros(2, 40), torch.zeros(2, 40)
    student[1, 3] = -INF
    values, grad = _rows(student, teacher, 0.0)
    assert values.tolist() == [0, INF] and bool(grad.isfinite().all())


@pytest.mark.parametrize("beta", BETAS)
def test_small_divergences_keep_their_precision(beta: float) -> None:
    """Logits that differ by 2^-10: the divergence, of 1e-7, is right to the rounding of d."""
    g = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5000, generator=g)
    teacher = student + torch.randn(3, 5000, generator=g).sign() * 2**-10
    values, _ = _rows(student, teacher, beta)
    expected = reference.divergence._divergence(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1), beta
    )
    torch.testing.assert_close(values.double(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_gradient_where_a_token_is_certain(beta: float) -> None:
    """d z of the student's token is -sum of the others', which 1 - p alone would round to 0."""
    student, teacher = torch.zeros(1, 50), torch.zeros(1, 50)
    student[0, 7], teacher[0, 7] = 40.0, 17.0
    _, grad = _rows(student, teacher, beta)
    others = grad.double().sum() - grad[0, 7]
    assert float(grad[0, 7]) == pytest.approx(-float(others), rel=1e-5) and float(grad[0, 7]) != 0


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_part(frozen: str) -> None:
    """It has no gradient, and changes nobody else's."""
    grads = []
    for needed in (True, False):
        hidden, weight, *teacher = _heads()
        leaves = {"hidden": hidden, "weight": weight, "bias": torch.linspace(-1, 1, 70, requires_grad=True)}
        leaves[frozen].requires_grad_(needed)
        tk.linear_divergence(**leaves, teacher_hidden=teacher[0], teacher_weight=teacher[1], beta=0.5).sum().backward()
        grads.append({name: x.grad for name, x in leaves.items()})
    every, some = grads
    assert some.pop(frozen) is None
    assert all(torch.equal(every[name], x) for name, x in some.items())


@pytest.mark.parametrize("beta", BETAS)
def test_the_rest_of_a_weight_is_cut_off(beta: float) -> None:
    """Of both, however many rows they have: the bits of the weights cut before, and a gradient of 0 behind."""
    hidden, weight, teacher_hidden, teacher_weight = _heads()
    bias, more = torch.linspace(-1, 1, 70), torch.full((9, 5), 100.0)
    outcomes = []
    for cut in (None, 61):
        leaves = [x.detach()[:61].clone() if cut is None else x.detach().clone() for x in (weight, bias)]
        leaves = [hidden.detach().clone(), *leaves]
        for x in leaves:
            x.requires_grad_()
        of_teacher = teacher_weight[:61] if cut is None else torch.cat((teacher_weight, more))
        values = tk.linear_divergence(
            *leaves[:2], teacher_hidden, of_teacher, bias=leaves[2], vocabulary=cut, beta=beta
        )
        outcomes.append([values.detach(), *torch.autograd.grad(values.sum(), leaves)])
    before, within = outcomes
    assert all(torch.equal(x, y[: len(x)]) for x, y in zip(before, within, strict=True))
    assert not any(bool(y[len(x) :].any()) for x, y in zip(before, within, strict=True))


def test_the_teacher_has_no_gradient() -> None:
    hidden, weight, teacher_hidden, teacher_weight = _heads()
    teacher = [x.requires_grad_() for x in (teacher_hidden, teacher_weight, torch.zeros(70))]
    tk.linear_divergence(hidden, weight, *teacher[:2], teacher_bias=teacher[2]).sum().backward()
    assert hidden.grad is not None and [x.grad for x in teacher] == [None] * 3


@pytest.mark.parametrize("softcap", [1e-15, 1e30])
def test_softcaps_whose_squares_float32_cannot_hold(softcap: float) -> None:
    leaves, options = _heads(), {"softcap": softcap, "logit_scale": softcap if softcap < 1 else 1.0}
    (actual,) = torch.autograd.grad(tk.linear_divergence(*leaves, **options).sum(), leaves[1])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    (expected,) = torch.autograd.grad(reference.linear_divergence(*exact, **options).sum(), exact[1])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_tokens_without_upstream_need_no_gradient() -> None:
    hidden, weight, *teacher = _heads()
    (tk.linear_divergence(hidden, weight, *teacher)[:3] * 2).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert bool((hidden.grad[3:] == 0).all()) and bool((hidden.grad[:3] != 0).all())


def test_teacher_of_another_dtype() -> None:
    hidden, weight, *teacher = _heads()
    narrow = [x.bfloat16() for x in teacher]
    actual = tk.linear_divergence(hidden, weight, *narrow)
    expected = tk.linear_divergence(hidden, weight, *(x.float() for x in narrow))
    assert torch.equal(actual, expected)


def test_same_bits_for_any_number_of_threads() -> None:
    outcomes = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        student, teacher = (x.detach() @ y.detach().t() for x, y in zip(*[iter(_heads(20, 30000))] * 2, strict=True))
        outcomes.append(torch.cat([x.flatten() for x in _rows(student, teacher, 0.3)]))
    torch.set_num_threads(before)
    assert torch.equal(*outcomes)


class TestTopK:
    def test_from_the_heads(self) -> None:
        """The student's log-probs at the teacher's ids, several targets a row; gradients reach the head."""
        hidden, weight, teacher_hidden, teacher_weight = _heads()
        ids = (teacher_hidden @ teacher_weight.t()).topk(69, largest=False).indices  # the tail is the likeliest id
        rows = torch.arange(12).repeat_interleave(69)
        stored = tk.linear_logprobs(teacher_hidden, teacher_weight, ids.flatten(), rows=rows).view(12, 69)
        for beta in BETAS:
            grads = []
            for whole in (True, False):
                if whole:
                    values = tk.linear_divergence(hidden, weight, teacher_hidden, teacher_weight, beta=beta)
                else:
                    now = tk.linear_logprobs(hidden, weight, ids.flatten(), rows=rows).view(12, 69)
                    values = tk.topk_divergence(now, stored, beta=beta)
                grads.append((values.detach(), *torch.autograd.grad(values.sum(), (hidden, weight))))
            for a, b in zip(*grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_mask(self) -> None:
        student = torch.full((3, 4), -2.0)
        student[1] = torch.nan
        student.requires_grad_()
        mask = torch.tensor([True, False, True])
        values = tk.topk_divergence(student, torch.full((3, 4), -1.5), beta=0.5, mask=mask)
        values.sum().backward()
        assert student.grad is not None
        assert values.tolist()[1] == 0 and bool((student.grad[1] == 0).all()) and bool(student.grad.isfinite().all())

    @pytest.mark.parametrize("beta", BETAS)
    def test_ids_named_again_count_once(self, beta: float) -> None:
        """The first time, whatever stands there the second; on a CPU sums are taken so, too."""
        student, teacher = (torch.tensor(x).log() for x in ([[0.5, 0.25, 0.125]], [[0.25, 0.25, 0.375]]))
        again = torch.tensor([[7, 2, 7, 9, 2]])
        columns = [0, 1, 0, 2, 1]
        both = student[:, columns].requires_grad_(), teacher[:, columns].clone()
        both[1][0, 2] = torch.nan
        found, once = (tk.topk_divergence(*both, ids=again, beta=beta), tk.topk_divergence(student, teacher, beta=beta))
        assert torch.equal(found, once)
        (grad,) = torch.autograd.grad(found.sum(), both[0])
        assert grad[0, [2, 4]].tolist() == [0, 0] and bool((grad[0, [0, 3]] != 0).all())
        with pytest.raises(ValueError, match="student_logprobs must be log p of distinct ids, of sum p at most 1"):
            tk.topk_divergence(both[0].detach(), both[0].detach(), beta=beta)

    def test_nothing_stored(self) -> None:
        assert tk.topk_divergence(torch.empty(2, 0), torch.empty(2, 0)).tolist() == [0, 0]


class TestBadInput:
    def _bad(self, error: type[Exception], match: str, at: int | None = None, value=None, **options) -> None:
        inputs = list(_heads())
        if at is not None:
            inputs[at] = value
        with pytest.raises(error, match=match):
            tk.linear_divergence(*inputs, **options)

    def test_tensors(self) -> None:
        self._bad(TypeError, "hidden must be a tensor", 0, None)
        self._bad(ValueError, r"weight must have shape \[V, 16\]", 1, torch.zeros(70, 15))
        self._bad(TypeError, "weight must have dtype float32", 1, torch.zeros(70, 16).double())
        self._bad(ValueError, r"teacher_hidden must have shape \[12, H'\]", 2, torch.zeros(11, 5))
        self._bad(TypeError, "teacher_hidden must have dtype", 2, torch.zeros(12, 5).double())
        self._bad(ValueError, "teacher_weight must have shape", 3, torch.zeros(70, 6))
        self._bad(TypeError, "teacher_weight must have dtype", 3, torch.zeros(70, 5).half())

    def test_options(self) -> None:
        self._bad(ValueError, "beta must be at most 1", beta=1.5)
        self._bad(ValueError, "beta must be at least 0", beta=-0.1)
        self._bad(TypeError, "beta must be a number", beta="kl")
        self._bad(ValueError, "temperature must be greater than 0", temperature=0.0)
        self._bad(ValueError, "mask must have shape", mask=torch.ones(11, dtype=torch.bool))
        self._bad(TypeError, "mask must have dtype bool", mask=torch.ones(12))
        self._bad(ValueError, "workspace_bytes must hold one row of both logits, 560 bytes", workspace_bytes=559)

    def test_heads(self) -> None:
        for prefix, size in (("", 70), ("teacher_", 70)):
            narrow, wide = torch.zeros(size - 1), torch.zeros(size).double()
            self._bad(ValueError, rf"^{prefix}bias must have shape \[{size}\]", **{f"{prefix}bias": narrow})
            self._bad(TypeError, f"^{prefix}bias must have dtype float32", **{f"{prefix}bias": wide})
            self._bad(TypeError, f"^{prefix}bias must be a tensor", **{f"{prefix}bias": 0.0})
            self._bad(ValueError, f"^{prefix}softcap must be greater than 0", **{f"{prefix}softcap": 0.0})
            self._bad(ValueError, f"^{prefix}logit_scale must be finite", **{f"{prefix}logit_scale": INF})

    def test_vocabulary(self) -> None:
        unequal = "teacher_weight must have the 70 rows of weight, got 71; .* vocabulary= .* at most 70"
        self._bad(ValueError, unequal, 3, torch.zeros(71, 5))
        for bad in (0, -1, 71):
            self._bad(ValueError, f"vocabulary must be 1 to 70, .* got {bad}", vocabulary=bad)
        for bad in (True, 70.0, "70", torch.tensor(70)):
            self._bad(TypeError, "vocabulary must be an int", vocabulary=bad)

    def test_batch_invariant(self) -> None:
        what = "workspace_bytes must hold the 64 rows of a batch-invariant block of both logits, 35840 bytes"
        self._bad(ValueError, what, workspace_bytes=35839, batch_invariant=True)
        self._bad(TypeError, "batch_invariant must be True or False, got 1", batch_invariant=1)

    def test_topk(self) -> None:
        logprobs = torch.full((2, 3), math.log(1 / 3))
        tk.topk_divergence(logprobs, logprobs)
        with pytest.raises(ValueError, match="teacher_logprobs must have shape"):
            tk.topk_divergence(logprobs, logprobs[:, :2])
        for bad in (logprobs + 0.1, logprobs.exp(), torch.full((2, 3), torch.nan)):
            with pytest.raises(ValueError, match="teacher_logprobs must be log p"):
                tk.topk_divergence(logprobs, bad)
            with pytest.raises(ValueError, match="student_logprobs must be log p"):
                tk.topk_divergence(bad, logprobs)
        for ids, error in ((torch.zeros(2, 3), TypeError), (torch.zeros(2, 2, dtype=torch.int64), ValueError)):
            with pytest.raises(error, match="^ids must have"):
                tk.topk_divergence(logprobs, logprobs, ids=ids)
        masked = torch.tensor([True, False])
        tk.topk_divergence(logprobs, torch.stack((logprobs[0], logprobs[1] + 1)), mask=masked)
        tk.topk_divergence(logprobs, logprobs.bfloat16())
