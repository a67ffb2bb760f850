"""TreeRL: both forms by hand, against walks of every path, and the rule that fills in a step without an advantage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trajkern as tk
from trajkern.recipes.treerl import FORMS, node_rewards
from trajkern.testing.tree import chain, joined, random_tree, star

#        0            leaves 3, 4, 5, 6
#      1   2          rewards 1, 0, 1, 1
#     3 4 5 6
PARENT, REWARDS = [-1, 0, 0, 1, 1, 2, 2], [1.0, 0.0, 1.0, 1.0]


def tree_of(parent: list[int], device: str = "cpu") -> tk.Tree:
    return tk.Tree(torch.tensor(parent, device=device), torch.ones(len(parent), dtype=torch.int64, device=device))


def below(tree: tk.Tree) -> list[list[int]]:
    """The leaf numbers below each node."""
    parent, out = tree.parent.tolist(), [[] for _ in range(tree.num_nodes)]
    for leaf, node in enumerate(tree.leaves.tolist()):
        while node >= 0:
            out[node].append(leaf)
            node = parent[node]
    return out


def plain(rewards: list[float], tree: tk.Tree, form: str, selected: list[bool] | None = None) -> list[float]:
    parent, leaves = tree.parent.tolist(), below(tree)
    root = list(range(len(parent)))
    for n, p in enumerate(parent):
        root[n] = n if p < 0 else root[p]
    if form == "paper":
        v = [sum(rewards[x] for x in s) / len(s) for s in leaves]
        return [
            0.0 if p < 0 else (v[n] - v[root[n]] + v[n] - v[p]) / math.sqrt(len(leaves[n]))
            for n, p in enumerate(parent)
        ]
    centred = list(rewards)
    for r in {*root}:
        for x in leaves[r]:
            others = [rewards[y] for y in leaves[r] if y != x]
            centred[x] = rewards[x] - sum(others) / len(others) if others else 0.0
    chosen = [sum(1 if selected is None else selected[x] for x in s) for s in leaves]
    sv = [sum(centred[x] for x in s) / len(s) / math.sqrt(max(c, 1)) for s, c in zip(leaves, chosen, strict=True)]
    out = [0.0] * len(parent)
    for node in tree.leaves.tolist():  # path by path, as the code does
        path = []
        while parent[node] >= 0:
            path.append(node)
            node = parent[node]
        path.reverse()
        local = [sv[n] - sv[parent[n]] for n in path]
        for i in range(1, len(path)):
            if abs(local[i]) < 1e-8:
                local[i] = local[i - 1]
        for n, value in zip(path, local, strict=True):
            out[n] = value + sv[n]
    return out


def test_literal_paper(device: str) -> None:
    """V: root 3/4, nodes 1/2 and 1."""
    out = node_rewards(torch.tensor(REWARDS, device=device), tree_of(PARENT, device))
    s = math.sqrt(2)
    expected = [0, -0.5 / s, 0.5 / s, 0.25 + 0.5, -0.75 - 0.5, 0.25, 0.25]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.cpu(), torch.tensor(expected))


def test_literal_code(device: str) -> None:
    """Centred leaves 1/3, -1, 1/3, 1/3; sv: root 0, 1: (-2/3)/2/sqrt 2, 2: (1/3)/sqrt 2."""
    out = node_rewards(torch.tensor(REWARDS, device=device), tree_of(PARENT, device), form="code")
    one, two = -1 / 3 / math.sqrt(2), 1 / 3 / math.sqrt(2)
    expected = [0, 2 * one, 2 * two, 2 / 3 - one, -2 - one, 2 / 3 - two, 2 / 3 - two]
    torch.testing.assert_close(out.cpu(), torch.tensor(expected))


def test_a_step_without_a_local_advantage_takes_the_one_before_it() -> None:
    """A chain below a branch: every node of it has the branch's state value, so its local advantage is handed down."""
    tree = tree_of([-1, 0, 0, 1, 3, 2])
    out = node_rewards(torch.tensor([1.0, 0.0]), tree, form="code")
    # leaves 4 and 5, centred to 1 and -1; sv is 1 along 1, 3, 4 and -1 along 2, 5; the root's is 0
    assert out.tolist() == [0, 2, -2, 2, 2, -2]
    # the paper's form has no such rule
    assert node_rewards(torch.tensor([1.0, 0.0]), tree).tolist() == [0, 1, -1, 0.5, 0.5, -0.5]


