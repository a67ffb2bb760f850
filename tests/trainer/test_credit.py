"""How the recipes for trees are called, on a tree small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern.recipes import TREE_RECIPES, trees
from trajkern.trainer.credit import credit_of
from trajkern.trainer.forest import Forest

#   0 (prompt 7)          1 (prompt 7)      2 (prompt 5)
#   ├─ 3 ─┬─ 6            └─ 5              └─ 9 ── 10
#   │     └─ 7
#   └─ 4 ── 8
PARENT = torch.tensor([-1, -1, -1, 0, 0, 1, 3, 3, 4, 2, 9])
REWARDS = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])  # of the leaves 5, 6, 7, 8, 10


@pytest.fixture
def forest() -> Forest:
    lengths = torch.where(PARENT < 0, 2, 1)
    tree = tk.Tree(PARENT, lengths, torch.tensor([7, 7, 5]))
    mask = torch.repeat_interleave(PARENT >= 0, lengths)
    logprobs = torch.where(torch.arange(tree.num_tokens) % 2 > 0, -0.05, -0.5)
    return Forest(tree, torch.arange(tree.num_tokens), mask, logprobs, REWARDS)


def _arguments_of(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Tensor]:
    """The arguments that the recipe's function gets."""
    arguments: list[Any] = []
    original = getattr(module, name)

    def watched(*args: Any, **options: Any) -> Tensor:
        arguments[:] = [*args, options]
        return original(*args, **options)

    monkeypatch.setattr(module, name, watched)
    return arguments


def test_path_nodes(forest: Forest) -> None:
    leaf, node = forest.path_nodes
    assert node.tolist() == [1, 5, 0, 3, 6, 0, 3, 7, 0, 4, 8, 2, 9, 10]
    assert leaf.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("name", TREE_RECIPES)
def test_advantages_belong_to_leaves_or_to_steps(forest: Forest, name: str) -> None:
    credit = credit_of(TREE_RECIPES[name], forest)
    assert credit.per == ("leaf" if TREE_RECIPES[name].per == "leaf" else "step")
    assert credit.advantages.shape == ((5,) if credit.per == "leaf" else (14,))
    assert credit.advantages.isfinite().all() and credit.advantages.any()
    for config in (tk.PolicyLoss("grpo"), tk.PolicyLoss("dapo")):
        branch = credit.packed(config)["branch"]
        assert isinstance(branch, tk.Paths if credit.per == "leaf" else tk.Branch)


def test_tree_grpo_compares_in_trees_and_in_prompts(forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments_of(monkeypatch, trees.tree_grpo, "leaf_advantages")
    credit_of(TREE_RECIPES["tree_grpo"], forest)
    assert arguments[1].tolist() == [1, 0, 0, 0, 2] and arguments[2].tolist() == [7, 7, 7, 7, 5]


def test_treepo_branches_from_the_prompt(forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments_of(monkeypatch, trees.treepo, "advantages")
    advantages = credit_of(TREE_RECIPES["treepo"], forest).advantages
    assert arguments[1].tolist() == [[7, 5, -1], [7, 3, 6], [7, 3, 7], [7, 4, 8], [5, 9, 10]]
    raw = trees.treepo.advantages(*arguments[:2])
    scored = torch.tensor([1.0, 2, 2, 2, 2])  # tokens of each rollout
    mean = (raw * scored).sum() / scored.sum()
    std = (((raw - mean) ** 2 * scored).sum() / (scored.sum() - 1)).sqrt()
    torch.testing.assert_close(advantages, (raw - mean) / std)


def test_vineppo_gains_what_a_step_adds_to_the_value(forest: Forest) -> None:
    advantages = trees.TREE_RECIPES["vineppo"].advantages(forest.tree, REWARDS, forest.loss_mask)
    two_thirds = 2 / 3  # V of the root 0; V of node 3 is 1/2
    expected = [0, 0, 0, 0.5 - two_thirds, 1 - two_thirds, 0, 0.5, -0.5, 0, 0, 0]
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_gigpo_anchors_a_step_where_it_starts(forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments_of(monkeypatch, trees.gigpo, "step_advantages")
    advantages = credit_of(TREE_RECIPES["gigpo"], forest).advantages
    returns, trajectory, anchor, group, options = arguments
    assert trajectory.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert anchor.tolist() == [0, 0, 3, 0, 3, 0, 4, 2, 9], "the two roots of prompt 7 are one place"
    assert group.tolist() == [7, 7, 7, 7, 7, 7, 7, 5, 5]
    torch.testing.assert_close(returns, torch.tensor([0, 0.95, 1, 0, 0, 0.95, 1, 0.95, 1]))
    assert torch.equal(options["episode_rewards"], REWARDS)
    prompts = PARENT[forest.path_nodes[1]] < 0
    assert not advantages[prompts].any() and advantages[~prompts].any()


def test_spo_trains_unlikely_tokens_only(forest: Forest) -> None:
    learns = credit_of(TREE_RECIPES["spo"], forest).loss_mask
    assert torch.equal(learns, forest.loss_mask & (forest.sampler_logprobs.exp() < 0.9))
    assert 0 < learns.sum() < forest.loss_mask.sum()


def test_sequence_means_weigh_rollouts_of_a_branch_alike(forest: Forest) -> None:
    """The sum over the tokens of a node of the branch's leaf counts is 1, as that of the rollouts' weights."""
    credit = credit_of(TREE_RECIPES["treerl"], forest)
    packed = credit.packed(tk.PolicyLoss("grpo"))
    branch, config = packed["branch"], packed["config"]
    assert config.resolved_aggregate == "token_sum"
    scored = torch.where(PARENT < 0, 0, 1)
    torch.testing.assert_close((branch.leaf_count * scored).sum(), torch.tensor(1.0))
    assert branch.positive_count.sum() + branch.negative_count.sum() + branch.zero_count.sum() == 14
