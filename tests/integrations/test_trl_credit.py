"""Credits in TRL's GRPOTrainer: what feeds them, whole runs, refusals."""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

import trajkern as tk  # noqa: E402
from tests.integrations.trl_trainers import (  # noqa: E402
    REWARDS,
    action,
    confidence,
    examples_of,
    generated,
    similarity,
    spoken,
    trainer_of,
    trl,
    won,
)
from trajkern import credit  # noqa: E402
from trajkern.integrations import trl as adapter  # noqa: E402

SIZES = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2, "learning_rate": 0.1}
NAN = float("nan")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer of two-turn rollouts with four rewards."""
    trainer = trainer_of(tmp_path_factory.mktemp("credit"), rollout_func=spoken, **REWARDS, **SIZES)
    trainer.model.train()
    return trainer


@pytest.fixture
def trainer(shared: Any) -> Any:
    return shared


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a test enables is gone behind it."""
    yield
    for target in list(adapter._enabled):
        adapter.disable(target)


def seen(trainer: Any, **feeds: Any) -> credit.Rollouts:
    """The rollouts of a generation, as a function of them sees them."""
    found: list[credit.Rollouts] = []

    def constant(rollouts: credit.Rollouts) -> Tensor:
        found.append(rollouts)
        return torch.zeros(len(rollouts))

    adapter.enable(trainer, credit=credit.outcome(constant), **feeds)
    generated(trainer)
    return found[0]


# what feeds it


def test_what_a_credit_is_given(trainer: Any) -> None:
    rollouts = seen(trainer)
    examples = examples_of(trainer)
    said = spoken([x["prompt"] for x in examples], trainer)
    decode = trainer.processing_class.batch_decode
    texts = decode(said["completion_ids"], skip_special_tokens=True)
    assert list(rollouts.texts) == texts and list(rollouts.rows) == examples
    assert rollouts.token_lists == [
        prompt + said for prompt, said in zip(said["prompt_ids"], said["completion_ids"], strict=True)
    ]
    masks = [[0] * len(x) + y for x, y in zip(said["prompt_ids"], said["env_mask"], strict=True)]
    assert rollouts.batch.loss_mask.tolist() == [bool(x) for mask in masks for x in mask]
    assert len(rollouts.spans["turn"]) == sum(1 + (0 in mask) for mask in said["env_mask"])
    assert rollouts.batch.group_ids.tolist() == [0] * 4 + [1] * 4
    for name, function in {"won": won, "action": action, "confidence": confidence}.items():
        expected = torch.tensor([NAN if x is None else x for x in function(texts)])
        torch.testing.assert_close(rollouts.rewards[name], expected, equal_nan=True)
    assert torch.equal(rollouts.rewards["reward"], rollouts.rewards["won"])
    assert rollouts.flags["fine"].tolist() == [True] * 4 + [False] * 4
    assert rollouts.flags.keys() == {"fine"} and rollouts.process_group is None


