"""What verl cannot give a credit is refused by its name, and what was put into verl is taken back."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations.verl_batches import Queue, config_of, padded, rollouts_of
from trajkern import credit
from trajkern.integrations import verl as adapter

NAME = "trajkern_credit"


@pytest.fixture
def trainers(verl_trainers):
    yield verl_trainers
    adapter.unregister()


def legacy(trainers, rollouts: list[Any], spec: credit.Spec, change: Any = None, **algorithm: Any) -> Any:
    adapter.register(credit=spec)
    data = padded(rollouts)
    if change is not None:
        change(data)
    return trainers.legacy.compute_advantage(data, adv_estimator=NAME, config=config_of(NAME, **algorithm).algorithm)


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        (credit.recipe("dro"), "'score' in verl: verl forms advantages on its controller, which has no model"),
        (credit.outcome() + credit.recipe("delta_belief"), "'score' in verl"),
        (credit.recipe("tree_grpo"), "'tree' in verl: verl's rollouts share no prefix"),
        (
            0.1 * credit.divergence(),
            "'divergence' in verl: verl forms advantages on its controller, which has no logits",
        ),
    ],
)
def test_what_no_trainer_has(imported_verl, expression: credit.Spec, name: str) -> None:
    before = dict(imported_verl.ADV_ESTIMATOR_REGISTRY)
    with pytest.raises(ValueError, match=f"credit must do without {name}"):
        adapter.register(credit=expression)
    assert before == imported_verl.ADV_ESTIMATOR_REGISTRY


def test_what_is_no_credit(imported_verl) -> None:
    for wrong in (0.5, "os:path", credit.outcome):
        with pytest.raises(
            TypeError, match=r"credit must be an expression of trajkern\.credit or its 'package\.module"
        ):
            adapter.register(credit=wrong)
    with pytest.raises(ValueError, match='"package.module:name" is expected'):
        adapter.register(credit="nowhere:spec")


def test_by_the_name_of_a_module(trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_credit", SimpleNamespace(spec=credit.outcome("tone", scale="none")))
    adapter.register(credit="my_credit:spec")
    data = trainers.legacy.compute_advantage(padded(rollouts_of(0)), NAME, config=config_of(NAME).algorithm)
    assert data.batch["advantages"].any()


@pytest.mark.parametrize(
    ("expression", "name"),
    [
        (credit.outcome("style"), r"needs 'style', which the rollouts do not have; they have .*reward, .*tone"),
        (
            credit.outcome().gate("tone"),
            "needs 'flags:tone', which .* do not have; they have flags:reward, flags:well_f",
        ),
        (credit.spans("step"), "needs 'span_rewards:step'"),
        (credit.outcome().on("step"), "needs 'spans:step', which .*; they have spans:call, spans:turn"),
        (credit.directive(), "needs 'teacher_logprobs'"),
    ],
)
def test_what_this_batch_has_not(trainers, expression: credit.Spec, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        legacy(trainers, rollouts_of(0), expression)


def test_the_legacy_trainer_has_no_texts(trainers) -> None:
    def lengths(rollouts: credit.Rollouts) -> torch.Tensor:
        return torch.tensor([len(x) for x in rollouts.texts])

    lengths.needs = {"texts"}
    with pytest.raises(ValueError, match="needs 'texts', which the rollouts do not have"):
        legacy(trainers, rollouts_of(0), credit.outcome(lengths))


def test_numbers_that_cannot_be_placed(trainers) -> None:
    """One more or less than there are turns or calls, and nobody knows whose they are."""
    rollouts = rollouts_of(0)
    rollouts[2].extra["turn_scores"].append(1.0)
    count = len(rollouts[2].turns)
    message = f"turn_scores must have a number for each of the {count} spans 'turn' of row 2, got {count + 1}"
    with pytest.raises(ValueError, match=message):
        legacy(trainers, rollouts, credit.spans("turn"))
    legacy(trainers, rollouts, credit.spans("call"))  # which reads others
    rollouts[3].extra["tool_rewards"] += [0.5, 0.5]
    with pytest.raises(ValueError, match="tool_rewards must have a number for each of the . spans 'call' of row 3"):
        legacy(trainers, rollouts, credit.spans("call"))
    rollouts[1].extra["spans"] = {"thought": [[0, len(rollouts[1].mask) + 1]]}
    with pytest.raises(ValueError, match=r"spans\['thought'\] must be 0 <= start <= end <= .*the response of row 1"):
        legacy(trainers, rollouts, credit.outcome())


def test_calls_side_by_side(trainers) -> None:
    message = "max_parallel_calls must be 1 where a credit needs span_rewards:call, .*; got 2"
    with pytest.raises(ValueError, match=message):
        legacy(trainers, rollouts_of(0), credit.spans("call"), parallel_calls=2)
    legacy(trainers, rollouts_of(0), credit.outcome().on("call"), parallel_calls=2)


def test_a_call_whose_answer_did_not_fit(trainers) -> None:
    """The last turn called a tool, of which there is a number and no token."""
    rollouts = rollouts_of(0)
    for x in rollouts:
        x.extra["tool_rewards"].append(2.0)
    data = legacy(trainers, rollouts, credit.spans("call", baseline="none", scale="none"))
    for row, x in zip(data.batch["advantages"], rollouts, strict=True):
        values = [row[start].item() for start, _ in x.turns]
        assert values == pytest.approx(x.extra["tool_rewards"])


def test_turns_behind_a_rejection(trainers) -> None:
    correction = {"rollout_rs": "token_k1", "bypass_mode": False}
    with pytest.raises(ValueError, match=r"rollout_rs must be null where a credit needs span_rewards:turn, spans:turn"):
        legacy(trainers, rollouts_of(0), credit.spans("turn"), rollout_correction=correction)
    legacy(trainers, rollouts_of(0), credit.outcome(), rollout_correction=correction)
    legacy(trainers, rollouts_of(0), credit.spans("turn"), rollout_correction=correction | {"bypass_mode": True})


def test_turns_behind_a_rejection_of_the_default_trainer(trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue has the mask from before: turns stay whole, and what was rejected leaves both masks."""
    queue, rollouts = Queue(), rollouts_of(2)
    monkeypatch.setattr(trainers.v1, "tq", queue)
    for x in rollouts:
        x.sampler = [o - 3.0 * (n == 1) for n, o in enumerate(x.old)]
    found = []
    for correction in (None, {"rollout_is": None, "rollout_rs": "token_k1", "rollout_rs_threshold": "0.5_2.0"}):
        adapter.register(credit=credit.spans("turn"))
        config = config_of(NAME, rollout_correction=correction)
        trainer, batch = SimpleNamespace(config=config, tokenizer=None), queue.put_rollouts(rollouts)
        trainers.v1.PPOTrainer._compute_advantage(trainer, batch, metrics={})
        found.append([queue.column(rollouts, name) for name in ("advantages", "response_mask", "loss_mask")])
    (plain, mask, _), (rejected, narrowed, counted) = found
    assert mask == [x.mask for x in rollouts] and narrowed == counted != mask
    assert narrowed == [[m * (n != 1) for n, m in enumerate(x.mask)] for x in rollouts]
    for x, y, m in zip(rejected, plain, narrowed, strict=True):
        assert x == pytest.approx([a * b for a, b in zip(y, m, strict=True)])


