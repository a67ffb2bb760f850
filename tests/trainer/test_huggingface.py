"""A HuggingFace model as the policy: exact packing, a cache that agrees with it, and steps that train it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trajkern as tk
from trajkern.trainer import train as training
from trajkern.trainer.config import PRETRAINED, Evaluation, TrainConfig
from trajkern.trainer.models.huggingface import HuggingFacePolicy
from trajkern.trainer.packing import pack_rollouts
from trajkern.trainer.sampling import left_padded, read_prompts, sample
from trajkern.trainer.tasks import Task, load_task
from trajkern.trainer.tree_sampling import TreeShape, grow, plant

transformers = pytest.importorskip("transformers", reason="the trainer's extra is not installed")


@pytest.fixture(scope="module")
def folder(make_llama: Callable[..., Path]) -> Path:
    return make_llama()


@pytest.fixture
def policy(folder: Path) -> HuggingFacePolicy:
    return HuggingFacePolicy.load(str(folder))


def _check_packing(policy: HuggingFacePolicy, atol: float) -> None:
    parts = [torch.randint(5, 200, (n,), generator=torch.Generator().manual_seed(n)) for n in (6, 1, 9)]
    with torch.no_grad():
        packed = policy(torch.cat(parts), torch.tensor([0, 6, 7, 16]), torch.arange(16))
        alone = torch.cat([policy.model(part[None]).logits[0] for part in parts])
    torch.testing.assert_close(packed, alone, rtol=0, atol=atol)


def _check_sampling(policy: HuggingFacePolicy, prompts: list[list[int]], atol: float) -> None:
    count = 2 * len(prompts)
    rollouts = sample(policy, prompts, copies=2, max_new=4, generator=torch.Generator().manual_seed(1))
    batch = pack_rollouts(rollouts, torch.zeros(count), torch.arange(count))
    rows, targets, tokens, _ = batch.head_inputs()
    with torch.no_grad():
        logits = policy(batch.tokens, batch.cu_seqlens, rows)
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(batch.sampler_logprobs[tokens], expected, rtol=0, atol=atol)


def test_packed_equals_one_at_a_time(policy: HuggingFacePolicy) -> None:
    _check_packing(policy, 1e-5)


def test_sampled_logprobs_equal_a_packed_forward(policy: HuggingFacePolicy) -> None:
    _check_sampling(policy, [[5, 60, 7], [9], [30, 31, 32, 33, 34]], 1e-5)


def test_packed_tree_equals_each_branch_alone(policy: HuggingFacePolicy, tree: tk.Tree, check_tree: Callable) -> None:
    check_tree(policy, tree, 1e-5)


def test_trees_grow_from_the_cache_of_their_prefixes(policy: HuggingFacePolicy, check_forest: Callable) -> None:
    newline = policy.answer("\n")[0]
    with torch.no_grad():
        policy.model.lm_head.weight[newline] *= 3
    prompts = [[5, 60, 7], [9], [30, 31, 32, 33, 34]]
    shape = TreeShape(trees=2, expansions=2, rounds=2, keep=5)
    nodes = grow(policy, prompts, shape, max_new=8, generator=torch.Generator().manual_seed(0))
    assert len(nodes) > 6 * 6, "the case needs completions of several steps"
    check_forest(policy, plant(nodes, shape.trees), 1.0, 1e-5)


def test_a_cache_that_forgot_the_prefix_is_refused(policy: HuggingFacePolicy) -> None:
    cache = policy.start(1, 4)
    policy.extend(torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool), cache)
    cache.branch(torch.tensor([0]), torch.tensor([2]), 1)
    cache.keep = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="model must keep the keys of a whole prefix"):
        cache.branch(torch.tensor([0]), torch.tensor([2]), 1)


SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("hyperclovax", {"num_key_value_heads": 1, "logits_scaling": 3.0}, {"softcap": None, "logit_scale": 3.0}),
        ("gemma2", {"num_key_value_heads": 1, "head_dim": 8}, {"softcap": 30.0, "logit_scale": 1.0}),
        ("llama", {"num_key_value_heads": 1, "logit_scale": 7.0}, {"softcap": None, "logit_scale": 1.0}),
    ],
)
def test_the_head_s_form_is_measured(kind: str, options: dict[str, Any], expected: dict[str, Any]) -> None:
    config = transformers.AutoConfig.for_model(kind, **SMALL, intermediate_size=32, pad_token_id=0, **options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    arguments = HuggingFacePolicy(model, SimpleNamespace(eos_token_id=0)).head_arguments()
    assert {name: arguments[name] for name in expected} == expected


def test_a_transform_before_the_head_is_refused() -> None:
    config = transformers.BertConfig(**SMALL, intermediate_size=32, is_decoder=True)
    with pytest.raises(ValueError, match="backbone's own states; BertLMHeadModel changes them first"):
        HuggingFacePolicy(transformers.BertLMHeadModel(config), SimpleNamespace(eos_token_id=0))


def test_prompts_show_answered_questions_first(folder: Path) -> None:
    questions = load_task("chain_sum_text").distinct(3, 10)
    policy = HuggingFacePolicy.load(str(folder), questions[:2])
    expected = "".join(f"{q.text}\n{q.answer}\n\n" for q in questions[:2]) + questions[2].text + "\n"
    assert policy.text(policy.prompt(questions[2])) == expected.strip()
    assert policy.answer("-12")[-1] == policy.eos and policy.text(policy.answer("-12")) == "-12"
    policy._tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    turns = "".join(f"[user]{q.text}[assistant]{q.answer}" for q in questions[:2])
    assert policy.text(policy.prompt(questions[2])) == f"{turns}[user]{questions[2].text}[assistant]"


def _settings(out: Path, model: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(
        PRETRAINED,
        model=model,
        task="chain_sum_text",
        steps=2,
        prompts=2,
        rollouts=2,
        questions=50,
        shots=0,
        max_new=3,
        out=out,
        checkpoint_every=0,
        eval=Evaluation(heldout=1, validation=1, samples=2, every=10),
        **changes,
    )


def _train_two_steps(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict], Callable[[], bool]]:
    """Two steps on rewards dealt alternately, so that every group has something to learn from."""
    dealt = itertools.cycle((0.0, 1.0))
    monkeypatch.setattr(Task, "reward", lambda task, question, answer: next(dealt))
    steps: list[dict] = []
    original, policies = training.update, []

    def update(run, credit):
        policies.append((run.policy, {k: v.detach().clone() for k, v in run.policy.named_parameters() if "norm" in k}))
        steps.append(original(run, credit))
        return steps[-1]

    monkeypatch.setattr(training, "update", update)
    training.train(config).checkpoint.unlink()  # a large model's would fill the disk

    def moved() -> bool:
        policy, before = policies[0]
        return all(not torch.equal(v, before[k]) for k, v in policy.named_parameters() if k in before)

    return steps, moved


def test_trains_from_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, moved = _train_two_steps(_settings(tmp_path / "run", str(folder), threads=1), monkeypatch)
    assert len(steps) == 2 and moved()
    assert all(step["sampler_drift"] < 1e-4 and step["entropy"] > 0 for step in steps)


@pytest.mark.slow
def test_smollm2_trains_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2: str) -> None:
    checked: list[bool] = []
    begin = training.begin_main

    def begin_after_checks(run) -> None:
        _check_packing(run.policy, 2e-4)  # logits up to 30
        _check_sampling(run.policy, [run.policy.prompt(q) for q in run.splits.heldout], 2e-4)
        checked.append(True)
        begin(run)

    monkeypatch.setattr(training, "begin_main", begin_after_checks)
    steps, moved = _train_two_steps(_settings(tmp_path / "run", smollm2), monkeypatch)
    assert checked and len(steps) == 2 and moved()
    assert all(step["sampler_drift"] < 1e-3 and step["entropy"] > 0 for step in steps)


def test_selected_sequences_go_on_as_they_would_have(policy: HuggingFacePolicy) -> None:
    tokens, keep = left_padded([policy.encode(text) for text in ("12+3=", "1", "abc")], policy.eos)
    found = []
    for rows in (torch.arange(3), torch.tensor([0, 2])):
        _, cache = read_prompts(policy, tokens, keep, torch.ones(3, dtype=torch.int64), 3)
        cache = cache.select(rows) if len(rows) < 3 else cache
        for token in (5, 6, 7):
            more = torch.full((len(rows), 1), token)
            with torch.no_grad():
                last = policy.extend(more, more > 0, cache)
        found.append(last)
    torch.testing.assert_close(found[0][[0, 2]], found[1], rtol=0, atol=1e-5)
    assert (found[0][1] - found[0][0]).abs().max() > 1e-3
