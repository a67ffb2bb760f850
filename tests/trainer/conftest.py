"""A run small enough to repeat: one narrow layer, a few questions, a few steps. And what every policy owes a tree."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("reasoning_gym", reason="the trainer's extra is not installed")

import trajkern as tk
from tests.tiny_llama import tiny_llama
from trajkern.trainer.config import Evaluation, TrainConfig, WarmUp
from trajkern.trainer.forest import Forest
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.models.transformer import ModelConfig

SMALL = ModelConfig(layers=1, width=32, heads=2, ffn=64)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(out: str = "run", **changes) -> TrainConfig:
        settings = {
            "task": "chain_sum",
            "steps": 6,
            "prompts": 16,
            "rollouts": 4,
            "questions": 300,
            "threads": 1,
            "out": tmp_path / out,
            "checkpoint_every": 2,
            "warmup": WarmUp(steps=40, batch=32, lr=1e-2, demonstrations=256, check_every=20),
            "eval": Evaluation(heldout=16, validation=8, samples=4, every=3),
            "tiny": SMALL,
        }
        return TrainConfig(**(settings | changes))

    return make


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a HuggingFace folder with a small random Llama and a byte-level tokenizer."""

    def make(**changes) -> Path:
        path = tmp_path_factory.mktemp("llama")
        for part in tiny_llama(**changes):
            part.save_pretrained(path)
        return path

    return make


TREES = {
    "chain": ([-1, 0, 1, 2], [3, 1, 2, 1]),
    "star": ([-1, 0, 0, 0, 0], [6, 2, 5, 1, 3]),
    "two roots, interleaved": ([-1, -1, 0, 1, 0, 1, 2, 2], [2, 4, 3, 1, 2, 5, 1, 2]),
    "empty nodes": ([-1, 0, 0, 1, 1, 2], [3, 0, 2, 0, 4, 0]),
    "long node, short leaves": ([-1, 0, 0, 1, 1], [40, 1, 2, 9, 1]),
}


@pytest.fixture(params=TREES)
def tree(request: pytest.FixtureRequest) -> tk.Tree:
    return tk.Tree(*map(torch.tensor, TREES[request.param]))


@pytest.fixture
def check_tree() -> Callable[[Policy, tk.Tree, float], None]:
    """The hidden states and the log-probs of a packed tree are those of each branch alone."""

    def check(policy: Policy, tree: tk.Tree, atol: float) -> None:
        tokens = torch.randint(5, 90, (tree.num_tokens,), generator=torch.Generator().manual_seed(1))
        every, flat = torch.arange(tree.num_tokens), tree.flat_index
        with torch.no_grad():
            packed = policy(tokens, tree, every).log_softmax(-1)[flat]
            hidden = policy.hidden(tokens, tree, every)[flat]
            for begin, end in pairwise(tree.flat_cu_seqlens.tolist()):
                alone = (tokens[flat[begin:end]], torch.tensor([0, end - begin]), torch.arange(end - begin))
                expected = policy(*alone).log_softmax(-1)
                torch.testing.assert_close(packed[begin:end], expected, rtol=0, atol=atol)
                torch.testing.assert_close(hidden[begin:end], policy.hidden(*alone), rtol=0, atol=atol)

    return check


@pytest.fixture
def check_forest() -> Callable[[Policy, Forest, float, float], None]:
    """A forward of the packed forest finds the log-probs that sampling through the branched cache noted."""

    def check(policy: Policy, forest: Forest, temperature: float, atol: float) -> None:
        pairs = forest.tree.pairs(forest.tokens, forest.loss_mask)
        with torch.no_grad():
            logits = policy(forest.tokens, forest.tree, pairs.rows) / temperature
        expected = logits.log_softmax(-1).gather(1, pairs.targets[:, None]).squeeze(1).float()
        torch.testing.assert_close(forest.sampler_logprobs[pairs.tokens], expected, rtol=0, atol=atol)

    return check