def test_a_teacher_that_does_not_know_a_token(trainers) -> None:
    def teach(data: Any) -> None:
        shape = *data.batch["attention_mask"].shape, 2
        data.batch["teacher_ids"], data.batch["teacher_logprobs"] = torch.full(shape, 99), torch.zeros(shape)

    with pytest.raises(
        ValueError, match="teacher_logprobs must have every token .* not among the teacher's 2 of its pos"
    ):
        legacy(trainers, rollouts_of(0), credit.directive(), teach)


def test_a_batch_that_lacks_a_field(trainers) -> None:
    with pytest.raises(ValueError, match="the batch must have prompts, .* for a credit; it has no prompts, responses"):
        legacy(trainers, rollouts_of(0), credit.outcome(), lambda data: data.pop(["prompts", "responses"]))

    with pytest.raises(ValueError, match="the batch must have uid for 'trajkern_credit'"):
        legacy(trainers, rollouts_of(0), credit.outcome(), lambda data: data.non_tensor_batch.pop("uid"))

    def without_prompts(data: Any) -> None:
        data.batch["attention_mask"][2, : data.batch["prompts"].shape[1]] = 0

    with pytest.raises(ValueError, match="prompts must have a token in every row, .*; row 2 has none"):
        legacy(trainers, rollouts_of(0), credit.outcome(), without_prompts)


