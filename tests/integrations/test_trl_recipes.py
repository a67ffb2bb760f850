"""Recipes by name in TRL's GRPOTrainer: two steps of each, and every generation's credit again by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
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
    similarity,
    spoken,
    trainer_of,
    won,
)
from trajkern import credit  # noqa: E402
from trajkern.integrations import trl as adapter  # noqa: E402
from trajkern.recipes import delta_belief, dro, nsr, rlcr, srl  # noqa: E402

GROUPS = torch.arange(8) // 4
HINT = 5  # the token that the teacher is shown


class Batch:
    """A generation, as plain lists, and what the policy makes of it, before it learns of it."""

    def __init__(self, trainer: Any, examples: list[dict[str, Any]], inputs: dict[str, Any]) -> None:
        self.model, self.encode, self.examples = trainer.model, trainer.processing_class, examples
        real = [inputs[f"{x}_mask"].bool() for x in ("prompt", "completion")]
        self.prompts = [x[m].tolist() for x, m in zip(inputs["prompt_ids"], real[0], strict=True)]
        self.completions = [x[m].tolist() for x, m in zip(inputs["completion_ids"], real[1], strict=True)]
        self.length = inputs["completion_ids"].shape[1]
        self.texts = trainer.processing_class.batch_decode(self.completions, skip_special_tokens=True)
        self.masks = spoken([x["prompt"] for x in examples], trainer)["env_mask"]

    def turns(self, n: int) -> list[tuple[int, int]]:
        """The runs of ones of a completion's mask."""
        runs, found, at = [(k, len(list(x))) for k, x in groupby(self.masks[n])], [], 0
        for kind, length in runs:
            found += [(at, at + length)] * kind
            at += length
        return found

    def logprobs(self, context: list[int], target: list[int]) -> Tensor:
        with torch.no_grad():
            logits = self.model(torch.tensor([context + target])).logits[0, len(context) - 1 : -1].double()
        return logits.log_softmax(1).gather(1, torch.tensor(target)[:, None])[:, 0]

    def rows(self, values: Tensor, inside: Callable[[int], list[tuple[int, int]]] | None = None) -> Tensor:
        """``[8]`` on what the policy wrote, or on those ranges of it."""
        out = torch.zeros(8, self.length, dtype=torch.float64)
        for n in range(8):
            for begin, end in (inside or self.turns)(n):
                out[n, begin:end] = values[n]
        return out

    def written(self, keep: Tensor | None = None, inside: Any = None) -> Tensor:
        return self.rows(torch.ones(8) if keep is None else keep.double(), inside) > 0


