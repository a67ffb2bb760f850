"""Credits in verl's trainers: the same as by hand, in both trainers; what leaves the loss leaves its normaliser."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import trajkern as tk
from tests.integrations.verl_batches import Queue, Rollout, by_hand, config_of, padded, rollouts_of
from trajkern import credit
from trajkern.integrations import verl as adapter

SPEC = (credit.outcome() + 0.5 * credit.spans("turn") + 0.25 * credit.spans("call")).gate("well_formed")
NAME = "trajkern_credit"


@pytest.fixture
def trainers(verl_trainers):
    """verl's trainers; what a test registers is taken back."""
    yield verl_trainers
    adapter.unregister()


@pytest.fixture
def queue(trainers, monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(trainers.v1, "tq", queue)
    return queue


def legacy(trainers, data: Any, name: str = NAME, config: Any = None) -> Any:
    config = config_of(name) if config is None else config
    return trainers.legacy.compute_advantage(data, adv_estimator=name, config=config.algorithm)


def v1(trainers, batch: Any, name: str = NAME, config: Any = None, tokenizer: Any = None) -> dict[str, float]:
    metrics: dict[str, float] = {}
    config = config_of(name) if config is None else config
    trainer = SimpleNamespace(config=config, tokenizer=tokenizer)
    trainers.v1.PPOTrainer._compute_advantage(trainer, batch, metrics=metrics)
    return metrics


def unpadded(rollouts: list[Rollout], x: torch.Tensor) -> list[list[float]]:
    return [row[: len(of.mask)].tolist() for row, of in zip(x, rollouts, strict=True)]


def close(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(x) for x in found] == [len(x) for x in expected]
    for x, y in zip(found, expected, strict=True):
        assert x == pytest.approx(y, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_by_hand_in_the_legacy_trainer(trainers, seed: int) -> None:
    adapter.register(credit=SPEC)
    rollouts = rollouts_of(seed)
    advantages, learns = by_hand(rollouts, turns=0.5, calls=0.25)
    data = legacy(trainers, padded(rollouts))
    close(unpadded(rollouts, data.batch["advantages"]), advantages)
    assert torch.equal(data.batch["returns"], data.batch["advantages"])
    assert data.batch["response_mask"].dtype == torch.int64
    assert unpadded(rollouts, data.batch["response_mask"]) == learns
    assert 0 < sum(map(sum, learns)) < sum(sum(x.mask) for x in rollouts)


@pytest.mark.parametrize("seed", range(3))
def test_by_hand_in_the_default_trainer(trainers, queue: Queue, seed: int) -> None:
    adapter.register(credit=SPEC)
    rollouts = rollouts_of(seed)
    advantages, learns = by_hand(rollouts, turns=0.5, calls=0.25)
    metrics = v1(trainers, queue.put_rollouts(rollouts))
    close(queue.column(rollouts, "advantages"), advantages)
    assert queue.column(rollouts, "returns") == queue.column(rollouts, "advantages")
    for name in ("response_mask", "loss_mask"):
        assert queue.column(rollouts, name) == learns
    kept = sum(x.extra["reward_extra_info"]["well_formed"] for x in rollouts)
    assert metrics["credit/kept"] == pytest.approx(kept / len(rollouts))
    assert {"credit/outcome/mean", "credit/spans:turn/std", "credit/spans:call/mean"} <= metrics.keys()


def test_the_kl_in_the_reward(trainers, queue: Queue, imported_verl) -> None:
    """What verl takes off the tokens' rewards is in the rollout's."""
    adapter.register(credit=credit.outcome(baseline="none", scale="none"))
    rollouts = rollouts_of(2)
    batch = queue.put_rollouts(rollouts, ref_log_prob=[1.5 * torch.tensor(x.old) for x in rollouts])
    config = config_of(NAME, use_kl_in_reward=True, kl_penalty="kl")
    trainer = SimpleNamespace(config=config, tokenizer=None, kl_ctrl_in_reward=imported_verl.FixedKLController(0.2))
    trainers.v1.PPOTrainer._compute_advantage(trainer, batch, metrics={})
    kl = [sum(-0.5 * y * m for y, m in zip(x.old, x.mask, strict=True)) for x in rollouts]
    expected = [[(x.score - 0.2 * k) * m for m in x.mask] for x, k in zip(rollouts, kl, strict=True)]
    close(queue.column(rollouts, "advantages"), expected)


def test_all_that_learn_leave_the_queue_alone(trainers, queue: Queue) -> None:
    adapter.register(credit=credit.outcome("tone"))
    rollouts = rollouts_of(1)
    batch = queue.put_rollouts(rollouts)
    masks = [queue.rows[key]["response_mask"] for key in batch.keys]
    v1(trainers, batch)
    assert all(queue.rows[key]["response_mask"] is mask for key, mask in zip(batch.keys, masks, strict=True))


def test_padding_is_nobodys_equal(trainers, queue: Queue) -> None:
    """Rows that verl makes up are in no statistic, not even in one of the whole batch."""
    adapter.register(credit=credit.outcome("tone", within="batch"))
    rollouts = rollouts_of(4)
    made_up = Rollout(
        **vars(rollouts[0]) | {"uid": "pad1", "mask": [0], "response": [1], "old": [0.0], "sampler": [0.0]}
    )
    v1(trainers, queue.put_rollouts([made_up, *rollouts]))
    tones = np.array([x.extra["reward_extra_info"]["tone"] for x in rollouts])
    expected = (tones - tones.mean()) / (tones.std(ddof=1) + 1e-6)
    close([x[:1] for x in queue.column(rollouts, "advantages")], [[x] for x in expected])
    assert queue.column([made_up], "advantages") == [[0.0]]


def test_outputs_of_one_session_are_one_rollout(trainers, queue: Queue) -> None:
    """As verl's own GRPO for it: the last output's reward is compared, once, and all of them learn from it."""
    rollouts = rollouts_of(5, groups=2)
    first = [Rollout(**vars(x) | {"number": 0, "score": 0.5}) for x in rollouts[::3]]
    later = [Rollout(**vars(x) | {"number": 1}) for x in rollouts[::3]]
    outputs = [*first, *(x for n, x in enumerate(rollouts) if n % 3), *later]
    found = {}
    for name in (NAME, "grpo"):
        adapter.register(credit=credit.outcome() if name == NAME else None)
        v1(trainers, queue.put_rollouts(outputs), name)
        found[name] = queue.column(outputs, "advantages")
    masked = [[a * m for a, m in zip(x, of.mask, strict=True)] for x, of in zip(found["grpo"], outputs, strict=True)]
    close(found[NAME], masked)
    assert len({x[0] for x in found[NAME]}) > 2


def packed_rollouts(rollouts: list[Rollout]) -> credit.Rollouts:
    """The same batch as rollouts, packed by a loop over its rows."""
    tokens, masks, old, teacher, calls = [], [], [], [], []
    for row, x in enumerate(rollouts):
        start = len(tokens) + len(x.prompt)
        calls += [(start + a, start + b, row, n) for n, (a, b) in enumerate(x.turns[:-1])]
        tokens += x.prompt + x.response
        masks += [0] * len(x.prompt) + x.mask
        old += [0.0] * len(x.prompt) + x.old
        teacher += [0.0] * len(x.prompt) + [0.9 * y for y in x.old]
    bounds = np.cumsum([0, *(len(x.prompt) + len(x.response) for x in rollouts)])
    batch = tk.PackedBatch(
        torch.tensor(tokens),
        torch.from_numpy(bounds),
        torch.tensor(masks) != 0,
        torch.tensor([int(x.uid[-1]) for x in rollouts]),
        torch.tensor([x.score for x in rollouts]),
        old_logprobs=torch.tensor(old),
    )
    extra = [x.extra["reward_extra_info"] for x in rollouts]
    turns = [y for x in rollouts for y in x.extra["turn_scores"]]
    rewards = {name: torch.tensor([float(x[name]) for x in extra]) for name in extra[0] if name != "score"}
    rewards["reward"] = batch.rewards
    spans = tk.Spans(*torch.tensor(calls).unbind(1), len(tokens))
    flags = {"well_formed": torch.tensor([x["well_formed"] for x in extra])}
    scores = {"turn": torch.tensor(turns)}
    return credit.Rollouts(batch, rewards, {"call": spans}, scores, flags, teacher_logprobs=torch.tensor(teacher))


def taught(data: Any) -> Any:
    """With a teacher whose numbers stand, as verl's do, at the token before."""
    wide = torch.cat((data.batch["prompts"], data.batch["responses"]), 1)
    logprobs = torch.zeros(wide.shape)
    logprobs[:, -data.batch["responses"].shape[1] :] = 0.9 * data.batch["old_log_probs"]
    data.batch["teacher_ids"] = torch.stack((wide.roll(-1, 1), 0 * wide - 1), -1)
    data.batch["teacher_logprobs"] = torch.stack((logprobs.roll(-1, 1), logprobs - 5), -1)
    return data


@pytest.mark.parametrize("name", ["psr", "nsr", "w_reinforce", "skillrl", "rlcr", "srl", "toolpo", "feedback"])
def test_every_name_of_a_preset_is_its_credit(trainers, name: str) -> None:
    estimators, _ = adapter.register()
    assert f"trajkern_{name}" in estimators
    rollouts = rollouts_of(6)
    for x in rollouts:
        more = {"action": x.score / 2, "confidence": 0.25 + x.score / 2, "similarity": x.score / 3}
        x.extra["reward_extra_info"] |= more
    found = legacy(trainers, taught(padded(rollouts)), f"trajkern_{name}")
    expected = credit.PRESETS[name]()(packed_rollouts(rollouts))
    for x, y in (("advantages", expected.advantages), ("response_mask", expected.mask)):
        rows = [row[: len(of.mask)] for row, of in zip(found.batch[x], rollouts, strict=True)]
        whole = torch.cat(
            [torch.cat((torch.zeros(len(of.prompt)), row)) for of, row in zip(rollouts, rows, strict=True)]
        )
        torch.testing.assert_close(whole, y.float())
        assert bool(whole.any())


def test_a_teacher_in_the_queue(trainers, queue: Queue) -> None:
    """verl's distillation teacher has k tokens a position, among which the one that came next."""
    adapter.register(credit=credit.directive(where="failed"))
    rollouts = rollouts_of(6)
    data = taught(padded(rollouts))
    real = data.batch["attention_mask"].bool()
    columns = {
        name: [x[y] for x, y in zip(data.batch[name], real, strict=True)]
        for name in ("teacher_ids", "teacher_logprobs")
    }
    v1(trainers, queue.put_rollouts(rollouts, **columns))
    expected = [[-0.1 * y * m * (x.score <= 0) for y, m in zip(x.old, x.mask, strict=True)] for x in rollouts]
    close(queue.column(rollouts, "advantages"), expected)
    learns = [[m * (x.score <= 0) for m in x.mask] for x in rollouts]
    assert queue.column(rollouts, "response_mask") == learns and 0 < sum(map(sum, learns))


def test_every_preset_is_a_name_or_refused(trainers) -> None:
    estimators, _ = adapter.register()
    for name, preset in credit.PRESETS.items():
        if f"trajkern_{name}" not in estimators:
            with pytest.raises(ValueError, match="credit must do without"):
                adapter.register(credit=preset())


def padded_again(data: Any) -> Any:
    return type(data)(batch=data.batch.clone(), non_tensor_batch=dict(data.non_tensor_batch))


def test_verls_own_estimators_stay(trainers) -> None:
    """What is not a credit goes to verl's function, by both spellings of its name."""
    data = padded(rollouts_of(7))
    expected = trainers.legacy.compute_advantage(padded_again(data), "grpo", config=config_of("grpo").algorithm)
    adapter.register()
    kinds = "grpo", trainers.legacy.AdvantageEstimator.GRPO
    for kind in kinds:
        found = trainers.of_v1.compute_advantage(padded_again(data), kind, config=config_of("grpo").algorithm)
        assert torch.equal(found.batch["advantages"], expected.batch["advantages"])
        assert torch.equal(found.batch["response_mask"], data.batch["response_mask"])


def test_a_shared_reward_function_and_texts(trainers, queue: Queue) -> None:
    """A function of the rollouts sees the data set's columns, and what the default trainer's tokenizer says."""

    def long_and_first(rollouts: credit.Rollouts) -> torch.Tensor:
        first = [row["index"] % 2 for row in rollouts.rows]
        return torch.tensor([len(text) + n for text, n in zip(rollouts.texts, first, strict=True)])

    rollouts = rollouts_of(8)
    tokenizer = SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["x" * len(x) for x in ids])
    adapter.register(credit=credit.outcome(long_and_first, within="batch", scale="none"))
    v1(trainers, queue.put_rollouts(rollouts, index=list(range(len(rollouts)))), tokenizer=tokenizer)
    values = np.array([len(x.response) + n % 2 for n, x in enumerate(rollouts)])
    close([x[:1] for x in queue.column(rollouts, "advantages")], [[x] for x in values - values.mean()])


def test_spans_that_an_agent_loop_wrote_down(trainers, queue: Queue) -> None:
    """``extra_fields["spans"]`` and their rewards; tokens outside of an ``only`` leave both masks."""
    rollouts = rollouts_of(9)
    for n, x in enumerate(rollouts):
        x.extra["spans"] = {"thought": [[0, 1]]} if n % 4 else None
        x.extra["span_rewards"] = {"thought": [float(n)]} if n % 4 else None
    spec = credit.spans("thought", baseline="none", scale="none").only("thought")
    expected = [[float(n) * (n % 4 > 0)] + [0.0] * (len(x.mask) - 1) for n, x in enumerate(rollouts)]
    adapter.register(credit=spec)
    v1(trainers, queue.put_rollouts(rollouts))
    close(queue.column(rollouts, "advantages"), expected)
    learns = [[int(n % 4 > 0)] + [0] * (len(x.mask) - 1) for n, x in enumerate(rollouts)]
    assert queue.column(rollouts, "loss_mask") == queue.column(rollouts, "response_mask") == learns
    data = legacy(trainers, padded(rollouts))
    close(unpadded(rollouts, data.batch["advantages"]), expected)


def test_page(trainers, queue: Queue) -> None:
    """docs/verl.md: its credit, chosen as its command says, of what its reward function returns."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "verl.md").read_text()
    section = page[page.index("## Credit") : page.index("## What stays")]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.S | re.M)
    assert [language for language, _ in blocks] == ["python", "", "python"]
    module, command, reward = (text for _, text in blocks)
    names: dict[str, Any] = {}
    exec(module, names)
    exec(reward, names)
    (estimator,) = re.findall(r"algorithm.adv_estimator=(\S+)", command)
    rollouts, texts = rollouts_of(3), ("it is 7</answer>", "it is 8!</answer>", "7!!</answer>", "7")
    for n, x in enumerate(rollouts):
        x.extra["reward_extra_info"] = names["compute_score"]("sums", texts[n % 4], "7")
        x.score = x.extra["reward_extra_info"]["score"]
    v1(trainers, queue.put_rollouts(rollouts), estimator)
    spec = names["spec"].gate("well_formed").asymmetric(positive=0.5)
    expected = spec(packed_rollouts(rollouts))
    rows = zip(rollouts, queue.column(rollouts, "advantages"), strict=True)
    found = [y for x, row in rows for y in (*[0.0] * len(x.prompt), *row)]
    torch.testing.assert_close(torch.tensor(found), expected.advantages)
    assert bool(expected.advantages.any()) and not bool(expected.keep.all())
    refused = re.findall(r"^\| `recipe\(\"(\w+)\"\)`, trees, `divergence\(\)` \| refused", section, re.M)
    assert refused == ["dro"]
