"""The loss of a forest: prefixes trained once give the loss, the gradient and the metrics of the flat rollouts."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern.trainer.forest import Forest, Lesson
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.tokenizer import encode
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.packing import pack_rollouts
from trajkern.trainer.sampling import sample
from trajkern.trainer.update import policy_term


@pytest.fixture
def model() -> CharacterModel:
    torch.manual_seed(0)
    return CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=48)).double()


def make_batch(model: CharacterModel) -> tk.PackedBatch:
    """Twelve rollouts of three prompts, some of them alike."""
    prompts = [encode("4-1="), encode("17+25-3="), encode("1")]
    with torch.no_grad():
        model.head.weight.mul_(3)  # a sharper policy repeats itself
    rollouts = sample(model, prompts, copies=4, max_new=5, generator=torch.Generator().manual_seed(1))
    rewards = torch.randint(2, (12,), generator=torch.Generator().manual_seed(2)).double()
    return pack_rollouts(rollouts, rewards, torch.arange(3).repeat_interleave(4))


def outcome(model: CharacterModel, loss: Tensor, metrics: dict[str, Tensor]) -> dict[str, Any]:
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return {"loss": loss.detach(), **metrics} | {f"grad {i}": g for i, g in enumerate(grads)}


def flat_outcome(
    model: CharacterModel, batch: tk.PackedBatch, advantages: Tensor, config: tk.PolicyLoss, logprobs: dict[str, Tensor]
) -> dict[str, Any]:
    pairs = batch.head_inputs()
    stats = tk.token_stats(model(batch.tokens, batch.cu_seqlens, pairs.rows), pairs.targets)
    per_pair = {name: x[pairs.tokens] for name, x in logprobs.items()}
    per_pair |= {"advantages": advantages, "cu_seqlens": pairs.cu_seqlens, "entropy": stats.entropy}
    per_token = advantages.shape[0] != batch.num_trajectories
    return outcome(model, *tk.policy_loss(stats.logprobs, config=config, per_token=per_token, **per_pair))


def tree_outcome(
    model: CharacterModel, lesson: Lesson, config: tk.PolicyLoss, logprobs: dict[str, Tensor], head: str
) -> dict[str, Any]:
    pairs = lesson.pairs()
    per_pair = {name: x[pairs.tokens] for name, x in logprobs.items()}
    run: Any = SimpleNamespace(policy=model, config=SimpleNamespace(loss=config, temperature=1.0))
    loss, metrics = policy_term(run, lesson, pairs, per_pair.pop("old_logprobs", None), head, per_pair)
    del metrics["logprobs"]
    return outcome(model, loss, metrics)


def check_same(flat: dict[str, Any], packed: dict[str, Any]) -> None:
    assert flat.keys() == packed.keys()
    for name, expected in flat.items():
        torch.testing.assert_close(packed[name].double(), expected.double(), rtol=1e-6, atol=1e-7, msg=name)


def prepare(model: CharacterModel) -> tuple[tk.PackedBatch, Forest, dict[str, Tensor], dict[str, Tensor]]:
    """The batch, its forest, and old, reference and sampler's log-probs a step away, for either."""
    batch = make_batch(model)
    forest = Forest.from_batch(batch)
    assert forest.tree.num_tokens < 0.8 * batch.num_tokens, "the case needs shared prefixes"
    generator = torch.Generator().manual_seed(3)
    noise = [0.2 * torch.randn(forest.tree.num_tokens, generator=generator, dtype=torch.float64) for _ in range(3)]
    names = ("old_logprobs", "ref_logprobs", "sampler_logprobs")
    packed = {name: forest.sampler_logprobs.double() + x for name, x in zip(names, noise, strict=True)}
    return batch, forest, {name: x[forest.tree.flat_index] for name, x in packed.items()}, packed


def lesson_of(batch: tk.PackedBatch, forest: Forest, spec: credit.Spec, **known: Any) -> Lesson:
    """What ``spec`` makes of all rollouts."""
    found = spec(credit.Rollouts(batch, **known))
    return Lesson.of(found, torch.ones_like(found.keep), forest)


def by_hand(advantages: Tensor, forest: Forest, batch: tk.PackedBatch, mask: Tensor) -> Lesson:  # [T], _, _, [T] flat
    """A credit of these values for each token of the flat rollouts."""
    lesson = lesson_of(batch, forest, credit.outcome())
    return dataclasses.replace(
        lesson, credit=dataclasses.replace(lesson.credit, advantages=advantages * mask, mask=mask, rows=None)
    )