def numbers(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([float("nan") if x is None else x for x in values], dtype=torch.float64)


def of_group(rewards: Tensor, **options: Any) -> Tensor:
    return tk.group_advantages(rewards, GROUPS, **options)


Made = tuple[Tensor, Tensor]  # advantages [8, L], the tokens that learn
CENTRED: dict[str, Any] = {"scale": "none", "singleton": "zero"}


def grpo(batch: Batch) -> Made:
    return batch.rows(of_group(numbers(won(batch.texts)))), batch.written()


def signs(kind: str) -> Callable[[Batch], Made]:
    def made(batch: Batch) -> Made:
        rows, keep = nsr.advantages(numbers(won(batch.texts)), kind=kind)
        return batch.rows(torch.where(keep, rows, 0)), batch.written(keep)

    return made


def toolpo(batch: Batch) -> Made:
    rows, calls = (of_group(numbers(x(batch.texts)), **CENTRED) for x in (won, action))
    return batch.rows(rows) + batch.rows(calls, lambda n: batch.turns(n)[:1]), batch.written()


def rlcr_(batch: Batch) -> Made:
    said = numbers(confidence(batch.texts))
    rewards = rlcr.rewards(numbers(won(batch.texts)), said.nan_to_num(), well_formed=~said.isnan())
    return batch.rows(of_group(rewards, **CENTRED)), batch.written()


def srl_(batch: Batch) -> Made:
    alike = numbers(similarity(batch.texts))
    rewards = srl.rewards(alike.nan_to_num(), ~alike.isnan())
    keep = srl.keep_groups(rewards, GROUPS, min_std=1e-4)
    return batch.rows(of_group(rewards, gate=keep)), batch.written(keep)


def feedback(batch: Batch) -> Made:
    advantages = batch.rows(2 * numbers(won(batch.texts)) - 1)
    for n, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
        told = batch.logprobs([HINT, *prompt], completion) - batch.logprobs(prompt, completion)
        advantages[n, : len(completion)] += told
    return torch.where(batch.written(), advantages, 0), batch.written()


def dro_(batch: Batch) -> Made:
    parts = []
    for n, example in enumerate(batch.examples):
        reasoned = batch.prompts[n] + batch.completions[n][: batch.turns(n)[0][1]]
        parts.append(batch.logprobs(reasoned, batch.encode(example["reference"])["input_ids"]))
    bounds = torch.tensor([0, *map(len, parts)]).cumsum(0)
    reflection = tk.reflection_rewards(torch.cat(parts), bounds, GROUPS)
    keep = dro.keep_groups(reflection.group_score, drop_fraction=0.0)[GROUPS]
    rows, first = of_group(reflection.rewards, gate=keep), lambda n: batch.turns(n)[:1]
    return batch.rows(rows, first), batch.written(keep, first)


def delta_belief_(batch: Batch) -> Made:
    beliefs, counts, turns = [], [], []
    for n, example in enumerate(batch.examples):
        ends = [begin for begin, _ in batch.turns(n)] + [len(batch.completions[n])]
        target = batch.encode(example["belief_target"])["input_ids"]
        beliefs += [batch.logprobs(batch.prompts[n] + batch.completions[n][:end], target).sum() for end in ends]
        counts.append(len(ends))
        turns += [(n, index, *turn) for index, turn in enumerate(batch.turns(n))]
    bounds, right = torch.tensor([0, *counts]).cumsum(0), numbers(won(batch.texts)) > 0
    none = torch.zeros(len(turns), dtype=torch.float64)
    rewards = delta_belief.turn_rewards(torch.stack(beliefs), bounds, won=right, penalty=none)
    owner, index = (torch.tensor([x[i] for x in turns]) for i in (0, 1))
    values = delta_belief.turn_advantages(rewards, owner, index, GROUPS, finished="included")
    advantages = torch.zeros(8, batch.length, dtype=torch.float64)
    for value, (n, _, begin, end) in zip(values, turns, strict=True):
        advantages[n, begin:end] = value
    return advantages, batch.written()


def first_turns(rollouts: credit.Rollouts) -> tk.Spans:
    turns = rollouts.spans["turn"]
    first = turns.index == 0
    kept = (x[first] for x in (turns.start, turns.end, turns.trajectory, turns.index))
    return tk.Spans(*kept, turns.num_tokens)


def hinted(rollouts: credit.Rollouts) -> Tensor:
    begin = rollouts.prompt_lengths
    contexts = [[HINT, *x[:n]] for x, n in zip(rollouts.token_lists, begin, strict=True)]
    targets = [x[n:] for x, n in zip(rollouts.token_lists, begin, strict=True)]
    logprobs, bounds = rollouts.score(contexts, targets)
    told = torch.zeros(rollouts.batch.num_tokens)
    starts = rollouts.batch.cu_seqlens.tolist()
    for start, n, (low, high) in zip(starts, begin, pairwise(bounds.tolist()), strict=False):
        told[start + n : start + n + high - low] = logprobs[low:high]
    return told


BY_HAND: dict[str, Callable[[Batch], Made]] = {
    "grpo": grpo,
    "skillrl": grpo,
    "judge": grpo,
    **{kind: signs(kind) for kind in nsr.KINDS},
    "toolpo": toolpo,
    "dro": dro_,
    "delta_belief": delta_belief_,
    "rlcr": rlcr_,
    "srl": srl_,
    "feedback": feedback,
}
FEEDS: dict[str, dict[str, Any]] = {
    "toolpo": {"spans": {"call": first_turns}},
    "dro": {"spans": {"reasoning": first_turns}},
    "feedback": {"teacher_logprobs": hinted},
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2, "learning_rate": 0.1}
    return trainer_of(tmp_path_factory.mktemp("recipes"), rollout_func=spoken, **REWARDS, **sizes)


LIKE_OTHERS = ("grpo", "skillrl", "judge", "psr", "w_reinforce", "rlcr", "srl")
CASES = [pytest.param(x, marks=pytest.mark.slow if x in LIKE_OTHERS else ()) for x in BY_HAND]


@pytest.mark.parametrize("name", CASES)
def test_two_steps_have_the_credit_that_hands_compute(name: str, trainer: Any) -> None:
    adapter.enable(trainer, name, **FEEDS.get(name, {}))
    generate, expected, made = trainer._generate_and_score_completions, [], []

    def kept(examples: list[dict[str, Any]]) -> dict[str, Any]:
        made.append(generate(examples))
        expected.append(BY_HAND[name](Batch(trainer, examples, made[-1])))
        return made[-1]

    trainer._generate_and_score_completions = kept
    trainer.train()
    del trainer._generate_and_score_completions
    adapter.disable(trainer)
    assert len(made) == 2
    for inputs, (advantages, learns) in zip(made, expected, strict=True):
        ours = inputs["advantages"]
        ours = ours if ours.ndim == 2 else torch.where(inputs["tool_mask"].bool(), ours[:, None], 0)
        assert torch.equal(inputs["tool_mask"].bool(), learns)
        torch.testing.assert_close(ours.double(), advantages, rtol=1e-4, atol=1e-4)
        assert inputs["num_items_in_batch"] == learns.sum()
    assert any(x.any() for x, _ in expected) and not all(x.all() for _, x in expected)


def test_every_recipe_that_needs_no_tree_is_among_them() -> None:
    assert {name for name in credit.PRESETS if "tree" not in credit.recipe(name).needs} == BY_HAND.keys()
