"""The recipes for trees as the trainer credits by them, on a tree small enough to work out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern.recipes import TREE_RECIPES
from trajkern.recipes import trees as trees_module
from trajkern.trainer.forest import Forest, Lesson

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
    return Forest(tree, torch.arange(tree.num_tokens), mask, logprobs)


def credit_of(name: str, forest: Forest) -> credit.Credit:
    return credit.recipe(name)(credit.Rollouts(forest.batch(REWARDS), tree=forest.tree))


def _step_of(forest: Forest) -> Tensor:
    """The step that each token of the flat rollouts is in."""
    node = forest.tree.path_nodes[1]
    return torch.repeat_interleave(torch.arange(len(node)), forest.tree.node_lengths[node])


def of_steps(found: credit.Credit, forest: Forest) -> Tensor:
    """The advantage of each step of each rollout, ``[S]``; all its learning tokens have it, no other has one."""
    step = _step_of(forest)
    values = torch.zeros(int(step[-1]) + 1).index_put((step[found.mask],), found.advantages[found.mask])
    assert torch.equal(found.advantages, torch.where(found.mask, values[step], 0))
    return values


def _arguments_of(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[Tensor]:
    """The arguments that the recipe's function gets."""
    arguments: list[Any] = []
    original = getattr(module, name)

    def watched(*args: Any, **options: Any) -> Tensor:
        arguments[:] = [*args, options]
        return original(*args, **options)

    monkeypatch.setattr(module, name, watched)
    return arguments


@pytest.mark.parametrize("name", TREE_RECIPES)
def test_advantages_belong_to_leaves_or_to_steps(forest: Forest, name: str) -> None:
    found = credit_of(name, forest)
    assert (found.rows is not None) == (TREE_RECIPES[name].per == "leaf")
    values = of_steps(found, forest)
    recipe, (leaf, node) = TREE_RECIPES[name], forest.tree.path_nodes
    of_recipe = recipe.advantages(forest.tree, REWARDS, forest.loss_mask)
    expected = {"leaf": leaf, "node": node, "step": torch.arange(len(node))}[recipe.per]
    learns = torch.zeros(len(node)).index_add(0, _step_of(forest), found.mask.float()) > 0
    torch.testing.assert_close(values, torch.where(learns, of_recipe[expected], 0), rtol=0, atol=0)
    assert values.isfinite().all() and values.any()
    lesson = Lesson.of(found, found.keep, forest)
    for config in (tk.PolicyLoss("grpo"), tk.PolicyLoss("dapo")):
        branch = lesson.credit.tree_inputs(config)["branch"]
        assert isinstance(branch, tk.Branch if found.rows is None else tk.Paths)


def test_tree_grpo_compares_in_trees_and_in_prompts(forest: Forest) -> None:
    trees, prompts = torch.tensor([1, 0, 0, 0, 2]), torch.tensor([7, 7, 7, 7, 5])
    expected = trees_module.tree_grpo.leaf_advantages(REWARDS, trees, prompts)
    assert torch.equal(credit_of("tree_grpo", forest).rows, expected)


def test_treepo_branches_from_the_prompt(forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments_of(monkeypatch, trees_module.treepo, "advantages")
    advantages = credit_of("treepo", forest).rows
    assert arguments[1].tolist() == [[7, 5, -1], [7, 3, 6], [7, 3, 7], [7, 4, 8], [5, 9, 10]]
    raw = trees_module.treepo.advantages(*arguments[:2])
    scored = torch.tensor([1.0, 2, 2, 2, 2])  # tokens of each rollout
    mean = (raw * scored).sum() / scored.sum()
    std = (((raw - mean) ** 2 * scored).sum() / (scored.sum() - 1)).sqrt()
    torch.testing.assert_close(advantages, (raw - mean) / std)


def test_vineppo_gains_what_a_step_adds_to_the_value(forest: Forest) -> None:
    advantages = trees_module.TREE_RECIPES["vineppo"].advantages(forest.tree, REWARDS, forest.loss_mask)
    two_thirds = 2 / 3  # V of the root 0; V of node 3 is 1/2
    expected = [0, 0, 0, 0.5 - two_thirds, 1 - two_thirds, 0, 0.5, -0.5, 0, 0, 0]
    torch.testing.assert_close(advantages, torch.tensor(expected))


def test_gigpo_anchors_a_step_where_it_starts(forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _arguments_of(monkeypatch, trees_module.gigpo, "step_advantages")
    advantages = of_steps(credit_of("gigpo", forest), forest)
    returns, trajectory, anchor, group, options = arguments
    assert trajectory.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert anchor.tolist() == [0, 0, 3, 0, 3, 0, 4, 2, 9], "the two roots of prompt 7 are one place"
    assert group.tolist() == [7, 7, 7, 7, 7, 7, 7, 5, 5]
    torch.testing.assert_close(returns, torch.tensor([0, 0.95, 1, 0, 0, 0.95, 1, 0.95, 1]))
    assert torch.equal(options["episode_rewards"], REWARDS)
    prompts = PARENT[forest.tree.path_nodes[1]] < 0
    assert not advantages[prompts].any() and advantages[~prompts].any()


def test_spo_trains_unlikely_tokens_only(forest: Forest) -> None:
    learns = credit_of("spo", forest).mask
    expected = forest.loss_mask & (forest.sampler_logprobs.exp() < 0.9)
    assert torch.equal(learns, expected[forest.tree.flat_index])
    assert 0 < expected.sum() < forest.loss_mask.sum()


def test_sequence_means_weigh_rollouts_of_a_branch_alike(forest: Forest) -> None:
    """The sum over the tokens of a node of the branch's leaf counts is 1, as that of the rollouts' weights."""
    packed = credit_of("treerl", forest).tree_inputs(tk.PolicyLoss("grpo"))
    branch, config = packed["branch"], packed["config"]
    assert config.resolved_aggregate == "token_sum"
    torch.testing.assert_close(branch.leaf_count.sum(), torch.tensor(1.0))
    scored = forest.loss_mask[forest.tree.flat_index].sum()
    assert branch.positive_count.sum() + branch.negative_count.sum() + branch.zero_count.sum() == scored