def test_a_root_child_keeps_a_zero() -> None:
    """Branch 1 is worth what the root is: nothing stands before it, and its children take their own."""
    out = node_rewards(torch.tensor([1.0, 0.0, 1.0, 0.0]), tree_of([-1, 0, 0, 1, 1, 2, 2]), form="code")
    x = 2 / 3
    torch.testing.assert_close(out, torch.tensor([0, 0, 0, 2 * x, -2 * x, 2 * x, -2 * x]))


def test_selected_leaves_set_the_divisor() -> None:
    selected = torch.tensor([True, True, False, False])
    tree = tree_of(PARENT)
    out = node_rewards(torch.tensor(REWARDS), tree, form="code", selected=selected)
    torch.testing.assert_close(out, torch.tensor(plain(REWARDS, tree, "code", selected.tolist())))
    assert not torch.equal(out, node_rewards(torch.tensor(REWARDS), tree, form="code"))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.sampled_from(FORMS), st.booleans())
def test_matches_a_walk_of_every_path(seed: int, form: str, binary: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    tree = random_tree(g, 24, roots=2, reach=6)
    rewards = torch.randint(0, 2, (tree.num_leaves,), generator=g).double()
    if not binary:
        rewards = rewards + torch.randn(tree.num_leaves, generator=g, dtype=torch.float64)
    expected = torch.tensor(plain(rewards.tolist(), tree, form), dtype=torch.float64)
    torch.testing.assert_close(node_rewards(rewards, tree, form=form), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_equal_rewards_are_exactly_nothing(form: str) -> None:
    for seed in range(5):
        tree = random_tree(torch.Generator().manual_seed(seed), 40, roots=2, reach=6)
        rewards = torch.full((tree.num_leaves,), 0.7, dtype=torch.float64)
        assert node_rewards(rewards, tree, form=form).count_nonzero() == 0


@pytest.mark.parametrize("form", FORMS)
def test_edges(form: str) -> None:
    tree = star(5)
    assert node_rewards(torch.full((5,), 0.1), tree, form=form).tolist() == [0] * 6
    assert node_rewards(torch.tensor([3.0]), chain(1), form=form).tolist() == [0]
    assert node_rewards(torch.tensor([3.0]), chain(4), form=form).tolist() == [0] * 4
    offset = node_rewards(torch.tensor([10000.0, 10001.0, 10000.0]), star(3), form=form)
    torch.testing.assert_close(offset, node_rewards(torch.tensor([0.0, 1.0, 0.0]), star(3), form=form))


@pytest.mark.parametrize("form", FORMS)
def test_a_forest_equals_its_trees(form: str) -> None:
    g = torch.Generator().manual_seed(1)
    trees = [random_tree(g, n, roots=1) for n in (9, 17, 30)]
    rewards = [torch.randn(t.num_leaves, generator=g) for t in trees]
    apart = torch.cat([node_rewards(r, t, form=form) for r, t in zip(rewards, trees, strict=True)])
    assert torch.equal(node_rewards(torch.cat(rewards), joined(trees), form=form), apart)


def test_deep_trees() -> None:
    tree = chain(100_000)
    assert node_rewards(torch.ones(1), tree, form="code").count_nonzero() == 0


REFUSED: list[tuple[dict[str, object], type, str]] = [
    ({"leaf_rewards": torch.ones(3)}, ValueError, r"leaf_rewards must have shape \[4\] \(one reward a leaf\)"),
    ({"leaf_rewards": torch.tensor([1, 0, math.inf, 0])}, ValueError, "leaf_rewards must be finite"),
    ({"form": "thesis"}, ValueError, "form must be one of 'paper', 'code'"),
    ({"tree": PARENT}, TypeError, "tree must be a Tree, got list"),
    ({"selected": torch.ones(4, dtype=torch.bool)}, ValueError, "selected must be None for form 'paper'"),
    ({"selected": torch.ones(4), "form": "code"}, TypeError, "selected must have dtype bool"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED)
def test_refuses(change: dict, error: type, message: str) -> None:
    arguments: dict[str, Tensor | tk.Tree] = {"leaf_rewards": torch.tensor(REWARDS), "tree": tree_of(PARENT)}
    with pytest.raises(error, match=message):
        node_rewards(**(arguments | change))
