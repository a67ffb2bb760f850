"""The divergence from the hinted policy: what forwards one by one and dense distributions give, whole and in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trajkern import credit
from trajkern.recipes import sdpo
from trajkern.trainer import train as training
from trajkern.trainer.checkpoint import Checkpoint, load
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.divergence import HINTED, divergence_term
from trajkern.trainer.forest import Lesson
from trajkern.trainer.lagging import TEACHER, Lag
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.tokenizer import encode
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.packing import pack_rollouts
from trajkern.trainer.sampling import sample
from trajkern.trainer.systems.base import Played
from trajkern.trainer.systems.feedback import Feedback, HintedTeacher
from trajkern.trainer.systems.hints import hinted_prompts
from trajkern.trainer.tasks import load_task

TEMPERATURE = 1.3
TAUGHT = credit.outcome() + credit.divergence(where="failed", k=20)
PROMPTS, HINTS = ["4-1=", "17+25-3="], [None, "3|4-1=", "|4-1=", None, "39|17+25-3=", None]


@pytest.fixture
def model() -> CharacterModel:
    torch.manual_seed(0)
    return CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=48)).double()


def lesson_of(model: CharacterModel, spec: credit.Spec) -> Lesson:
    prompts, generator = [encode(prompt) for prompt in PROMPTS], torch.Generator().manual_seed(1)
    rollouts = sample(model, prompts, copies=3, max_new=6, generator=generator, temperature=TEMPERATURE)
    batch = pack_rollouts(rollouts, torch.zeros(6, dtype=torch.float64), torch.arange(2).repeat_interleave(3))
    rows = [{HINTED: None if hint is None else encode(hint)} for hint in HINTS]
    found = spec(credit.Rollouts(batch, rows=rows, adds_divergences=True))
    return Lesson.of(found, torch.ones_like(found.keep))


def by_hand(
    model: CharacterModel, master: CharacterModel, lesson: Lesson, k: int | None, beta: float, most: float | None
) -> Tensor:
    """The sum over tokens, from dense distributions."""
    batch, total = lesson.credit.rollouts.batch, torch.zeros((), dtype=torch.float64)
    bounds = batch.cu_seqlens.tolist()
    for n, hint in enumerate(HINTS):
        if hint is None:
            continue
        tokens, length = batch.tokens[bounds[n] : bounds[n + 1]], len(PROMPTS[n // 3])
        written = tokens[length:]

        def of(model: CharacterModel, before: Tensor, written: Tensor = written) -> Tensor:
            row = torch.cat((before, written))
            rows = torch.arange(len(before) - 1, len(row) - 1)
            return (model(row, torch.tensor([0, len(row)]), rows) / TEMPERATURE).softmax(-1)

        student, teacher = of(model, tokens[:length]), of(master, torch.tensor(encode(hint))).detach()
        ratio = student.detach().gather(1, written[:, None]).squeeze(1)
        ratio = ratio / batch.sampler_logprobs[bounds[n] + length : bounds[n + 1]].exp()
        if k is not None:
            top = teacher.topk(k).indices
            some = [x.gather(1, top) for x in (student, teacher)]
            student, teacher = (torch.cat((x, 1 - x.sum(1, True)), 1) for x in some)
        if beta in (0, 1):
            p, q = (teacher, student) if beta == 0 else (student, teacher)
            each = (p * (p / q).log()).sum(1)
        else:
            mixed = (1 - beta) * student + beta * teacher
            each = sum(w * (x * (x / mixed).log()).sum(1) for w, x in ((beta, teacher), (1 - beta, student)))
        total = total + (each if most is None else each * ratio.clamp_max(most)).sum()
    return total


@pytest.mark.parametrize(
    ("k", "beta", "most", "own"),
    [(None, 0.5, None, True), (3, 0.0, None, False), (20, 1.0, None, False), (3, 0.5, 0.97, True)],
    ids=str,
)
def test_the_divergence_from_the_hinted_policy(
    model: CharacterModel, k: int | None, beta: float, most: float | None, own: bool
) -> None:
    teacher = sdpo.frozen_teacher(model) if own else model
    lesson = lesson_of(model, 0.25 * credit.divergence(where="failed", k=k, beta=beta, max_ratio=most))
    with torch.no_grad():
        model.head.weight.mul_(1.2)  # a step away from what sampled
    count = lesson.units("token_mean")
    parameters: list[Any] = list(model.parameters())
    expected = 0.25 * by_hand(model, teacher, lesson, k, beta, most) / count
    assert expected > 1e-5
    for pieces in ([lesson], lesson.pieces(14)):
        parts = [divergence_term(model, teacher, piece, TEMPERATURE, count) for piece in pieces]
        torch.testing.assert_close(sum(parts), expected, rtol=1e-6, atol=0)
        grads = torch.autograd.grad(sum(parts), parameters)
        for one, two in zip(grads, torch.autograd.grad(expected, parameters, retain_graph=True), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)
    assert len(lesson.pieces(14)) > 1


def test_no_hint_no_divergence(model: CharacterModel) -> None:
    lesson = lesson_of(model, credit.divergence())
    unhinted = torch.tensor([hint is None for hint in HINTS])
    assert divergence_term(model, model, Lesson.of(lesson.credit, unhinted, lesson.forest), TEMPERATURE, 1) == 0


def test_a_hint_is_asked_for_whatever_failed(model: CharacterModel) -> None:
    task = load_task("chain_sum_steps")
    system = HintedTeacher("feedback", Feedback(), task, model)
    batch = lesson_of(model, credit.divergence()).credit.rollouts.batch
    batch.rewards.copy_(torch.tensor([-1.0, 0.0, 0.5, 1.0, -0.5, 2.0]))
    played = Played(task.distinct(0, 50, most=1) * 6, ["9"] * 6, batch)
    asked = [prompt is not None for prompt in hinted_prompts(system, played)]
    assert asked == [True, True, False, False, True, False]


def test_it_is_refused_where_nobody_adds_it(model: CharacterModel) -> None:
    batch = lesson_of(model, credit.divergence()).credit.rollouts.batch
    with pytest.raises(ValueError, match="needs 'divergence'"):
        credit.divergence()(credit.Rollouts(batch))


@pytest.mark.slow
def test_the_teacher_follows_and_is_resumed(config: Callable[..., TrainConfig]) -> None:
    """A run that is resumed after its first step teaches on as it would have."""
    options: dict[str, Any] = {
        "recipe": "feedback",
        "credit": f"{__name__}:TAUGHT",
        "steps": 2,
        "feedback": Feedback(teacher_rate=0.25),
    }
    whole = training.train(config("whole", **options)).checkpoint
    begun, done = load(whole.with_name("warmup.safetensors")), load(whole)
    stopped = training.train(config("stopped", token_limit=1, **options))
    assert stopped.steps == 1
    resumed = load(training.train(config("resumed", resume=stopped.checkpoint, **options)).checkpoint)
    assert all(torch.equal(x, resumed.tensors[name]) for name, x in done.tensors.items())
    first, once, twice = (weights_of(stored) for stored in (begun, load(stopped.checkpoint), done))
    for name, (teacher, policy) in once.items():
        torch.testing.assert_close(teacher, first[name][0].lerp(policy, 0.25))
        torch.testing.assert_close(twice[name][0], teacher.lerp(twice[name][1], 0.25))
        assert torch.equal(*first[name])
    assert any(not torch.equal(teacher, policy) for teacher, policy in twice.values())


def weights_of(stored: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """The teacher's and the policy's weights."""
    return {name: (x, stored.tensors[f"policy.{name}"]) for name, x in stored.under("teacher.").items()}


def test_a_teacher_lags_behind_the_policy(model: CharacterModel) -> None:
    task = load_task("chain_sum")
    slow, itself = (HintedTeacher("feedback", Feedback(teacher_rate=rate), task, model) for rate in (0.25, 1.0))
    assert slow.lags() == {TEACHER: Lag(0.25)} and itself.lags() == {} and itself.teacher is model
    slow.copies[TEACHER] = copy = sdpo.frozen_teacher(model)
    assert slow.teacher is copy
    with pytest.raises(ValueError, match="feedback.teacher_rate must be between 0 and 1, got 1.5"):
        HintedTeacher("feedback", Feedback(teacher_rate=1.5), task, model)
