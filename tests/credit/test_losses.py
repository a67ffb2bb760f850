"""The losses that read a credit: flat and on a tree; and presets beside the recipes that they are of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trajkern as tk
from tests.credit.conftest import rollouts_of
from trajkern import credit, recipes
from trajkern.recipes import delta_belief, feedback, nsr, rlcr, srl, toolpo, tree_grpo
from trajkern.testing.tree import random_tree

AGGREGATES = ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")


def grown(seed: int, **replaced: Any) -> tuple[credit.Rollouts, torch.Tensor]:
    """The flat rollouts of a random tree of three prompts, and log-probs of the packed tree's tokens."""
    g = torch.Generator().manual_seed(seed)
    tree = random_tree(g, 40)
    tree = tk.Tree(tree.parent, tree.node_lengths + 1, torch.arange(tree.num_roots) % 3)
    index, bounds = tree.flat_index, tree.flat_cu_seqlens
    scored = torch.rand(tree.num_tokens, generator=g) < 0.7
    scored &= tree.rows >= 0
    logprobs = -torch.rand(tree.num_tokens, generator=g, dtype=torch.float64)
    batch = tk.PackedBatch(
        torch.arange(tree.num_tokens)[index],
        bounds,
        scored[index],
        tree.leaf_group,
        torch.rand(tree.num_leaves, generator=g, dtype=torch.float64).round(decimals=1),
        sampler_logprobs=logprobs[index],
    )
    start = bounds[:-1] + 1
    end = torch.minimum(start + 3, bounds[1:])
    owner = torch.arange(tree.num_leaves)
    calls = tk.Spans(torch.minimum(start, end), end, owner, torch.zeros_like(owner), batch.num_tokens)
    known: dict[str, Any] = {
        "spans": {"call": calls},
        "span_rewards": {"call": torch.randn(len(calls), generator=g, dtype=torch.float64)},
        "flags": {"ok": torch.rand(tree.num_leaves, generator=g) < 0.7},
        "tree": tree,
    }
    return credit.Rollouts(batch, **(known | replaced)), logprobs


SPECS = {
    "rows": credit.outcome() + 0.3 * credit.outcome(within="tree"),
    "gated rows": credit.outcome().gate("ok").asymmetric(0.3, 1),
    "whitened rows": credit.outcome().gate("ok").whiten(),
    "spans": credit.outcome() + credit.spans("call"),
    "part of a rollout": credit.outcome().only("call") + credit.spans("call").gate("ok"),
    "nodes": credit.recipe("treerl") + 0.5 * credit.recipe("treerpo").gate("ok"),
    "steps": credit.recipe("gigpo").gate("ok"),
    "leaves": credit.recipe("treepo").gate("ok"),
    "unlikely tokens": credit.recipe("spo"),
}
KINDS = ("cispo", "sapo", "luspo")
WHOLE = ("rows", "gated rows", "whitened rows", "leaves")


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("kind", ("grpo", "gspo", *(pytest.param(x, marks=pytest.mark.slow) for x in KINDS)))
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_tree_is_flat(name: str, kind: str, aggregate: str) -> None:
    x, old = grown(len(name))
    config = tk.PolicyLoss(kind, aggregate=aggregate, max_length=30)
    if config.resolved_ratio_level == "sequence" and name not in WHOLE:
        with pytest.raises(ValueError, match=r"take logprobs\[tree.flat_index\] and loss_inputs"):
            SPECS[name](x).tree_inputs(config)
        return
    found, tree = SPECS[name](x), x.tree
    assert tree is not None
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    new = (old + 0.2 * noise).requires_grad_()
    index = tree.flat_index
    flat, of_flat = tk.policy_loss(
        new[index], old[index], cu_seqlens=x.batch.cu_seqlens, config=config, **found.loss_inputs()
    )
    (expected,) = torch.autograd.grad(flat, new)
    packed, of_tree = tk.policy_loss(new, old, cu_seqlens=tree.node_offsets, **found.tree_inputs(config))
    (grad,) = torch.autograd.grad(packed, new)
    torch.testing.assert_close(packed, flat, rtol=2e-14, atol=2e-14)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=2e-14)
    torch.testing.assert_close(of_tree["num_tokens"], of_flat["num_tokens"])


