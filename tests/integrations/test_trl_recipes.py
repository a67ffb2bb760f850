"""Recipes by name in TRL's trainers: what a recipe is given, and what comes of completions without a score."""

from __future__ import annotations

import pytest
import torch

import trajkern as tk
from trajkern.integrations.trl import Rollouts, _named
from trajkern.recipes import RECIPES

NAN = float("nan")


def rollouts(rewards: list[float], here: slice = slice(None)) -> Rollouts:
    """Completions two a prompt."""
    x = torch.tensor(rewards)
    groups = torch.arange(len(rewards)) // 2
    count = len(x[here])
    ids = torch.zeros(count, 3, dtype=torch.int64)
    return Rollouts(x, groups, here, ids, torch.ones_like(ids), [{}] * count, {})


@pytest.mark.parametrize("name", RECIPES)
def test_it_is_the_recipe_on_these_rewards(name: str) -> None:
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1])
    empty = torch.zeros(0, dtype=torch.int64)
    bounds = torch.zeros(7, dtype=torch.int64)
    batch = tk.PackedBatch(empty, bounds, empty.bool(), torch.arange(6) // 2, rewards)
    credit = RECIPES[name](batch)
    expected = torch.where(credit[1], credit[0], 0) if isinstance(credit, tuple) else credit
    assert torch.equal(_named(name)(rollouts(rewards.tolist())), expected)
    assert torch.equal(_named(name)(rollouts(rewards.tolist(), slice(2, 4))), expected[2:4])


@pytest.mark.parametrize("name", RECIPES)
def test_a_completion_without_a_score_learns_nothing_and_moves_nobody(name: str) -> None:
    advantages = _named(name)(rollouts([1.0, 0, NAN, 0, NAN, NAN]))
    assert advantages[[2, 4, 5]].tolist() == [0, 0, 0] and not advantages.isnan().any()
    assert torch.equal(advantages[:2], _named(name)(rollouts([1.0, 0])))


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="recipe must be a function or one of grpo, .*; got 'tree_grpo'"):
        _named("tree_grpo")
