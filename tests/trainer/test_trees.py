"""Packed trees: a policy's forward of a tree gives every rollout's own log-probs, whatever the tree."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import trajkern as tk
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.tokenizer import VOCABULARY
from trajkern.trainer.models.transformer import ModelConfig


@pytest.fixture
def model() -> CharacterModel:
    torch.manual_seed(0)
    return CharacterModel(ModelConfig(layers=2, width=32, heads=4, ffn=48))


def test_packed_tree_equals_each_branch_alone(model: CharacterModel, tree: tk.Tree, check_tree: Callable) -> None:
    check_tree(model, tree, 2e-6)
    check_tree(model.double(), tree, 1e-12)


def test_gradients_of_a_packed_tree_are_those_of_its_flat_rollouts(model: CharacterModel, tree: tk.Tree) -> None:
    model.double()
    tokens = torch.randint(VOCABULARY, (tree.num_tokens,))
    weight = torch.randn(len(tree.flat_index), VOCABULARY, dtype=torch.float64)
    packed = model(tokens, tree, torch.arange(tree.num_tokens))[tree.flat_index]
    flat = model(tokens[tree.flat_index], tree.flat_cu_seqlens, torch.arange(len(tree.flat_index)))
    grads = [torch.autograd.grad((x * weight).sum(), list(model.parameters())) for x in (packed, flat)]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_only_the_rows_asked_for(model: CharacterModel) -> None:
    tree = tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([6, 2, 5]))
    tokens, rows = torch.randint(VOCABULARY, (tree.num_tokens,)), torch.tensor([7, 1, 1])
    torch.testing.assert_close(model(tokens, tree, rows), model(tokens, tree, torch.arange(tree.num_tokens))[rows])