@pytest.mark.parametrize("head", ["fused", "eager"])
@pytest.mark.parametrize("kind", tk.policy_loss_kinds)
def test_rollouts_that_share_a_prompt(model: CharacterModel, kind: str, head: str) -> None:
    batch, forest, flat, packed = prepare(model)
    assert torch.equal(forest.tokens[forest.tree.flat_index], batch.tokens)
    advantages = tk.group_advantages(batch.rewards, batch.group_ids)
    assert advantages.any()
    lesson = lesson_of(batch, forest, credit.outcome())
    for correction in ("none", "sequence_mask"):
        if correction != "none" and kind in ("kl_cov", "clip_cov"):
            continue
        bounds: dict[str, Any] = {"sampler_correction": correction, "sampler_low": 0.95, "sampler_high": 1.05}
        config = tk.PolicyLoss(kind, kl_coef=0.1, entropy_coef=0.01, max_length=5, **bounds)
        expected = flat_outcome(model, batch, advantages, config, flat)
        check_same(expected, tree_outcome(model, lesson, config, packed, head))


@pytest.mark.parametrize("head", ["fused", "eager"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "gspo", "kl_cov", "gmpo"])
def test_an_advantage_a_token(model: CharacterModel, kind: str, head: str) -> None:
    batch, forest, flat, packed = prepare(model)
    generator = torch.Generator().manual_seed(4)
    per_token = torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64)
    mask = batch.loss_mask & (torch.rand(batch.num_tokens, generator=generator) < 0.8)
    index = forest.tree.flat_index
    learns = torch.zeros(2, forest.tree.num_tokens, dtype=torch.bool)
    learns[0, index[mask]], learns[1, index[~mask]] = True, True
    assert learns.all(0).any(), "the case needs tokens that learn in one rollout and not in another"
    lesson, flat_batch = by_hand(per_token, forest, batch, mask), dataclasses.replace(batch, loss_mask=mask)
    config = tk.PolicyLoss(kind, kl_coef=0.1, clip_dual=2.0)
    expected = flat_outcome(model, flat_batch, per_token[mask], config, flat)
    check_same(expected, tree_outcome(model, lesson, config, packed, head))


@pytest.mark.parametrize("per", ["leaf", "token"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo", "gmpo", "luspo"])
@pytest.mark.parametrize("most", [1, 14, 25])
def test_micro_batches_add_up(model: CharacterModel, kind: str, per: str, most: int) -> None:
    """Each holds whole rollouts and at most that many tokens, or one rollout; the sums are the whole batch's."""
    batch, forest, _, packed = prepare(model)
    forest = dataclasses.replace(forest, sampler_logprobs=packed["old_logprobs"])
    whole = lesson_of(batch, forest, credit.outcome())
    if per == "token":
        generator = torch.Generator().manual_seed(5)
        advantages = torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64)
        whole = by_hand(advantages, forest, batch, batch.loss_mask & (torch.arange(batch.num_tokens) % 5 > 0))
    config = tk.PolicyLoss(kind, max_length=5)

    def outcome_of(lesson: Lesson, normalizer: float | None) -> dict[str, Any]:
        pairs = lesson.pairs()
        run: Any = SimpleNamespace(policy=model, config=SimpleNamespace(loss=config, temperature=1.0))
        old = lesson.forest.sampler_logprobs[pairs.tokens]
        loss, _ = policy_term(run, lesson, pairs, old, "fused", {}, normalizer)
        return outcome(model, loss, {})

    pieces = whole.pieces(most)
    assert all(p.forest.tree.num_tokens <= most or p.forest.tree.num_leaves == 1 for p in pieces)
    assert len(pieces) == forest.tree.num_leaves if most == 1 else 1 < len(pieces) < forest.tree.num_leaves
    outcomes = [outcome_of(piece, float(whole.units(config.resolved_aggregate))) for piece in pieces]
    check_same(outcome_of(whole, None), {name: sum(x[name] for x in outcomes) for name in outcomes[0]})


@pytest.mark.parametrize("tree", [False, True], ids=["prefixes found", "tree pruned"])
def test_a_lesson_is_of_the_rollouts_that_are_left(model: CharacterModel, tree: bool) -> None:
    batch = make_batch(model)
    forest = Forest.from_batch(batch)
    keep = torch.tensor([True, False, True, True, *[False] * 4, False, True, False, False])
    found = (credit.outcome() + credit.spans("turn", reward=_lengths))(credit.Rollouts(batch))
    lesson = Lesson.of(found, keep, forest if tree else None)
    tokens, index = torch.repeat_interleave(keep, batch.lengths), lesson.forest.tree.flat_index
    assert torch.equal(lesson.forest.tokens[index], batch.tokens[tokens])
    assert torch.equal(lesson.forest.loss_mask[index], batch.loss_mask[tokens])
    assert torch.equal(lesson.forest.tree.leaf_group, batch.group_ids[keep])
    assert torch.equal(lesson.credit.advantages, found.advantages[tokens]) and found.advantages[tokens].any()
    assert torch.equal(lesson.credit.mask, found.mask[tokens])
    assert lesson.forest.tree.num_tokens < forest.tree.num_tokens


def _lengths(rollouts: credit.Rollouts) -> Tensor:
    return rollouts.spans["turn"].lengths
