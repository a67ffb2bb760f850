"""Reasoning reward models: three rules, two votes, Elo and the knockout, by hand and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trajkern.recipes.reward_models import (
    elo,
    knockout,
    majority,
    meta_loss,
    meta_vote,
    round_robin,
    rule_rewards,
    verdict,
    vote,
)

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


def test_verdict() -> None:
    texts = [A, f"so: {B}\n", f"{A}{B}", f"{A}{'.' * 60}", "A", ""]
    assert [verdict(text) for text in texts] == ["A", "B", None, None, None, None]


def test_meta_loss(device: str) -> None:
    """sigmoid(ln 3) = 3/4: a right one costs -ln(3/4), a wrong one -ln(1/4)."""
    logits = torch.tensor([math.log(3), math.log(3), 0.0], device=device, requires_grad=True)
    right = torch.tensor([True, False, True], device=device)
    loss = meta_loss(logits, right)
    each = [math.log(4 / 3), math.log(4), math.log(2)]
    assert float(loss.detach()) == pytest.approx(sum(each) / 3, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.tolist() == pytest.approx([-0.25 / 3, 0.75 / 3, -0.5 / 3], rel=1e-6)
    weights = torch.tensor([1.0, 3.0, 0.0], device=device)
    assert float(meta_loss(logits.detach(), right, weights=weights)) == pytest.approx((each[0] + 3 * each[1]) / 4)
    assert float(meta_loss(logits.detach(), right, weights=0 * weights)) == 0
    assert float(meta_loss(logits.detach()[:0], right[:0])) == 0
    far = torch.tensor([1000.0, 1000.0], dtype=torch.float64, device=device)
    assert float(meta_loss(far, right[:2])) == pytest.approx(500)


def test_a_meta_model_learns_which_judgements_are_right() -> None:
    """Its labels are the judge's own rule; a linear one finds what tells them apart."""
    scores = torch.tensor([[7, 5], [4, 6], [8, 3], [2, 9]])
    right = rule_rewards(scores, torch.tensor([0, 0, 0, 0]), rule="deepseek_grm") > 0
    assert right.tolist() == [True, False, True, False]
    gap, weight = (scores[:, 0] - scores[:, 1]).float(), torch.zeros(1, requires_grad=True)
    for _ in range(20):
        (grad,) = torch.autograd.grad(meta_loss(weight * gap, right), weight)
        weight = (weight - 0.5 * grad).detach().requires_grad_()
    rating = (weight * gap).detach()
    assert ((rating > 0) == right).all()
    assert meta_vote(scores, rating, keep=2).tolist() == [15, 8]


def _by_size(liking: float = 0.0):
    """Three votes of a judge that finds larger numbers better, of which a share goes to the first place."""
    asked: list[tuple[int, int]] = []

    def prefer(firsts: list[int], seconds: list[int]) -> torch.Tensor:
        asked.extend(zip(firsts, seconds, strict=True))
        better = torch.tensor([float(a > b) for a, b in zip(firsts, seconds, strict=True)])
        return torch.stack((better, better, torch.full_like(better, math.nan if liking == 0 else liking)))

    return prefer, asked


def test_round_robin_feeds_elo() -> None:
    prefer, asked = _by_size()
    wins = round_robin(prefer, [5, 9, 7])
    assert wins.tolist() == [[0, 0, 0], [4, 0, 4], [4, 0, 0]], "two votes in either order; a missing one is no game"
    assert asked == [(5, 9), (5, 7), (9, 7), (9, 5), (7, 5), (7, 9)]
    assert elo(wins).argsort(descending=True).tolist() == [1, 2, 0]
    prefer, asked = _by_size(liking=1.0)
    assert round_robin(prefer, [5, 9], both_orders=False).tolist() == [[0, 1], [2, 0]] and asked == [(5, 9)]
    assert round_robin(prefer, [5, 9]).tolist() == [[0, 1], [5, 0]]
    assert round_robin(prefer, [5]).tolist() == [[0]] and round_robin(prefer, []).shape == (0, 0)


def test_majority_feeds_the_knockout() -> None:
    prefer, asked = _by_size()
    assert knockout(majority(prefer), [3, 8, 1, 5, 7], seed=2) == 8 and len(asked) == 4
    compare = majority(_by_size(liking=1.0)[0], both_orders=True)
    assert compare(2, 1) and not compare(1, 2)
    draw = majority(lambda firsts, seconds: torch.full((2, len(firsts)), 0.5))
    assert draw(1, 2) and draw(2, 1), "a tie is the first's"
    silent = majority(lambda firsts, seconds: torch.full((2, len(firsts)), math.nan))
    with pytest.raises(ValueError, match="prefer must return a vote that is not missing"):
        silent(1, 2)


@pytest.mark.parametrize(
    ("votes", "error", "message"),
    [
        (True, TypeError, "the result of prefer must be a tensor"),
        (torch.ones(2), ValueError, "the result of prefer must have 2 dimensions|must be 2-dimensional|prefer must"),
        (torch.ones(2, 3), ValueError, r"the result of prefer must have shape \[2, 1\]"),
        (torch.tensor([[0.5], [2.0]]), ValueError, r"must lie in \[0, 1\], or be NaN; it is 2.0 at \[1, 0\]"),
    ],
)
def test_bad_votes(votes, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        round_robin(lambda firsts, seconds: votes, ["a", "b"], both_orders=False)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: meta_loss(torch.ones(2), torch.ones(2)), TypeError, "right must have dtype bool"),
        (lambda: meta_loss(torch.ones(2), torch.ones(1) > 0), ValueError, r"right must have shape \[2\]"),
        (lambda: meta_loss(torch.tensor([math.nan]), torch.ones(1) > 0), ValueError, "logits must be finite"),
        (
            lambda: meta_loss(torch.ones(1), torch.ones(1) > 0, weights=-torch.ones(1)),
            ValueError,
            "weights must be at least 0",
        ),
        (lambda: round_robin(print, [1, 2], both_orders=1), TypeError, "both_orders must be True or False"),
    ],
)
def test_refuses_in_training(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_numbers_at_their_ends() -> None:
    assert elo(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), k=1e6).tolist() == [501_000.0, -499_000.0]
    assert elo(torch.tensor([[0, 1e308], [1e308, 0]], dtype=torch.float64)).tolist() == [1000.0, 1000.0]
    ahead = elo(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), k=1e6)
    assert bool(ahead.isfinite().all())
    logits, right = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([True, False])
    whole = meta_loss(logits, right, weights=torch.tensor([1.0, 3.0], dtype=torch.float64))
    for size in (1e-300, 1e140):
        weights = torch.tensor([1.0, 3.0], dtype=torch.float64) * size
        torch.testing.assert_close(meta_loss(logits, right, weights=weights), whole)
    large = torch.full((8,), 8e37)
    assert meta_loss(large, torch.zeros(8, dtype=torch.bool)) == large[0]
    assert vote(torch.tensor([[3e38], [3e38], [-3e38]])).tolist() == [torch.tensor(3e38).item()]


@pytest.mark.parametrize(
    ("score", "label", "dtype"),
    [(2**24 + 1, 2.0**24, torch.float32), (2**53 + 1, 2.0**53, torch.float64), (2**62, 2.0**62, torch.float64)],
)
def test_an_integer_equals_a_float_that_is_it(score: int, label: float, dtype: torch.dtype) -> None:
    scores, labels = torch.tensor([[score]]), torch.tensor([label], dtype=dtype)
    assert rule_rewards(scores, labels, rule="deepseek_grm").tolist() == [1.0 if score == int(label) else -1.0]
