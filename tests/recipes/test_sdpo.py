"""SDPO: the loss of a token, its weights, the teacher's weights and whose solution is shown; by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import trajkern as tk
from trajkern import credit
from trajkern.recipes.sdpo import TopK, divergence_loss, frozen_teacher, peers, token_losses, topk, update_teacher

LN2, NAN = math.log(2), math.nan
# of two ids and the rest: student 1/2 1/4 1/4, teacher 1/4 1/4 1/2
STUDENT, TEACHER = torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log()
JENSEN = 0.25 * math.log(2 / 3) + 0.5 * math.log(4 / 3)  # both sides give this half, the mixture being 3/8 1/4 3/8


@pytest.mark.parametrize(
    ("beta", "tail", "expected"),
    [
        (0, True, 0.25 * LN2),
        (1, True, 0.25 * LN2),
        (0.5, True, JENSEN),
        # over the two alone: student 2/3 1/3, teacher 1/2 1/2
        (0, False, 0.5 * math.log(9 / 8)),
        (1, False, 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)),
    ],
)
def test_literal(beta: float, tail: bool, expected: float, device: str) -> None:
    both = STUDENT.to(device), TEACHER.to(device)
    loss = token_losses(*both, beta=beta, tail=tail, max_ratio=None)
    assert loss.dtype == torch.float32 and loss.tolist() == pytest.approx([expected], rel=1e-6)
    wide = token_losses(*(x.double() for x in both), beta=beta, tail=tail, max_ratio=None)
    assert wide.dtype == torch.float64 and wide.tolist() == pytest.approx([expected], rel=1e-6)


def test_weights_and_ratios(device: str) -> None:
    """Ratios 1/2, 3 and e^25, of which 2 and 2 count (the last one's log as 20); the fourth token is masked."""
    student, teacher = (x.to(device).expand(4, -1) for x in (STUDENT, TEACHER))
    old = torch.tensor([-1.0, -3.0, -26.0, NAN], device=device)
    now = torch.tensor([-1 - LN2, math.log(3) - 3, -1.0, NAN], device=device)
    weights = torch.tensor([1.0, -0.5, 0.25, NAN], device=device)
    mask = torch.tensor([True, True, True, False], device=device)
    known = {"weights": weights, "mask": mask, "logprobs": now, "old_logprobs": old}
    assert token_losses(student, teacher, **known).tolist() == pytest.approx(
        [0.5 * JENSEN, -0.5 * 2 * JENSEN, 0.25 * 2 * JENSEN, 0], rel=1e-5
    )
    most = math.exp(20)
    third = token_losses(student, teacher, **known, max_ratio=1e12)[2]
    assert float(third) == pytest.approx(0.25 * most * JENSEN, rel=1e-5)
    plain = token_losses(student, teacher, weights=weights, mask=mask, max_ratio=None)
    assert plain.tolist() == pytest.approx([JENSEN, -0.5 * JENSEN, 0.25 * JENSEN, 0], rel=1e-5)


def _case(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits, theirs = (3 * torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    return {
        "logits": logits,
        "teacher": theirs,
        "tokens": torch.randint(0, 7, (5,), generator=g),
        "old": -torch.rand(5, generator=g, dtype=torch.float64),
        "weights": torch.randn(5, generator=g, dtype=torch.float64),
        "mask": torch.tensor([True, False, True, True, True]),
    }


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_the_whole_vocabulary(beta: float) -> None:
    """It is the divergence of the two softmaxes, and every K with its tail is at most that."""
    x = _case()
    student, teacher = (x[name] / 0.7 for name in ("logits", "teacher"))
    s, t = student.log_softmax(1), teacher.log_softmax(1)
    m = torch.logaddexp(s + math.log1p(-beta), t + math.log(beta)) if 0 < beta < 1 else (s if beta == 0 else t)
    kl_t, kl_s = (t.exp() * (t - m)).sum(1), (s.exp() * (s - m)).sum(1)
    expected = kl_t if beta == 0 else kl_s if beta == 1 else beta * kl_t + (1 - beta) * kl_s
    options = {"beta": beta, "temperature": 0.7, "max_ratio": None}
    out = divergence_loss(x["logits"], t, x["tokens"], **options)
    assert float(out) == pytest.approx(float(expected.mean()), rel=1e-10)
    narrow = [float(divergence_loss(x["logits"], topk(teacher, k), x["tokens"], **options)) for k in (1, 3, 6, 9)]
    assert narrow[:3] == sorted(narrow[:3]) and narrow[3] == pytest.approx(float(out), rel=1e-12)
    assert narrow[2] == pytest.approx(float(out), rel=1e-9), "six of seven ids leave nothing open"


def test_the_loss_of_a_batch_and_its_gradient() -> None:
    x = _case()
    logits = x["logits"].requires_grad_()
    teacher = topk(x["teacher"], 3)
    assert teacher.ids.tolist() == x["teacher"].argsort(1, descending=True)[:, :3].tolist()
    known = {"weights": x["weights"], "mask": x["mask"]}
    loss = divergence_loss(logits, teacher, x["tokens"], x["old"], **known)
    now = logits.log_softmax(1)
    sampled = now.gather(1, x["tokens"][:, None])[:, 0].detach()
    each = tk.topk_divergence(now.gather(1, teacher.ids), teacher.logprobs, beta=0.5)
    weight = torch.where(x["mask"], x["weights"] * (sampled - x["old"]).exp().clamp(max=2), 0)
    expected = (weight * each).sum() / 4
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    got, want = (torch.autograd.grad(y, logits)[0] for y in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert not got[1].any() and got[0].any()
    ten = divergence_loss(logits, teacher, x["tokens"], x["old"], **known, normalizer=10)
    torch.testing.assert_close(ten, expected * 0.4, rtol=1e-12, atol=0)
    nothing = divergence_loss(logits, teacher, x["tokens"], x["old"], mask=torch.zeros(5, dtype=torch.bool))
    assert float(nothing.detach()) == 0


def test_distributions_that_hardly_meet() -> None:
    """Student and teacher each give nearly everything to a token that the other hardly knows."""
    tiny = -40.0
    student = torch.tensor([[math.log1p(-math.exp(tiny)), tiny]], dtype=torch.float64)
    loss = token_losses(student, student.flip(1), beta=1, tail=False, max_ratio=None)
    assert float(loss) == pytest.approx(-tiny, rel=1e-12)


def test_a_step_moves_the_student_to_the_teacher() -> None:
    """Also onto a token that was not sampled, which no advantage of the sampled one names."""
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    teacher = TopK(torch.tensor([[2, 1]]), torch.tensor([[0.9, 0.05]], dtype=torch.float64).log())
    loss = divergence_loss(logits, teacher, torch.tensor([0]), max_ratio=None)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad[0, 2] < 0 < grad[0, 0] and grad[0, 1] > 0


def test_what_a_credit_asks_a_host_to_add() -> None:
    """The first rollout failed: its scored tokens are directed, with the expression's weight."""
    x = _case()
    batch = tk.PackedBatch(
        x["tokens"],
        torch.tensor([0, 3, 5]),
        torch.tensor([False, True, True, False, True]),
        torch.tensor([0, 0]),
        torch.tensor([0.0, 1.0]),
        sampler_logprobs=x["old"],
    )
    spec = credit.outcome() + 0.5 * credit.divergence(where="failed", k=3, beta=0.3, max_ratio=1.5)
    found = spec(credit.Rollouts(batch, adds_divergences=True))
    ((term, weights),) = found.divergences
    options = {"weights": weights, "mask": found.mask, "beta": term.beta, "max_ratio": term.max_ratio}
    loss = divergence_loss(x["logits"], topk(x["teacher"], term.k), x["tokens"], x["old"], **options)
    directed = torch.tensor([False, True, True, False, False])
    known = {"mask": directed, "beta": 0.3, "max_ratio": 1.5, "normalizer": 3}
    alone = divergence_loss(x["logits"], topk(x["teacher"], 3), x["tokens"], x["old"], **known)
    torch.testing.assert_close(loss, 0.5 * alone, rtol=1e-12, atol=0)
    assert float(alone) > 0


@pytest.mark.parametrize(
    ("itself", "threshold", "expected"),
    [
        (False, 0.5, [2, 2, 4, 2, 2, -1, -1, -1]),
        (True, 0.5, [2, 2, 2, 2, 2, -1, 6, -1]),
        (False, 1, [4, 4, 4, 4, -1, -1, -1, -1]),
    ],
)
def test_peers(itself: bool, threshold: float, expected: list[int], device: str) -> None:
    """Two successes of group 3, the first of them at the threshold, and a lone one of group 2."""
    rewards = torch.tensor([0, 0.4, 0.5, 0, 1, 0, 0.9, 0], device=device)
    groups = torch.tensor([3, 3, 3, 3, 3, 1, 2, 1], device=device)
    assert peers(rewards, groups, threshold=threshold, itself=itself).tolist() == expected


def test_the_teachers_weights() -> None:
    student = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
    teacher = frozen_teacher(student)
    assert not teacher.training and not any(x.requires_grad for x in teacher.parameters())
    with torch.no_grad():
        for x, value in zip(student.parameters(), (1.0, 2.0, 3.0, 4.0), strict=True):
            x.fill_(value)
        for x in teacher.parameters():
            x.fill_(-1.0)
    before = [x.data_ptr() for x in teacher.parameters()]
    update_teacher(teacher, student)
    assert [float(x.flatten()[0]) for x in teacher.parameters()] == pytest.approx([-0.9, -0.85, -0.8, -0.75])
    update_teacher(teacher, student, 0)
    assert [x.data_ptr() for x in teacher.parameters()] == before, "in place"
    update_teacher(teacher.double(), student, 1)
    assert [float(x.flatten()[0]) for x in teacher.parameters()] == [1, 2, 3, 4]


def _losses(**change: object) -> Tensor:
    return token_losses(**({"student_logprobs": STUDENT, "teacher_logprobs": TEACHER, "max_ratio": None} | change))


def _loss(**change: object) -> Tensor:
    known = {"teacher": topk(torch.zeros(2, 3), 2), "tokens": torch.tensor([0, 1]), "max_ratio": None}
    return divergence_loss(torch.zeros(2, 3), **(known | change))


ONE = torch.zeros(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _losses(teacher_logprobs=TEACHER[:, :1]), ValueError, r"teacher_logprobs must have shape \[1, 2\]"),
        (lambda: _losses(beta=2), ValueError, "beta must be at most 1"),
        (lambda: _losses(tail=1), TypeError, "tail must be True or False"),
        (lambda: _losses(weights=torch.ones(2)), ValueError, r"weights must have shape \[1\]"),
        (lambda: _losses(weights=torch.tensor([NAN])), ValueError, "weights must be finite"),
        (lambda: _losses(max_ratio=0), ValueError, "max_ratio must be greater than 0"),
        (lambda: _losses(max_ratio=2), ValueError, r"logprobs must be given where max_ratio weighs tokens \(2\)"),
        (lambda: _losses(max_ratio=2, logprobs=ONE), ValueError, "old_logprobs must be given where max_ratio"),
        (lambda: _losses(max_ratio=2, logprobs=ONE, old_logprobs=ONE / 0), ValueError, "old_logprobs must be finite"),
        (lambda: _losses(teacher_logprobs=TEACHER + 1), ValueError, "of sum p at most 1"),
        (lambda: _loss(tokens=torch.tensor([0, 3])), ValueError, r"tokens must lie in \[0, 3\)"),
        (lambda: _loss(teacher=TopK(torch.tensor([[0], [3]]), torch.zeros(2, 1))), ValueError, r"teacher.ids must lie"),
        (
            lambda: _loss(teacher=TopK(torch.tensor([[0]]), torch.zeros(1, 1))),
            ValueError,
            "ids must have shape",
        ),
        (lambda: _loss(teacher=torch.zeros(2, 4)), ValueError, r"teacher must have shape \[2, 3\]"),
        (lambda: _loss(mask=torch.ones(2)), TypeError, "mask must have dtype bool"),
        (lambda: _loss(normalizer=0), ValueError, "normalizer must be greater than 0"),
        (lambda: topk(torch.zeros(2, 3), 0), ValueError, "k must be at least 1"),
        (lambda: topk(torch.zeros(2, 3), temperature=0), ValueError, "temperature must be greater than 0"),
        (lambda: peers(torch.tensor([NAN]), torch.tensor([0])), ValueError, "rewards must be finite"),
        (lambda: frozen_teacher(torch.zeros(1)), TypeError, "student must be a torch.nn.Module"),
        (lambda: update_teacher(nn.Linear(1, 2), nn.Linear(1, 2, bias=False)), ValueError, "only one of them has bias"),
        (
            lambda: update_teacher(nn.Linear(1, 2), nn.Linear(1, 3)),
            ValueError,
            r"weight of shape \[3, 1\], got \[2, 1\]",
        ),
        (lambda: update_teacher(*[nn.Linear(1, 2)] * 2), ValueError, "parameters of its own; weight is the student's"),
        (lambda: update_teacher(nn.Linear(1, 2), nn.Linear(1, 2), 1.5), ValueError, "rate must be at most 1"),
    ],
)
def test_refuses(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
