"""Expressions of credit in the trainer: what flags add to a recipe's, one of one's own, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trajkern as tk
from trajkern import credit
from trajkern.trainer import checkpoint, setup
from trajkern.trainer import collect as collecting
from trajkern.trainer import train as training
from trajkern.trainer.compose import Compose
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.ranks import ALONE
from trajkern.trainer.systems.base import Played
from trajkern.trainer.systems.dro import DRO
from trajkern.trainer.systems.plain import differs

Make = Callable[..., TrainConfig]


def only_even(questions, texts):
    return [n % 2 == 0 for n in range(len(texts))]


def never(questions, texts):
    return [False] * len(texts)


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> list[tuple[credit.Rollouts, Any]]:
    """The rollouts of every step, and what was trained of them."""
    seen = []
    original = collecting.credited

    def credited(run: Any, played: Played, rollouts: credit.Rollouts, values: dict) -> Any:
        seen.append((rollouts, original(run, played, rollouts, values)))
        return seen[-1][1]

    monkeypatch.setattr(collecting, "credited", credited)
    return seen


def test_a_gate_takes_rollouts_out_of_every_statistic(config: Make, lessons: list) -> None:
    training.train(config(compose=Compose(rubric=f"{__name__}:only_even"), steps=2))
    assert len(lessons) == 2 and any(lesson for _, lesson in lessons)
    for rollouts, lesson in lessons:
        batch, even = rollouts.batch, torch.arange(64) % 2 == 0
        plain = tk.group_advantages(batch.rewards, batch.group_ids, gate=even)
        live = torch.zeros(16).index_add(0, batch.group_ids, plain.abs()) > 0
        trained = lesson.credit.rows if lesson else plain[:0]
        assert torch.equal(trained, plain[even & live[batch.group_ids]])


@pytest.mark.parametrize("recipe", ["grpo", "tree_grpo", "gigpo"])
def test_a_batch_emptied_by_its_gate_is_skipped(config: Make, recipe: str, capsys: pytest.CaptureFixture) -> None:
    count, task = (64, "chain_sum") if recipe == "grpo" else (96, "chain_sum_steps")
    settings = config(recipe=recipe, task=task, compose=Compose(rubric=f"{__name__}:never"), steps=2)
    result = training.train(settings)
    records = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    main = [r for r in records if r["phase"] == "main"]
    assert [(r["gated_rollouts"], r["emptied_groups"], r["live_groups"]) for r in main] == [(count, 16, 0)] * 2
    assert capsys.readouterr().out.count("the gate let no rollout through") == 2
    before, after = (
        checkpoint.load(p).tensors for p in (result.checkpoint.with_name("warmup.safetensors"), result[-1])
    )
    assert all(torch.equal(before[k], after[k]) for k in after if k.startswith("policy."))


@pytest.mark.parametrize("recipe", ["grpo", "treerl"])
def test_flags_add_to_any_recipe(config: Make, lessons: list, recipe: str) -> None:
    compose = Compose(f"{__name__}:only_even", positive_weight=0.25, hint_weight=0.5)
    training.train(config(recipe=recipe, task="chain_sum_steps", compose=compose, steps=1))
    ((rollouts, lesson),) = lessons
    plain = credit.recipe(recipe)
    if recipe == "treerl":
        plain = plain.gate(differs)
    weighed = plain.asymmetric(0.25) + 0.5 * credit.directive(where="failed")
    expected = weighed.gate("rubric")(rollouts)
    assert expected.advantages.any() and (expected.advantages < 0).any()
    keep = expected.keep & torch.isin(rollouts.batch.group_ids, lesson.credit.rollouts.batch.group_ids)
    assert torch.equal(lesson.credit.advantages, expected.advantages[keep.repeat_interleave(rollouts.batch.lengths)])
    right = rollouts.reward("reward").repeat_interleave(rollouts.batch.lengths) > 0
    assert torch.equal(rollouts.teacher_logprobs[right], rollouts.batch.sampler_logprobs[right])
    wrong = ~right & rollouts.batch.loss_mask
    assert (rollouts.teacher_logprobs != rollouts.batch.sampler_logprobs)[wrong].float().mean() > 0.9


def test_flags_dealt_to_other_prompts() -> None:
    """Three prompts, whose rollouts lie apart, and the flags of the third, the first and the second in their place."""
    groups, flags = torch.tensor([1, 0, 2, 1, 0, 2]), torch.tensor([0, 1, 1, 0, 0, 1]).bool()
    found = collecting.exchanged(flags, groups, torch.tensor([2, 0, 1]), ALONE)
    assert found.int().tolist() == [1, 1, 0, 0, 1, 0]


def test_a_random_drop_keeps_as_many_prompts(config: Make, lessons: list, monkeypatch: pytest.MonkeyPatch) -> None:
    own, original = [], collecting.exchanged
    monkeypatch.setattr(collecting, "exchanged", lambda flags, *rest: own.append(flags) or original(flags, *rest))
    settings = {"task": "chain_sum_steps", "recipe": "dro", "dro": DRO(drop_fraction=0.25), "control": "random-drop"}
    training.train(config(**settings, steps=3))
    for flags, (rollouts, lesson) in zip(own, lessons, strict=True):
        dealt, groups = rollouts.flags["in_reach"], rollouts.batch.group_ids
        assert flags.sum() == dealt.sum() == 12 * 4
        assert torch.isin(lesson.credit.rollouts.batch.group_ids, groups[dealt]).all()
    assert not all(
        torch.equal(flags, rollouts.flags["in_reach"]) for flags, (rollouts, _) in zip(own, lessons, strict=True)
    )


own_credit = credit.outcome() + 0.5 * credit.outcome("confidence", baseline="none", scale="none").gate("well_formed")
distils = credit.outcome() + 0.5 * credit.divergence(where="failed", k=5)
asks_too_much = credit.outcome() + credit.outcome().on("sentence")


def test_an_expression_of_ones_own(config: Make, lessons: list) -> None:
    """It reads what the recipe's rollouts know; flags go on top."""
    settings = {"recipe": "rlcr", "task": "chain_sum_confidence", "credit": f"{__name__}:own_credit"}
    training.train(config(**settings, compose=Compose(positive_weight=0.5), steps=1))
    ((rollouts, lesson),) = lessons
    batch, confidence = rollouts.batch, rollouts.reward("confidence")
    stated = ~confidence.isnan() & rollouts.flags["well_formed"]
    assert stated.any(), "the case needs an answer that states a confidence"
    expected = tk.group_advantages(batch.rewards, batch.group_ids) + 0.5 * torch.where(stated, confidence, 0)
    expected = torch.where(expected > 0, 0.5 * expected, expected)
    live = torch.zeros(16).index_add(0, batch.group_ids, expected.abs()) > 0
    torch.testing.assert_close(lesson.credit.rows, expected[live[batch.group_ids]])


