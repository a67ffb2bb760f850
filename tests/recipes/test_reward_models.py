"""Reasoning reward models: three rules, two votes, Elo and the knockout, by hand and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trajkern.recipes.reward_models import elo, knockout, meta_vote, rule_rewards, vote

A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"


def test_deepseek_grm(device: str) -> None:
    """A tie with the best is no win; one response alone must be given its own score."""
    scores = torch.tensor([[7, 5, 6], [7, 7, 2], [1, 2, 3], [4, 4, 9]], device=device)
    labels = torch.tensor([0, 0, 1, 2], device=device)
    assert rule_rewards(scores, labels, rule="deepseek_grm").tolist() == [1, -1, -1, 1]
    single = torch.tensor([[8], [3]], device=device)
    assert rule_rewards(single, torch.tensor([8, 8], device=device), rule="deepseek_grm").tolist() == [1, -1]
    nan = torch.tensor([[math.nan, 1.0], [2.0, math.nan]], device=device)
    assert rule_rewards(nan, torch.tensor([1, 0], device=device), rule="deepseek_grm").tolist() == [-1, -1]


def test_rm_r1() -> None:
    texts = [
        f"<eval>...</eval>{A}",
        f"first {B}, then {A}",  # both near the end
        f"{B}{'.' * 90}{A}",  # the other one is too far back to count
        f"{A}{'.' * 59}",  # 22 + 59 characters: its first is cut off
        f"{A}{'.' * 58}",
        "<answer>[[a]]</answer>",
        "",
    ]
    assert rule_rewards(texts, ["A"] * 7, rule="rm_r1").tolist() == [1, -1, 1, -1, 1, -1, -1]
    assert rule_rewards([A, B], ["B", "B"], rule="rm_r1").tolist() == [-1, 1]


def test_rrm(device: str) -> None:
    chosen, labels = torch.tensor([0, 1, -1, 1], device=device), torch.tensor([0, 0, -1, 1], device=device)
    out = rule_rewards(chosen, labels, rule="rrm")
    assert out.tolist() == [1, -1, -1, 1] and out.dtype == torch.float32


def test_votes(device: str) -> None:
    scores = torch.tensor([[1, 9], [5, 5], [9, 2], [4, 8]], device=device)
    assert vote(scores).tolist() == [19, 24]
    meta = torch.tensor([0.1, 0.7, 0.9, 0.7], device=device)
    assert meta_vote(scores, meta, keep=1).tolist() == [9, 2]
    assert meta_vote(scores, meta, keep=2).tolist() == [14, 7]  # the first of two equal ratings
    assert torch.equal(meta_vote(scores, meta, keep=4), vote(scores))
    assert vote(scores.double()).dtype == torch.float64


def test_elo_by_hand() -> None:
    """One game between equals moves both by k/2; the next is played from there."""
    one = elo(torch.tensor([[0, 1], [0, 0]]))
    assert one.tolist() == [1016, 984]
    out = elo(torch.tensor([[0, 1, 0], [0, 0, 1], [0, 0, 0]]), k=40, base=0)  # 0 beats 1, 1 beats 2, no 0 against 2
    lifted = 40 * (1 - 1 / (1 + 10 ** (20 / 400)))
    torch.testing.assert_close(out, torch.tensor([20, -20 + lifted, -lifted], dtype=torch.float64))
    assert elo(torch.tensor([[0, 0.5], [0.5, 0]])).tolist() == [1000, 1000]  # a draw
    assert elo(torch.tensor([[0, 3], [1, 0]]), k=8, base=0).tolist() == [2, -2]  # a share of three quarters


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.integers(1, 7))
def test_elo_matches_a_plain_loop(seed: int, size: int) -> None:
    g = torch.Generator().manual_seed(seed)
    wins = torch.randint(0, 3, (size, size), generator=g).fill_diagonal_(0)
    r = [1000.0] * size
    for i in range(size):
        for j in range(i + 1, size):
            n = int(wins[i, j] + wins[j, i])
            if n:
                e = 1 / (1 + 10 ** ((r[j] - r[i]) / 400))
                d = 32 * (int(wins[i, j]) / n - e)
                r[i], r[j] = r[i] + d, r[j] - d
    out = elo(wins)
    torch.testing.assert_close(out, torch.tensor(r, dtype=torch.float64))
    assert math.isclose(out.sum().item(), 1000 * size)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(), min_size=1, max_size=40, unique=True), st.integers(0, 99))
def test_the_best_wins_the_knockout(candidates: list[int], seed: int) -> None:
    played: list[tuple[int, int]] = []
    games = dict.fromkeys(candidates, 0)

    def compare(first: int, second: int) -> bool:
        played.append((first, second))
        games[first] += 1
        games[second] += 1
        return first > second

    before = list(candidates)
    assert knockout(compare, candidates, seed=seed) == max(candidates)
    assert len(played) == len(candidates) - 1
    assert max(games.values()) <= math.ceil(math.log2(len(candidates)))
    assert candidates == before
    again = list(played)
    played.clear()
    knockout(compare, candidates, seed=seed)
    assert played == again


ONE = torch.ones(1, 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rule_rewards(ONE, torch.tensor([2]), rule="deepseek_grm"), ValueError, r"labels must lie in \[0, 2\)"),
        (lambda: rule_rewards(ONE, torch.tensor([0]), rule="best"), ValueError, "rule must be one of 'deepseek_grm'"),
        (lambda: rule_rewards(ONE[:, :0], torch.tensor([0]), rule="deepseek_grm"), ValueError, "at least one response"),
        (lambda: rule_rewards(ONE, torch.tensor([0]), rule="rrm"), TypeError, "judgements must have dtype int64"),
        (lambda: rule_rewards([A], ["C"], rule="rm_r1"), ValueError, "labels must be one of 'A', 'B'; got 'C'"),
        (lambda: rule_rewards([A], ["A", "B"], rule="rm_r1"), ValueError, "one entry for each of the 1 judgements"),
        (lambda: rule_rewards(A, "A", rule="rm_r1"), TypeError, "judgements must be a sequence of strings"),
        (lambda: vote(torch.tensor([[1.0, math.nan]])), ValueError, "scores must be finite"),
        (lambda: meta_vote(ONE, torch.ones(2), keep=1), ValueError, r"meta must have shape \[1\]"),
        (lambda: meta_vote(ONE, torch.ones(1), keep=2), ValueError, "keep must be at most the 1 samples, got 2"),
        (lambda: meta_vote(ONE, torch.ones(1), keep=1.0), TypeError, "keep must be an int"),
        (lambda: elo(ONE), ValueError, "wins must be square"),
        (lambda: elo(torch.eye(2)), ValueError, "wins must be 0 on the diagonal"),
        (lambda: elo(-torch.ones(2, 2)), ValueError, "wins must be at least 0"),
        (lambda: elo(torch.zeros(2, 2), k=0), ValueError, "k must be greater than 0"),
        (lambda: knockout(lambda a, b: True, [], seed=0), ValueError, "candidates must hold at least one"),
        (lambda: knockout(lambda a, b: None, [1, 2], seed=0), TypeError, "compare must return True or False, got None"),
    ],
)
def test_refuses(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
