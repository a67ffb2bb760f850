"""Tree-GRPO: two norms of a rollout, by hand and against a plain loop."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trajkern as tk
from trajkern import credit
from trajkern.recipes.tree_grpo import ESTIMATORS, leaf_advantages, node_rewards, pooled_outcomes, token_advantages

# two prompts; the first has a tree of two leaves and a lone winner, the second a constant tree and a lone failure
REWARDS = [1.0, 0.0, 1.0, 1.0, 1.0, 0.0]
TREES = [0, 0, 1, 2, 2, 3]
GROUPS = [7, 7, 7, 9, 9, 9]
A, B, H = 0.33333333 / 0.57735027, -0.66666667 / 0.57735027, 0.5 / 0.70710678
EXPECTED = {
    "tree": [A + H, B - H, A + 1, A, A, B],
    "tree_inner": [H, -H, 1, 0, 0, 0],
    "tree_2norm": [H, -H, A, 0, 0, B],
}


def norm(x: list[float], ids: list[int]) -> list[float]:
    out = []
    for value, key in zip(x, ids, strict=True):
        peers = [v for v, k in zip(x, ids, strict=True) if k == key]
        mean, std = (statistics.fmean(peers), statistics.stdev(peers)) if len(peers) > 1 else (0.0, 1.0)
        out.append((value - mean) / (std + 1e-6))
    return out


def plain(rewards: list[float], trees: list[int], groups: list[int], estimator: str) -> list[float]:
    if estimator == "tree_inner":
        return norm(rewards, trees)
    if estimator == "tree_2norm":
        return norm(norm(rewards, groups), trees)
    return [a + b for a, b in zip(norm(rewards, groups), norm(rewards, trees), strict=True)]


def call(rewards, trees, groups, *, device: str = "cpu", dtype=torch.float64, **options) -> Tensor:
    ids = (torch.tensor(x, device=device, dtype=torch.int64) for x in (trees, groups))
    return leaf_advantages(torch.tensor(rewards, dtype=dtype, device=device), *ids, **options)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_literal(estimator: str, device: str) -> None:
    out = call(REWARDS, TREES, GROUPS, device=device, dtype=torch.float32, estimator=estimator)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.cpu(), torch.tensor(EXPECTED[estimator]), rtol=1e-5, atol=1e-5)
    # equal rewards of a tree, and a lone failure, are exactly nothing
    if estimator == "tree_inner":
        assert out[3:].tolist() == [0, 0, 0]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, -2.0]), st.integers(0, 5)), max_size=24),
    st.sampled_from(ESTIMATORS),
)
def test_matches_a_plain_loop(rows: list[tuple[float, int]], estimator: str) -> None:
    rewards, trees = [r for r, _ in rows], [t for _, t in rows]
    groups = [t // 3 for t in trees]
    expected = torch.tensor(plain(rewards, trees, groups, estimator), dtype=torch.float64)
    torch.testing.assert_close(call(rewards, trees, groups, estimator=estimator), expected, rtol=1e-9, atol=1e-9)


def test_default_is_the_sum_of_both() -> None:
    default = call(REWARDS, TREES, GROUPS)
    assert torch.equal(default, call(REWARDS, TREES, GROUPS, estimator="tree"))


def test_large_rewards_keep_their_spread() -> None:
    rewards = [10000.0, 10001.0, 10000.0, 10001.0]
    out = call(rewards, [0, 0, 1, 1], [0] * 4, dtype=torch.float32)
    expected = 0.5 / math.sqrt(1 / 3) + 0.5 / math.sqrt(1 / 2)
    torch.testing.assert_close(out, torch.tensor([-expected, expected] * 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "tree_diff"}, ValueError, "estimator must be one of 'tree', 'tree_inner', 'tree_2norm'"),
        ({"trees": [0, 0, 1, 2, 2]}, ValueError, r"tree_ids must have shape \[6\]"),
        ({"groups": [7] * 5}, ValueError, r"group_ids must have shape \[6\]"),
        ({"trees": [0, 0, 1, 2, 1, 3]}, ValueError, r"each tree in one group; tree 1 is in \[7, 9\]"),
        ({"rewards": [1.0, 0, 1, math.nan, 1, 0]}, ValueError, "rewards must be finite"),
        ({"dtype": torch.int64, "rewards": [1] * 6}, TypeError, "rewards must have dtype"),
    ],
)
def test_refuses(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(**({"rewards": REWARDS, "trees": TREES, "groups": GROUPS} | change))


def test_per_token_literal(device: str) -> None:
    """Two rollouts of a prompt: 3 tokens and an outcome of 1; 2 tokens, one of them not counted, and 0. One tree each.

    The prompt's pool is 0 0 1 0: mean 1/4, std 1/2. The first tree's is 0 0 1: mean 1/3, std 1/sqrt(3). The second's is
    a lone 0.
    """
    rewards = torch.tensor([0, 0, 1.0, 0, math.nan], device=device)
    trees, groups = torch.tensor([0, 0, 0, 1, 1], device=device), torch.zeros(5, dtype=torch.int64, device=device)
    out = token_advantages(rewards, trees, groups, torch.tensor([True] * 4 + [False], device=device))
    low, high = -0.5 - 1 / math.sqrt(3), 1.5 + 2 / math.sqrt(3)
    torch.testing.assert_close(out.cpu(), torch.tensor([low, low, high, -0.5, 0]), rtol=1e-5, atol=1e-5)


ROLLOUT = st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 4), st.integers(0, 3), st.booleans())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(ROLLOUT, min_size=1, max_size=9))
def test_pooled_outcomes_are_the_tokens(rows: list[tuple[float, int, int, bool]]) -> None:
    """Against the plain loop over a pool with a value a token."""
    pools: dict[int, list[float]] = {}
    for reward, count, key, gate in rows:
        if count and gate:
            pools.setdefault(key, []).extend([0.0] * (count - 1) + [reward])
    expected = []
    for reward, count, key, gate in rows:
        pool = pools.get(key, [])
        mean, std = (statistics.fmean(pool), statistics.stdev(pool)) if len(pool) > 1 else (reward, 1.0)
        each = [(x - mean) / (std + 1e-6) if count and gate else 0.0 for x in (reward, 0.0)]
        expected.append((each[0], each[1] if count > 1 else None))
    reward, count, key, gate = (list(x) for x in zip(*rows, strict=True))
    last, other = pooled_outcomes(
        torch.tensor(reward, dtype=torch.float64), torch.tensor(key), torch.tensor(count), gate=torch.tensor(gate)
    )
    for at, (of_last, of_other) in enumerate(expected):
        assert abs(float(last[at]) - of_last) < 1e-9
        assert of_other is None or abs(float(other[at]) - of_other) < 1e-9


# a prompt, two first steps, the first of which goes on three ways
DIFF = tk.Tree(torch.tensor([-1, 0, 0, 1, 1, 1]), torch.tensor([2, 2, 3, 1, 2, 1]))


def test_diff_literal(device: str) -> None:
    """Leaves 2, 3, 4, 5 with rewards 0, 1, 1, 0: V is 1/2 at the prompt, 2/3 at node 1.

    Node 1 gains 1/6, of which the margin leaves 1/15; the two winners below it gain 1/3, of which 7/30 is left.
    """
    tree = tk.Tree(DIFF.parent.to(device), DIFF.node_lengths.to(device))
    rewards = torch.tensor([0.0, 1, 1, 0], device=device)
    step = (1 / 15 + 2 / 3) / math.sqrt(3)
    out = node_rewards(rewards, tree)
    torch.testing.assert_close(out.cpu(), torch.tensor([0, step, 0, 0, 0, 0]))
    out = node_rewards(rewards, tree, leaves=True, margin=0.1)
    torch.testing.assert_close(out.cpu(), torch.tensor([0, step, 0, 37 / 30, 37 / 30, 0]))
    out = node_rewards(rewards, tree, leaves=True, margin=1)
    torch.testing.assert_close(out.cpu(), torch.tensor([0, 2 / 3 / math.sqrt(3), 0, 1, 1, 0]))


def _rollouts(tree: tk.Tree, rewards: list[float]) -> credit.Rollouts:
    """The tree's rollouts, whose prompt of two tokens and every other third token are not scored."""
    bounds = tree.flat_cu_seqlens.long()
    place = torch.arange(int(bounds[-1])) - torch.repeat_interleave(bounds[:-1], bounds.diff())
    batch = tk.PackedBatch(torch.zeros_like(place), bounds, (place > 1) & (place != 3), tree.leaf_root)
    return credit.Rollouts(batch, {"reward": torch.tensor(rewards)}, tree=tree)


