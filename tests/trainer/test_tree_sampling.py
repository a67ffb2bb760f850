"""Tree sampling: what a tree is made of, the cache it continues from, and the recipes that read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from trajkern import credit, recipes
from trajkern.trainer import sampling
from trajkern.trainer import train as training
from trajkern.trainer.folder import METRICS
from trajkern.trainer.models.policy import CharacterModel, Policy
from trajkern.trainer.models.tokenizer import EOS, decode, encode
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.ranks import ALONE
from trajkern.trainer.sampling import draw, sample
from trajkern.trainer.tree_sampling import Node, TreeShape, grow, leaf_chances, plant, thin

NEWLINE = encode("\n")[0]
PROMPTS = [encode("4-1="), encode("17+25-3="), encode("1")]
SHAPE = TreeShape(trees=2, expansions=3, rounds=2, keep=5)


@pytest.fixture
def model() -> CharacterModel:
    """One that often writes a newline and sometimes an end."""
    torch.manual_seed(0)
    model = CharacterModel(ModelConfig(layers=2, width=32, heads=4, ffn=48)).double()
    with torch.no_grad():
        model.head.weight[NEWLINE] *= 5
        model.head.weight[EOS] *= 3
    return model


def grown(model: Policy, prompts: list[list[int]], shape: TreeShape = SHAPE, **options) -> list[Node]:
    generator = torch.Generator().manual_seed(1)
    return grow(model, prompts, shape, **{"max_new": 12, "generator": generator, **options})


def test_a_tree_is_made_of_whole_steps(model: CharacterModel) -> None:
    nodes = grown(model, PROMPTS)
    forest = plant(nodes, SHAPE.trees)
    tree = forest.tree
    assert tree.num_roots == 6 and tree.leaf_group.tolist() == [t // 2 for t in tree.leaf_root.tolist()]
    assert torch.bincount(tree.leaf_root).tolist() == [SHAPE.leaves] * 6
    assert tree.leaves.tolist() == [i for i, node in enumerate(nodes) if node.leaf]
    for number, node in enumerate(nodes):
        if node.parent < 0:
            assert node.tokens == PROMPTS[node.tree // 2]
            continue
        assert node.parent < number and not nodes[node.parent].leaf and node.tree == nodes[node.parent].tree
        assert NEWLINE not in node.tokens[:-1] and EOS not in node.tokens[:-1]
        assert node.leaf == (node.tokens[-1] == EOS or node.used == 12)
        assert node.leaf or node.tokens[-1] == NEWLINE
    for completion in forest.completions():
        assert completion[-1] == EOS or len(completion) == 12
    depths = {int(tree.depth[node]) for node in tree.parent.tolist() if node >= 0}
    assert len(depths) > 2, "the case needs expansions at several depths"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_expansion_continues_from_its_prefix(
    model: CharacterModel, temperature: float, check_forest: Callable
) -> None:
    forest = plant(grown(model, PROMPTS, temperature=temperature), SHAPE.trees)
    check_forest(model, forest, temperature, 2e-6)


def test_no_prefix_is_read_again(model: CharacterModel, monkeypatch: pytest.MonkeyPatch) -> None:
    widths, original = [], model.extend

    def extend(tokens: torch.Tensor, *rest) -> torch.Tensor:
        widths.append(tokens.shape[1])
        return original(tokens, *rest)

    monkeypatch.setattr(model, "extend", extend)
    grown(model, PROMPTS)
    assert widths[0] == max(map(len, PROMPTS)) and set(widths[1:]) == {1}


def test_every_node_but_leaves_is_expanded_in_the_end(model: CharacterModel) -> None:
    shape = TreeShape(trees=1, expansions=40, rounds=1, keep=1)
    nodes = grown(model, [PROMPTS[0]], shape)
    first = next(i for i, node in enumerate(nodes) if node.leaf) + 1  # of the chain
    assert first > 3, "the case needs a chain of several steps"
    expanded = {node.parent for node in nodes[first:] if node.parent < first}
    assert expanded == set(range(first - 1))


def test_thinning_keeps_as_many_of_each_tree(model: CharacterModel) -> None:
    forest = plant(grown(model, PROMPTS), SHAPE.trees)
    chances = leaf_chances(SHAPE, ALONE.rows(3), torch.Generator().manual_seed(0))
    thinned = thin(forest, 3, chances)
    assert torch.bincount(thinned.tree.leaf_root).tolist() == [3] * 6
    assert thinned.tree.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    whole, groups = forest.completions(), forest.tree.leaf_group.tolist()
    for completion, group in zip(thinned.completions(), thinned.tree.leaf_group.tolist(), strict=True):
        assert (completion, group) in zip(whole, groups, strict=True)
    assert forest.completions() == thin(forest, SHAPE.leaves, torch.zeros(forest.tree.num_leaves)).completions()


def test_steps_end_with_newlines_and_tool_calls(model: CharacterModel) -> None:
    def split(text: str) -> list[str]:
        tokens, at, parts = encode(text), 0, []
        for length in model.steps(tokens):
            parts.append(decode(tokens[at : at + length]))
            at += length
        return parts

    assert split("1+1\n2") == ["1+1\n", "2"]
    assert split("<tool>x</tool>y\n") == ["<tool>x</tool>", "y\n"]
    assert split("</too") == ["</too"] and split("") == []
    for text in ("a\n", "\n\n", "x>\n</tool></tool>/tool>\n", "</tool>"):
        for tokens in (encode(text), [*encode(text), EOS]):
            assert model.steps(tokens) == Policy.steps(model, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trees": 0}, "tree.trees must be at least 1, got 0"),
        ({"keep": 4}, r"tree.keep must be at most tree.rounds \* tree.expansions \+ 1 = 3, got 4"),
    ],
)
def test_bad_shapes(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeShape(**changes)


@pytest.mark.parametrize("name", recipes.TREE_RECIPES)
def test_every_tree_recipe_trains(config, name: str, capsys: pytest.CaptureFixture) -> None:
    settings = config(recipe=name, task="chain_sum_steps", steps=2, eval=training.TrainConfig().eval)
    settings = replace(settings, eval=config().eval, warmup=replace(config().warmup, steps=60))
    result = training.train(settings)
    records = [json.loads(line) for line in (result.metrics.parent / METRICS).read_text().splitlines()]
    steps = [r for r in records if r["phase"] == "main"]
    assert len(steps) == 2 and all(r["live_groups"] > 0 for r in steps), "the case needs something to learn from"
    assert all(r["sampler_drift"] < 1e-4 and r["num_tokens"] > 0 for r in steps)
    assert "shared prefixes" in capsys.readouterr().out


def test_a_step_in_which_no_token_learns_changes_nothing(config, monkeypatch: pytest.MonkeyPatch) -> None:
    sure = recipes.TREE_RECIPES["spo"]._replace(learns=lambda logprobs: logprobs > 0)
    monkeypatch.setitem(credit.tree_terms.TREE_TERMS, "spo", sure)
    result = training.train(config(recipe="spo", task="chain_sum_steps", steps=2))
    warm, main = (load_file(p) for p in (result.checkpoint.with_name("warmup.safetensors"), result.checkpoint))
    assert all(torch.equal(warm[k], main[k]) for k in warm if k.startswith("policy."))


def test_what_has_ended_is_no_longer_computed(model: CharacterModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, original = [], model.extend

    def extend(tokens: torch.Tensor, *rest) -> torch.Tensor:
        counts.append(len(tokens))
        return original(tokens, *rest)

    prompts, options = PROMPTS * 2, {"copies": 3, "max_new": 40}
    monkeypatch.setattr(model, "extend", extend)
    found = sample(model, prompts, generator=torch.Generator().manual_seed(1), **options)
    assert counts[1] == 18 and counts[-1] <= 9 and all(2 * b <= a for a, b in pairwise(counts[1:]) if a != b)
    monkeypatch.setattr(sampling, "draw", lambda *args, **named: draw(*args, **named, spare=True))
    whole = sample(model, prompts, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(found.tokens, whole.tokens) and torch.equal(found.keep, whole.keep)
    torch.testing.assert_close(found.logprobs, whole.logprobs, rtol=0, atol=1e-6)
    counts.clear()
    grown(model, PROMPTS, max_new=30)
    assert list(dict.fromkeys(counts))[:3] == [3, 6, 18] and counts[-1] <= 9, "what is branched from stays as it is"