def test_at_pairs() -> None:
    x, old = grown(5)
    found, tree = SPECS["spans"](x), x.tree
    config = tk.PolicyLoss("dapo")
    pairs = tree.pairs(torch.arange(tree.num_tokens), found_mask(found))
    whole, _ = tk.policy_loss(old, None, cu_seqlens=tree.node_offsets, **found.tree_inputs(config))
    some, _ = tk.policy_loss(
        old[pairs.tokens], None, cu_seqlens=pairs.cu_seqlens, **found.tree_inputs(config, at=pairs.tokens)
    )
    torch.testing.assert_close(some, whole, rtol=1e-13, atol=1e-13)
    inputs = x.batch.head_inputs()
    flat = old[tree.flat_index]
    rows, _ = tk.policy_loss(
        flat[inputs.tokens], None, cu_seqlens=inputs.cu_seqlens, config=config, **found.loss_inputs(inputs.tokens)
    )
    torch.testing.assert_close(rows, whole, rtol=1e-13, atol=1e-13)


def found_mask(found: credit.Credit) -> torch.Tensor:
    return found.tree_inputs(tk.PolicyLoss("dapo"))["mask"]


def test_without_a_tree() -> None:
    with pytest.raises(ValueError, match="tree_inputs needs rollouts with a tree"):
        credit.outcome()(rollouts_of(0)).tree_inputs(tk.PolicyLoss("grpo"))


def each(values: torch.Tensor, x: credit.Rollouts) -> torch.Tensor:
    return torch.where(x.batch.loss_mask, torch.repeat_interleave(values, x.batch.lengths), 0)


def test_presets_of_rollouts() -> None:
    x = rollouts_of(1)
    reward, groups = x.reward("reward"), x.batch.group_ids
    for kind in nsr.KINDS:
        advantages, keep = nsr.advantages(reward, kind=kind)
        found = credit.recipe(kind)(x)
        assert torch.equal(found.advantages, each(advantages, x)) and torch.equal(found.keep, keep)
    assert torch.equal(credit.recipe("grpo")(x).advantages, each(recipes.grpo(x.batch), x))
    action = x.reward("tone")
    mask = x.spans["call"].token_span >= 0
    acting = toolpo.token_advantages(reward, action, groups, mask, x.batch.cu_seqlens)
    found = credit.recipe("toolpo", action="tone")(x)
    torch.testing.assert_close(found.advantages, torch.where(x.batch.loss_mask, acting, 0), rtol=1e-15, atol=1e-15)
    taught = feedback.token_advantages(
        2 * (reward > 0).double() - 1,
        x.teacher_logprobs,
        x.batch.sampler_logprobs,
        x.batch.loss_mask,
        x.batch.cu_seqlens,
        reward_weight=0.5,
        directive_weight=2.0,
    )
    found = credit.recipe("feedback", reward_weight=0.5, directive_weight=2.0)(x)
    assert torch.equal(found.advantages, taught)


def test_rlcr() -> None:
    confidence = torch.rand(12, dtype=torch.float64).masked_fill(torch.arange(12) == 3, torch.nan)
    x = rollouts_of(2)
    x = credit.Rollouts(x.batch, {**x.rewards, "confidence": confidence})
    for form in rlcr.FORMS:
        rewards = rlcr.rewards(x.reward("reward"), confidence.nan_to_num(), form=form, well_formed=~confidence.isnan())
        advantages = tk.group_advantages(rewards, x.batch.group_ids, scale="none", singleton="zero")
        assert torch.equal(credit.recipe("rlcr", form=form)(x).advantages, each(advantages, x))