def test_a_divergence_is_a_term_of_the_loss(config: Make, lessons: list) -> None:
    settings = {"task": "chain_sum_steps", "credit": f"{__name__}:distils", "micro_tokens": 400}
    result = training.train(config(**settings, steps=1))
    ((_, lesson),) = lessons
    ((term, weight),) = lesson.credit.divergences
    assert term.k == 5 and set(weight.tolist()) == {0.0, 0.5}
    record = [r for r in map(json.loads, result.metrics.read_text().splitlines()) if r["phase"] == "main"][0]
    assert record["divergence"] > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "dro"}, "task must be one with `reference`.*, for the recipe dro; got 'chain_sum'"),
        ({"recipe": "rlcr"}, "task must be one whose answers state a confidence"),
        ({"recipe": "toolpo"}, "task must be one with `action_spans` .*, for the recipe toolpo; got 'chain_sum'"),
        ({"recipe": "tree_grpo", "task": "tools"}, "task must be one without an environment"),
        ({"recipe": "delta_belief", "task": "twenty_questions", "control": "random-rewards"}, "control must be one of"),
        (
            {"control": "random-drop"},
            "control must not be random-drop for the recipe grpo, which drops nothing by a flag",
        ),
        ({"recipe": "feedback", "task": "tools"}, "task must be one with `hint`, for the recipe feedback; got 'tools'"),
        ({"compose": Compose(rubric="nowhere:at_all")}, "compose.rubric must be .*got 'nowhere:at_all'"),
        ({"compose": Compose(rubric="json:at_all")}, "compose.rubric must be"),
        ({"compose": Compose(hint_weight=1.0), "task": "tools"}, "task must be one with `hint`, for compose"),
        (
            {"compose": Compose(hint_weight=1.0), "task": "chain_sum_steps", "recipe": "srl"},
            "the recipe srl on the task chain_sum_steps cannot give this credit: .* needs 'teacher_logprobs'",
        ),
        ({"credit": f"{__name__}:asks_too_much"}, "recipe grpo .* needs 'spans:sentence', .* they have spans:turn"),
        ({"credit": f"{__name__}:distils", "task": "tools"}, r"credit.divergence\(.*\) needs 'divergence'"),
        ({"credit": f"{__name__}:never"}, "credit must name a trajkern.credit.Spec"),
        ({"credit": "nowhere:spec"}, "\"package.module:name\" is expected, got 'nowhere:spec'"),
        (
            {"recipe": "toolpo", "task": "tools", "credit": f"{__name__}:asks_too_much"},
            "needs 'spans:sentence', .* they have spans:call, spans:turn",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    config: Make, settings: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "draw_splits", lambda *_: pytest.fail("questions were drawn"))
    with pytest.raises(ValueError, match=message):
        training.train(config(**settings))