def test_log_probs_that_trl_has(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old ones and the sampler's, of which one is missing; weights of what does not learn are 1, as TRL has them."""
    generate = trl.GRPOTrainer._generate_and_score_completions
    shape: list[torch.Size] = []

    def as_with_a_sampler(self: Any, examples: list[dict[str, Any]]) -> dict[str, Any]:
        made = generate(self, examples)
        g, shape[:] = torch.Generator().manual_seed(1), [made["completion_ids"].shape]
        old, sampler, ratio = (torch.randn(shape[0], generator=g) for _ in range(3))
        sampler[0, 0] = torch.nan
        return made | {
            "old_per_token_logps": old,
            "sampling_per_token_logps": sampler,
            "importance_sampling_ratio": ratio.exp(),
        }

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_and_score_completions", as_with_a_sampler)
    rollouts = seen(trainer)
    g, mask = torch.Generator().manual_seed(1), rollouts.batch.loss_mask
    old, sampler, ratio = (torch.randn(shape[0], generator=g) for _ in range(3))
    sampler[0, 0] = old[0, 0]
    written = torch.zeros(shape[0], dtype=torch.bool)
    for n, row in enumerate(spoken([x["prompt"] for x in examples_of(trainer)], trainer)["env_mask"]):
        written[n, : len(row)] = torch.tensor(row) > 0
    for packed, padded in ((rollouts.batch.old_logprobs, old), (rollouts.batch.sampler_logprobs, sampler)):
        assert packed is not None and torch.equal(packed[mask], padded[written])
    adapter.enable(trainer, credit=credit.outcome().gate(loud))
    made = generated(trainer)
    learns = made["tool_mask"].bool()
    assert 0 < int(learns.sum()) < int(written.sum())
    assert torch.equal(made["importance_sampling_ratio"], torch.where(learns, ratio.exp(), 1.0))


def test_a_trainer_s_own_credit_goes_before_its_class_s(tmp_path: Path) -> None:
    adapter.enable(trl.GRPOTrainer, credit=credit.outcome("similarity"))
    trainer = trainer_of(tmp_path, rollout_func=spoken, **REWARDS)
    adapter.enable(trainer, "psr")
    assert set(generated(trainer)["advantages"].tolist()) == {0.0, 1.0}
    adapter.disable(trainer)
    assert generated(trainer)["advantages"].unique().numel() > 2
    for heir in (trainer, type("Heir", (trl.GRPOTrainer,), {})):  # whose advantages would not be TRL's
        with pytest.raises(ValueError, match="credit must be given for what inherits from GRPOTrainer, which has one"):
            adapter.enable(heir)


def calls(rollouts: credit.Rollouts) -> tk.Spans:
    """The last two tokens of every turn that has three."""
    turns = rollouts.spans["turn"]
    long = turns.lengths == 3
    end, owner, index = (x[long] for x in (turns.end, turns.trajectory, turns.index))
    return tk.Spans(end - 2, end, owner, index, turns.num_tokens)


def call_ids(rollouts: credit.Rollouts) -> Tensor:
    return rollouts.batch.tokens[rollouts.spans["call"].start].float()


def test_a_composed_credit_is_what_hands_compute(trainer: Any) -> None:
    """Outcome and spans behind a gate, failure weighed three times as much as success, in two steps."""
    spec = (credit.outcome(eps=0.0) + 0.5 * credit.spans("call", scale="none", singleton="zero")).gate(loud)
    adapter.enable(
        trainer,
        credit=spec.asymmetric(positive=0.5, negative=1.5),
        spans={"call": calls},
        span_rewards={"call": call_ids},
    )
    made, generate = [], trainer._generate_and_score_completions

    def kept(examples: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = generate(examples)
        made.append((inputs, *by_hand(trainer, examples, inputs)))
        return inputs

    trainer._generate_and_score_completions = kept
    trainer.train()
    del trainer._generate_and_score_completions
    assert len(made) == 2
    for inputs, expected, learns in made:
        torch.testing.assert_close(inputs["advantages"].double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(inputs["tool_mask"].bool(), learns)
    logged = trainer.state.log_history[0]
    assert {"credit/kept", "credit/outcome/mean", "credit/spans:call/std", "credit/positive"} <= logged.keys()
    assert 0 < logged["credit/kept"] < 1


def loud(rollouts: credit.Rollouts) -> Tensor:
    """Whether a completion has a vowel."""
    return rollouts.reward("action") > 0


def by_hand(trainer: Any, examples: list[dict[str, Any]], inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    real = inputs["completion_mask"].bool()
    rows = [x[m].tolist() for x, m in zip(inputs["completion_ids"], real, strict=True)]
    texts = trainer.processing_class.batch_decode(rows, skip_special_tokens=True)
    passes, right = [x > 0 for x in action(texts)], won(texts)
    masks = spoken([x["prompt"] for x in examples], trainer)["env_mask"]
    advantages, learns = torch.zeros(real.shape, dtype=torch.float64), torch.zeros_like(real)
    for group in (range(4), range(4, 8)):
        here = [n for n in group if passes[n]]
        values = [right[n] for n in here]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        called = [(n, at, rows[n][at]) for n in here for at in ends_of(masks[n])]
        mean = sum(x for *_, x in called) / max(len(called), 1)
        for n, value in zip(here, values, strict=True):
            centred = value - sum(values) / len(values) if len(values) > 1 else value
            for at, wrote in enumerate(masks[n]):
                learns[n, at] = wrote == 1
                advantages[n, at] = wrote * (centred / spread if spread else centred)
        for n, at, x in called:
            advantages[n, at : at + 2] += 0.5 * (x - mean) * (len(called) > 1)
    return torch.where(advantages > 0, 0.5, 1.5) * advantages, learns


def ends_of(mask: list[int]) -> list[int]:
    """Where the last two tokens of each run of three ones begin."""
    text = "".join(map(str, mask)) + "0"
    return [at + 1 for at in range(len(mask) - 2) if text[at : at + 4] == "1110" and (at == 0 or text[at - 1] == "0")]


def test_a_run_that_leaves_nothing_out_is_trl_s(tmp_path: Path) -> None:
    """GRPO's own advantages as a credit, over micro-batches of a generation, with completions that nobody scores."""

    def reward(completions: list[str], **_: Any) -> list[float | None]:
        return [None if x[0] < "f" else float(x[0] < "p") for x in completions]

    logs = []
    for ours in (False, True):
        options = {"gradient_accumulation_steps": 2, "beta": 0.05, "loss_type": "grpo", "max_steps": 2}
        trainer = trainer_of(tmp_path, rewards=reward, rollout_func=spoken, **options)
        if ours:
            own = credit.outcome(eps=1e-4, singleton="zero") + 0.0 * credit.outcome(silent)  # which keeps everybody
            adapter.enable(trainer, credit=own)
        trainer.train()
        adapter.disable(trainer)
        logs.append([x for x in trainer.state.log_history if "loss" in x])
    assert any(x["reward_std"] > 0 and x["grad_norm"] > 0 for x in logs[0])
    for theirs, mine in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "kl", "entropy", "reward"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


def silent(rollouts: credit.Rollouts) -> Tensor:
    return torch.zeros(len(rollouts))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score(trainer: Any, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts, of ids and of both, at a temperature that is not the trainer's; and the targets' places."""
    monkeypatch.setattr(trainer.args, "per_device_train_batch_size", 2)
    rollouts = seen(trainer)
    contexts: list[Any] = ["a b c", [4, 9, 5], ([7, 8], "d e"), ([6], "")]
    targets: list[Any] = ["x", [3, 4, 5], "q r", [28]]
    logprobs, bounds, places = rollouts.score(contexts, targets, temperature=temperature, ranks=True)
    assert bounds.tolist() == [0, 1, 4, 6, 7]
    encode = trainer.processing_class
    found = []
    for context, target in zip(([3, 4, 5], [4, 9, 5], [7, 8, 6, 7], [6]), targets, strict=True):
        ids = encode(target)["input_ids"] if isinstance(target, str) else target
        with torch.no_grad():
            logits = trainer.model(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1]
        chosen = torch.tensor(ids)[:, None]
        of_target = (logits / temperature).log_softmax(1).gather(1, chosen)[:, 0]
        place = logits.argsort(1, descending=True).argsort(1).gather(1, chosen)[:, 0]
        found.append((of_target, place + 1))
    torch.testing.assert_close(logprobs, torch.cat([x for x, _ in found]), rtol=1e-5, atol=1e-5)
    assert torch.equal(places, torch.cat([x for _, x in found]))
    with pytest.raises(ValueError, match=r"targets must have at least one token each; targets\[1\] has none"):
        rollouts.score([[3], [3]], [[4], ""])


# refusals


@pytest.mark.parametrize(
    "given, says",
    [
        ({"credit": credit.outcome("tone")}, r"GRPOTrainer can feed: .*needs 'tone'.* have action, .*, won"),
        ({"credit": credit.spans("call", reward=silent)}, "needs 'spans:call'"),
        ({"credit": credit.spans("turn")}, "needs 'span_rewards:turn'"),
        ({"credit": credit.directive()}, "needs 'teacher_logprobs'"),
        ({"credit": credit.outcome() + credit.divergence()}, "credit.divergence.* needs the policy's logits"),
        ({"credit": credit.recipe("tree_grpo")}, "needs a tree of rollouts, which TRL does not sample"),
        ({"recipe": "treerl"}, "needs a tree of rollouts"),
        ({"recipe": "toolpo"}, "needs 'spans:call'"),
        ({"recipe": "grpo", "credit": credit.outcome()}, "recipe and credit must not both be given"),
        ({"spans": {"call": calls}}, "spans must be given with a credit or the name of a recipe"),
        ({"recipe": silent, "teacher_logprobs": silent}, "teacher_logprobs must be given with a credit"),
        ({"credit": "tests.nowhere:spec"}, "package.module:name"),
    ],
)
def test_what_it_cannot_feed(given: dict[str, Any], says: str, trainer: Any) -> None:
    with pytest.raises(ValueError, match=says):
        adapter.enable(trainer, **given)
    assert not list(adapter._enabled)


def test_what_has_another_type(trainer: Any) -> None:
    for given, says in (
        ({"credit": 3}, "credit must be an expression of trajkern.credit"),
        ({"credit": credit.outcome(), "spans": calls}, "spans must be a mapping of names"),
        ({"credit": credit.outcome(), "span_rewards": {"call": 1}}, r"span_rewards\['call'\] must be a function"),
        ({"credit": credit.outcome(), "teacher_logprobs": 1}, "teacher_logprobs must be a function of rollouts"),
    ):
        with pytest.raises(TypeError, match=says):
            adapter.enable(trainer, **given)


def test_columns_are_asked_for_at_the_first_batch(trainer: Any) -> None:
    for spec, name in (
        (credit.outcome().gate("well_formed"), "flags:well_formed"),
        (credit.recipe("dro", span="turn").gate("fine"), None),
    ):
        adapter.enable(trainer, credit=spec)
        if name is None:
            generated(trainer)
        else:
            with pytest.raises(ValueError, match=f"needs '{name}'.* they have flags:fine"):
                generated(trainer)


def test_names_of_rewards(tmp_path: Path) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return won(completions)

    twice = trainer_of(tmp_path, rewards=[won, won])
    with pytest.raises(ValueError, match="reward_funcs must have names of their own.* got 'won' twice"):
        adapter.enable(twice, credit=credit.outcome())
    with pytest.raises(ValueError, match="none of them 'reward'.* got 'reward' twice"):
        adapter.enable(trainer_of(tmp_path, rewards=[won, reward]), credit=credit.outcome())

    def score(completions: list[str], **_: Any) -> list[float]:
        return won(completions)

    with pytest.raises(ValueError, match="reward_funcs must not be called tree, .* got 'score'"):
        adapter.enable(trainer_of(tmp_path, rewards=[won, score]), credit=credit.outcome())
    alone = trainer_of(tmp_path, rewards=reward)
    adapter.enable(alone, credit=credit.outcome())


def test_a_class_is_refused_when_a_trainer_is_made(tmp_path: Path) -> None:
    adapter.enable(trl.GRPOTrainer, credit=credit.outcome("similarity"))
    with pytest.raises(ValueError, match="needs 'similarity'"):
        trainer_of(tmp_path)
    trainer_of(tmp_path, rewards=similarity)


def test_a_gate_that_lets_nobody_through(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss of 0, which is said once."""
    monkeypatch.setattr("trajkern.integrations._trl_credit._silent", set())
    adapter.enable(trainer, credit=credit.outcome().gate(nobody))
    with pytest.warns(UserWarning, match="the credit keeps no rollout of a batch: its loss is 0"):
        made = generated(trainer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generated(trainer)
    assert not any("keeps no rollout" in str(x.message) for x in said)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, made)
    loss.backward()
    assert loss == 0 and not any(x.grad.any() for x in trainer.model.parameters() if x.grad is not None)
    trainer.model.zero_grad()


def nobody(rollouts: credit.Rollouts) -> Tensor:
    return torch.zeros(len(rollouts), dtype=torch.bool)