def test_srl() -> None:
    x = rollouts_of(3)
    similarity = torch.rand(12, dtype=torch.float64)
    similarity[:4] = torch.nan  # no step of the first group is well-formed: they do not vary
    similarity[5] = torch.nan
    x = credit.Rollouts(x.batch, {"similarity": similarity})
    rewards = srl.rewards(similarity.nan_to_num(), ~similarity.isnan())
    keep = srl.keep_groups(rewards, x.batch.group_ids, min_std=1e-4)
    found = credit.recipe("srl")(x)
    assert torch.equal(found.keep, keep) and not keep[:4].any() and keep[4:].all()
    assert torch.equal(found.advantages, each(tk.group_advantages(rewards, x.batch.group_ids, gate=keep), x))


def test_delta_belief() -> None:
    x = rollouts_of(4)
    turns = x.spans["turn"]
    rewards = torch.randn(len(turns), dtype=torch.float64)
    x = credit.Rollouts(x.batch, span_rewards={"turn": rewards})
    for finished in delta_belief.FINISHED:
        where = (turns.trajectory, turns.index, x.batch.group_ids)
        advantages = delta_belief.turn_advantages(rewards, *where, finished=finished)
        found = credit.recipe("delta_belief", reward="turn", finished=finished)(x)
        assert torch.equal(found.advantages, torch.where(x.batch.loss_mask, tk.spread(advantages, turns), 0))
    by_index = credit.spans("turn", within="index")(x)
    masked = credit.recipe("delta_belief", reward="turn", finished="masked")(x)
    assert torch.equal(by_index.advantages, masked.advantages)


@pytest.mark.parametrize("name", recipes.TREE_RECIPES)
def test_presets_of_trees(name: str) -> None:
    x, _ = grown(6)
    tree, recipe = x.tree, recipes.TREE_RECIPES[name]
    packed = torch.zeros(tree.num_tokens, dtype=torch.bool).index_put((tree.flat_index,), x.batch.loss_mask)
    values = recipe.advantages(tree, x.reward("reward"), packed)
    if recipe.per == "leaf":
        flat = torch.repeat_interleave(values, tree.flat_lengths)
    elif recipe.per == "node":
        flat = values[tree.token_node][tree.flat_index]
    else:
        flat = torch.repeat_interleave(values, tree.node_lengths[tree.path_nodes[1]])
    found = credit.recipe(name)(x)
    learns = x.batch.loss_mask
    if recipe.learns is not None:
        learns = learns & recipe.learns(x.batch.sampler_logprobs)
    assert torch.equal(found.mask, learns)
    torch.testing.assert_close(found.advantages, torch.where(learns, flat, 0), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", recipes.TREE_RECIPES)
def test_a_gate_prunes(name: str) -> None:
    """A gated tree's credit is that of the tree that never had the others."""
    x, _ = grown(7)
    keep, tree = x.flags["ok"], x.tree
    pruned, _ = tree.pruned(keep)
    tokens = torch.repeat_interleave(keep, x.batch.lengths)
    alone = tk.PackedBatch(
        x.batch.tokens[tokens],
        pruned.flat_cu_seqlens,
        x.batch.loss_mask[tokens],
        x.batch.group_ids[keep],
        x.batch.rewards[keep],
        sampler_logprobs=x.batch.sampler_logprobs[tokens],
    )
    of_kept = credit.recipe(name)(credit.Rollouts(alone, tree=pruned))
    found = credit.recipe(name).gate("ok")(x)
    torch.testing.assert_close(found.advantages[tokens], of_kept.advantages, rtol=1e-13, atol=1e-13)
    assert not found.advantages[~tokens].any() and torch.equal(found.keep, keep)


@pytest.mark.parametrize("estimator", tree_grpo.ESTIMATORS)
def test_tree_grpo(estimator: str) -> None:
    x, _ = grown(8)
    expected = tree_grpo.leaf_advantages(x.reward("reward"), x.tree.leaf_root, x.batch.group_ids, estimator=estimator)
    assert torch.equal(credit.recipe("tree_grpo", estimator=estimator)(x).advantages, each(expected, x))