@pytest.mark.parametrize("observations", [True, False])
def test_the_credit_of_tokens(observations: bool) -> None:
    """The expression's tokens are those of the function, given every token's reward."""
    tree = tk.Tree(torch.tensor([-1, 0, 0, 1, 1, 1, -1, 6]), torch.tensor([2, 2, 3, 1, 2, 1, 2, 4]))
    rollouts = _rollouts(tree, [0.0, 1, 1, 0, 1])
    batch, owner = rollouts.batch, torch.repeat_interleave(torch.arange(5), rollouts.batch.lengths.long())
    place = torch.arange(batch.num_tokens) - batch.cu_seqlens[owner]
    counted = place > 1 if observations else batch.loss_mask
    token_rewards = torch.zeros(batch.num_tokens)
    for n, end in enumerate(batch.cu_seqlens[1:].tolist()):
        last = max(t for t in range(end) if batch.loss_mask[t] and owner[t] == n)
        token_rewards[last] = rollouts.reward("reward")[n]
    parts = [credit.tree_terms.OfTokens(within, observations=observations) for within in ("group", "tree")]
    found = (parts[0] + parts[1])(rollouts)
    expected = token_advantages(token_rewards, tree.leaf_root[owner], batch.group_ids[owner], counted)
    torch.testing.assert_close(found.advantages, torch.where(batch.loss_mask, expected, 0))
    if observations:
        spec = credit.recipe("tree_grpo", estimator="tree_per_token")
        assert spec == parts[0] + parts[1] == eval(repr(spec), {"credit": credit})