def test_a_critic(trainers) -> None:
    with pytest.raises(ValueError, match="critic.enable must be False for 'trajkern_credit'"):
        legacy(
            trainers, rollouts_of(0), credit.outcome(), lambda x: x.batch.update({"values": x.batch["old_log_probs"]})
        )


def test_a_credit_that_was_not_chosen(trainers) -> None:
    adapter.register(credit=credit.outcome())
    config = config_of("grpo")
    message = r"adv_estimator must be 'trajkern_credit' where register\(credit=...\) ran; got 'grpo'"
    for call in (
        lambda: trainers.legacy.compute_advantage(padded(rollouts_of(0)), "grpo", config=config.algorithm),
        lambda: trainers.v1.PPOTrainer._compute_advantage(SimpleNamespace(config=config), None, {}),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_credit_without_a_trainer(imported_verl) -> None:
    """A trainer that calls verl's registry itself hands over too little."""
    adapter.register(credit=credit.outcome())
    for name in (NAME, "trajkern_toolpo"):
        with pytest.raises(RuntimeError, match=f"{name} needs more than verl hands to an estimator"):
            imported_verl.get_adv_estimator_fn(name)(token_level_rewards=None, response_mask=None, config=None)
    adapter.unregister()


def test_what_was_put_is_taken_back(trainers) -> None:
    modules = trainers.legacy, trainers.of_v1, trainers.separate

    def held() -> list[Any]:
        return [*(x.compute_advantage for x in modules), trainers.v1.PPOTrainer._compute_advantage]

    theirs = held()
    assert all(x.__module__.startswith("verl.") and not hasattr(x, "__wrapped__") for x in theirs)
    for _ in range(2):
        adapter.register(credit=credit.outcome())
        assert not set(map(id, held())) & set(map(id, theirs))
    ours = trainers.legacy.compute_advantage
    adapter.unregister()
    assert held() == theirs
    data, config = padded(rollouts_of(0)), config_of("grpo").algorithm
    assert ours(data, "grpo", config=config).batch["advantages"].any()  # who holds it still gets verl's


def test_trainers_that_are_imported_later(trainers) -> None:
    """What held verl's names while these were imported after ``register()`` was not verl's."""
    functions, method = trainers.while_registered
    assert functions[0] is functions[2] is functions[3] is not trainers.legacy.compute_advantage
    assert method is not trainers.v1.PPOTrainer._compute_advantage


def test_trainers_that_do_not_fit(trainers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.legacy, "compute_advantage", lambda data, adv_estimator, horizon: data)
    with pytest.raises(RuntimeError, match=r"compute_advantage must take \(data, adv_estimator, gamma.*horizon\)"):
        adapter.register()
    monkeypatch.undo()
    monkeypatch.setattr(trainers.v1.PPOTrainer, "_compute_advantage", lambda self, metrics: None)
    with pytest.raises(RuntimeError, match=r"PPOTrainer._compute_advantage must take \(batch, metrics\)"):
        adapter.register()
    monkeypatch.undo()
    adapter.unregister()
    theirs = trainers.legacy.compute_advantage
    assert theirs.__module__ == "verl.trainer.ppo.ray_trainer" and not hasattr(theirs, "__wrapped__")
