"""Evaluative and directive feedback: votes, hints, and both kinds of advantage, by hand and against plain loops."""

from __future__ import annotations

import math
import statistics
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trajkern.recipes.feedback import majority_vote, select_hint, step_advantages, token_advantages

NAN = math.nan
TOKENS = {
    "rewards": torch.tensor([1.0, -1.0, 0.0]),
    "teacher_logprobs": torch.tensor([NAN, -1.0, -2.0, NAN, -0.5]),
    "old_logprobs": torch.tensor([NAN, -1.5, -2.0, NAN, -0.25]),
    "loss_mask": torch.tensor([False, True, True, False, True]),
    "cu_seqlens": torch.tensor([0, 3, 5, 5]),
}


def tokens(**change: object) -> Tensor:
    return token_advantages(**(TOKENS | change))


def test_literal_votes(device: str) -> None:
    votes = [
        [1.0, 1.0, -1.0, NAN, 0.0, 1.0, -1.0],
        [1.0, -1.0, -1.0, NAN, 1.0, 0.0, NAN],
        [-1.0, NAN, 0.0, NAN, 0.0, -1.0, NAN],
    ]
    out = majority_vote(torch.tensor(votes, device=device))
    assert out.tolist() == [1, 0, -1, 0, 0, 0, -1] and out.dtype == torch.float32
    assert majority_vote(torch.tensor([[1, -1], [1, -1]], device=device)).tolist() == [1, -1]
    assert majority_vote(torch.zeros(0, 2, device=device)).tolist() == [0, 0]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([1.0, 0.0, -1.0, NAN]), max_size=7))
def test_votes_match_a_counter(votes: list[float]) -> None:
    counts = Counter(v for v in votes if v == v)
    most = max(counts.values(), default=0)
    leaders = [v for v, n in counts.items() if n == most]
    expected = leaders[0] if len(leaders) == 1 else 0.0
    assert majority_vote(torch.tensor(votes).reshape(-1, 1)).item() == expected


def test_select_hint() -> None:
    hints = ["  use the table of primes ", "x" * 30, "read the error again", None, "too short"]
    assert select_hint([1, -1, 1, 1, 1], hints) == "use the table of primes"
    assert select_hint([0, 1, 1, None, 1], hints) == "x" * 30
    # blanks do not count, ten characters are too few, and the first of equally long hints wins
    assert select_hint([1, 1], ["a" * 10, "b" * 8 + " " * 9]) is None
    assert select_hint([1, 1], ["a" * 11, "b" * 11]) == "a" * 11
    assert select_hint([1], ["short"], min_length=4) == "short"
    assert select_hint([], []) is None


def test_literal_token_advantages(device: str) -> None:
    out = tokens(**{name: x.to(device) for name, x in TOKENS.items()})
    assert out.tolist() == [0, 1.5, 1.0, 0, -1.25] and out.dtype == torch.float32
    assert tokens(directive_weight=0).tolist() == [0, 1, 1, 0, -1]
    assert tokens(reward_weight=0, directive_weight=2).tolist() == [0, 1, 0, 0, -0.5]  # distillation alone


def test_a_sample_without_a_hint_is_its_own_teacher() -> None:
    assert tokens(teacher_logprobs=TOKENS["old_logprobs"]).tolist() == [0, 1, 1, 0, -1]


# group 1: step 0 has 1, 0, 0.5; step 1 is constant; group 2 has a lone step
STEPS = {
    "step_rewards": torch.tensor([1.0, 0.25, 0.0, 0.25, 0.5, 0.75]),
    "group": torch.tensor([1, 1, 1, 1, 1, 2]),
    "step": torch.tensor([0, 1, 0, 1, 0, 0]),
}


def test_literal_step_advantages(device: str) -> None:
    out, keep = step_advantages(**{name: x.to(device) for name, x in STEPS.items()})
    z = 0.5 / math.sqrt(1 / 6)
    torch.testing.assert_close(out.cpu(), torch.tensor([z, 0, -z, 0, 0, 0.75]), rtol=1e-5, atol=1e-6)
    assert out[[1, 3]].tolist() == [0, 0]
    assert keep.tolist() == [True, False, True, False, True, True]


def test_a_batch_of_constants_keeps_its_first_steps() -> None:
    out, keep = step_advantages(torch.full((4,), 0.1), torch.tensor([3, 1, 3, 1]), torch.zeros(4, dtype=torch.int64))
    assert out.tolist() == [0] * 4 and keep.tolist() == [True, False, True, False]
    assert [x.shape for x in step_advantages(torch.zeros(0), *[torch.zeros(0).long()] * 2)] == [(0,), (0,)]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, -0.5, 0.1]), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=20
    )
)
def test_steps_match_a_plain_loop(rows: list[tuple[float, int, int]]) -> None:
    buckets: dict[tuple[int, int], list[float]] = {}
    for r, g, s in rows:
        buckets.setdefault((g, s), []).append(r)
    differing = {key for key, x in buckets.items() if len(x) == 1 or statistics.pvariance(x) > 1e-12}
    trained = differing or {rows[0][1:]}
    expected = []
    for r, g, s in rows:
        peers = buckets[g, s]
        if len(peers) > 1:
            r = (r - statistics.fmean(peers)) / (statistics.pstdev(peers) + 1e-6) if (g, s) in differing else 0.0
        expected.append(r)
    reward, group, step = (list(x) for x in zip(*rows, strict=True))
    out, keep = step_advantages(
        torch.tensor(reward, dtype=torch.float64), torch.tensor(group), torch.tensor(step, dtype=torch.int32)
    )
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert keep.tolist() == [key[1:] in trained for key in rows]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: majority_vote(torch.tensor([[1.0, 2.0]])), ValueError, r"votes must be 1, 0, .* 2.0 at \[0, 1\]"),
        (lambda: majority_vote(torch.ones(3)), ValueError, "votes must have 2 dimensions"),
        (lambda: select_hint([1], []), ValueError, "hints must have one entry for each of the 1 scores"),
        (lambda: select_hint([2], ["a"]), ValueError, "scores must be 1, 0, -1 or None; it is 2 at index 0"),
        (lambda: select_hint([1], [3]), TypeError, "hints must be strings or None"),
        (lambda: tokens(teacher_logprobs=torch.zeros(4)), ValueError, r"teacher_logprobs must have shape \[5\]"),
        (lambda: tokens(teacher_logprobs=torch.full((5,), -math.inf)), ValueError, "teacher_logprobs must be finite"),
        (lambda: tokens(old_logprobs=torch.full((5,), NAN)), ValueError, "old_logprobs must be finite; it is nan at"),
        (lambda: tokens(rewards=torch.ones(2)), ValueError, r"rewards must have shape \[3\]"),
        (lambda: tokens(cu_seqlens=torch.tensor([0, 3, 4, 4])), ValueError, "cu_seqlens must run from 0 to the 5"),
        (lambda: tokens(reward_weight=-1), ValueError, "reward_weight must be at least 0"),
        (lambda: step_advantages(torch.ones(2), *[torch.ones(1).long()] * 2), ValueError, r"group must have shape"),
    ],
)
def test_refuses(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