def test_a_gated_or_unscored_rollout_is_in_no_pool() -> None:
    rollouts = _rollouts(DIFF, [0.0, 1, 1, math.nan])
    found = credit.recipe("tree_grpo", estimator="tree_per_token")(rollouts)
    three = tk.Tree(DIFF.parent[:5], DIFF.node_lengths[:5])
    alone = credit.recipe("tree_grpo", estimator="tree_per_token")(_rollouts(three, [0.0, 1, 1]))
    tokens = len(alone.advantages)
    assert found.keep.tolist() == [True, True, True, False]
    torch.testing.assert_close(found.advantages[:tokens], alone.advantages, rtol=1e-6, atol=1e-6)
    assert not found.mask[tokens:].any()


def test_the_credit_of_a_diff() -> None:
    rollouts = _rollouts(DIFF, [0.0, 1, 1, 0])
    found = credit.recipe("tree_grpo", estimator="tree_diff")(rollouts)
    nodes = node_rewards(rollouts.reward("reward"), DIFF)
    expected = torch.repeat_interleave(nodes, DIFF.node_lengths)[DIFF.flat_index]
    torch.testing.assert_close(found.advantages, torch.where(rollouts.batch.loss_mask, expected, 0))
    with pytest.raises(ValueError, match="estimator must be one of .*'tree_per_token', 'tree_diff'"):
        credit.recipe("tree_grpo", estimator="diff")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: node_rewards(torch.ones(3), DIFF), ValueError, r"leaf_rewards must have shape \[4\]"),
        (lambda: node_rewards(torch.ones(4), DIFF, margin=-0.1), ValueError, "margin must be at least 0"),
        (lambda: node_rewards(torch.ones(4), DIFF, leaves=1), TypeError, "leaves must be True or False"),
        (
            lambda: pooled_outcomes(torch.ones(2), torch.ones(2).long(), torch.tensor([1, -1])),
            ValueError,
            "counts must",
        ),
        (
            lambda: token_advantages(torch.ones(2), *torch.tensor([[0, 0], [0, 1]]), torch.ones(2) > 0),
            ValueError,
            "each tree in one group",
        ),
        (lambda: credit.tree_terms.OfTokens("batch"), ValueError, "within must be one of 'group', 'tree'"),
    ],
)
def test_refuses_what_is_no_pool(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
