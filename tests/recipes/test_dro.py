"""DRO's filters, gates and length reward: by hand and against plain loops."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trajkern.recipes.dro import (
    GATES,
    Curriculum,
    gate,
    keep_groups,
    length_reward,
    propagated,
    rank_filter,
    right_minus_wrong,
)

# prompt 1: rollouts of ranks (1, 9, 5) and (2, 2, 2); prompt 2: one rollout (8, 1) and one without a token
RANKS = {
    "ranks": torch.tensor([1, 9, 5, 2, 2, 2, 8, 1]),
    "cu_seqlens": torch.tensor([0, 3, 6, 8, 8]),
    "group_ids": torch.tensor([1, 1, 2, 2]),
}
PASSED, GROUPS = [True, False, True, True, False, False, True], [3, 3, 3, 4, 5, 5, 4]


def ranked(**change: object) -> list[bool]:
    return rank_filter(**(RANKS | {"worst_fraction": 0.5, "top_k": 2} | change)).tolist()


def test_literal_rank_filter(device: str) -> None:
    """The worst half, rounded up, are two of three and one of two: means 7, 2 and 8."""
    on = {name: x.to(device) for name, x in RANKS.items()}
    assert ranked(**on) == [True, True, False, False]
    assert ranked(**on, top_k=8) == [True] * 4
    assert ranked(**on, top_k=1) == [False] * 4
    # all tokens count: means 5, 2 and 4.5
    assert ranked(**on, worst_fraction=1.0, top_k=4) == [True, True, False, False]
    # 0.07 of 100 tokens are seven, not eight: their mean is 100
    seven = {"ranks": torch.tensor([100] * 7 + [1] * 93), "cu_seqlens": torch.tensor([0, 100])}
    seven = {name: x.to(device) for name, x in (seven | {"group_ids": torch.tensor([0])}).items()}
    assert ranked(**seven, worst_fraction=0.07, top_k=90) == [False]
    # a rollout without reference tokens reaches nothing
    apart = on | {"group_ids": torch.tensor([1, 1, 2, 6], device=device)}
    assert ranked(**apart, top_k=9) == [True, True, True, False]


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 50), max_size=12)), max_size=8),
    st.sampled_from([0.01, 0.07, 0.1, 0.25, 0.5, 1.0]),
    st.integers(1, 40),
)
def test_rank_filter_matches_a_plain_loop(rollouts: list, fraction: float, top_k: int) -> None:
    def mean(ranks: list[int]) -> float:
        worst = sorted(ranks, reverse=True)[: math.ceil(fraction * len(ranks) - 1e-9)]
        return sum(worst) / len(worst) if worst else math.inf

    best = {g: min(mean(r) for h, r in rollouts if h == g) for g, _ in rollouts}
    out = rank_filter(
        torch.tensor([r for _, ranks in rollouts for r in ranks], dtype=torch.int64),
        torch.tensor([0] + [len(ranks) for _, ranks in rollouts]).cumsum(0),
        torch.tensor([g for g, _ in rollouts], dtype=torch.int64),
        worst_fraction=fraction,
        top_k=top_k,
    )
    assert out.tolist() == [best[g] <= top_k for g, _ in rollouts]


def test_keep_groups(device: str) -> None:
    score = torch.tensor([0.3, 0.1, 0.2, 0.1, 0.5], device=device)
    assert keep_groups(score, drop_fraction=0.0).tolist() == [True] * 5
    assert keep_groups(score, drop_fraction=0.39).tolist() == [True, False, True, True, True]
    assert keep_groups(score, drop_fraction=0.4).tolist() == [True, False, True, False, True]
    assert keep_groups(torch.zeros(100), drop_fraction=0.29).tolist() == [False] * 29 + [True] * 71
    assert keep_groups(score[:0], drop_fraction=0.5).shape == (0,)


def test_length_reward(device: str) -> None:
    lengths, reference = torch.tensor([10, 5, 0, 30], device=device), torch.tensor([10, 10, 10, 10], device=device)
    torch.testing.assert_close(length_reward(lengths, reference, beta=0.5).cpu(), torch.tensor([1, 0.75, 0.5, 0]))
    assert length_reward(lengths, reference.double(), beta=0).tolist() == [1] * 4


GATED = {
    "drop_rollout": PASSED,
    "reject_group_if_any_fails": [False, False, False, True, False, False, True],
    "reject_group_if_all_fail": [True, True, True, True, False, False, True],
    "pass_rate": [True, True, True, True, False, False, True],
}


@pytest.mark.parametrize("mode", GATES)
def test_literal_gate(mode: str, device: str) -> None:
    passed, groups = torch.tensor(PASSED, device=device), torch.tensor(GROUPS, device=device)
    out = gate(passed, groups, mode=mode)
    assert out.tolist() == GATED[mode] and out.dtype == torch.bool
    assert passed.tolist() == PASSED


def test_pass_rate_threshold() -> None:
    passed, groups = torch.tensor(PASSED), torch.tensor(GROUPS)
    assert gate(passed, groups, mode="pass_rate", threshold=0.67).tolist() == GATED["reject_group_if_any_fails"]
    assert gate(passed, groups, mode="pass_rate", threshold=0).all()
    ten = torch.arange(10) < 3  # a share that meets the threshold exactly
    assert gate(ten, torch.zeros(10, dtype=torch.int64), mode="pass_rate", threshold=0.3).all()


def test_a_share_meets_the_threshold_that_it_is() -> None:
    for size in (*range(1, 41), 96, 129):
        group = torch.zeros(size, dtype=torch.int64)
        for passed in range(size + 1):
            share, flags = passed / size, torch.arange(size) < passed
            for threshold in (share, round(share, 2), round(share, 3)):
                assert gate(flags, group, threshold=threshold).tolist() == [share >= threshold] * size


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-2, 2))), st.sampled_from(GATES), st.sampled_from([0.25, 0.5, 1]))
def test_gate_matches_a_plain_loop(rows: list[tuple[bool, int]], mode: str, threshold: float) -> None:
    expected = []
    for passed, group in rows:
        peers = [p for p, g in rows if g == group]
        rate = sum(peers) / len(peers)
        expected.append(
            {
                "drop_rollout": passed,
                "reject_group_if_any_fails": all(peers),
                "reject_group_if_all_fail": any(peers),
                "pass_rate": rate >= threshold,
            }[mode]
        )
    passed, groups = torch.tensor([p for p, _ in rows], dtype=torch.bool), torch.tensor([g for _, g in rows]).long()
    assert gate(passed, groups, mode=mode, threshold=threshold).tolist() == expected


LONG, ONES = torch.ones(2, dtype=torch.int64), torch.ones(2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ranked(ranks=RANKS["ranks"].float()), TypeError, "ranks must have dtype int64, int32"),
        (lambda: ranked(ranks=RANKS["ranks"] - 1), ValueError, "ranks must be at least 1"),
        (lambda: ranked(worst_fraction=0), ValueError, "worst_fraction must be greater than 0"),
        (lambda: ranked(worst_fraction=1.1), ValueError, "worst_fraction must be at most 1"),
        (lambda: ranked(top_k=0), ValueError, "top_k must be at least 1"),
        (lambda: ranked(cu_seqlens=torch.tensor([0, 3, 6, 8, 9])), ValueError, "cu_seqlens must run from 0 to the 8"),
        (lambda: keep_groups(ONES, drop_fraction=1), ValueError, "drop_fraction must be less than 1"),
        (lambda: keep_groups(ONES * math.nan, drop_fraction=0.1), ValueError, "group_score must be finite"),
        (lambda: length_reward(ONES, ONES * 0, beta=1), ValueError, "reference_lengths must be at least 1"),
        (lambda: length_reward(-ONES, ONES, beta=1), ValueError, "lengths must be at least 0"),
        (lambda: length_reward(ONES, ONES, beta=-1), ValueError, "beta must be at least 0"),
        (lambda: gate(ONES, LONG), TypeError, "passed must have dtype bool"),
        (lambda: gate(ONES > 0, LONG, mode="reject"), ValueError, "mode must be one of 'drop_rollout'"),
        (lambda: gate(ONES > 0, LONG, threshold=2), ValueError, "threshold must be at most 1"),
        (lambda: gate(ONES > 0, LONG[:1]), ValueError, r"group_ids must have shape \[2\]"),
    ],
)
def test_refuses(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_the_default_gate_is_of_groups() -> None:
    """Two of three, two of two and none of two passed."""
    passed, groups = torch.tensor(PASSED), torch.tensor(GROUPS)
    assert gate(passed, groups).tolist() == [True, True, True, True, False, False, True]
    assert torch.equal(gate(passed, groups), gate(passed, groups, mode="pass_rate", threshold=0.5))
    assert gate(passed, groups, threshold=1).tolist() == [False, False, False, True, False, False, True]


def test_right_minus_wrong(device: str) -> None:
    """Group 1: 4 and 2 right, 1 wrong: 2. Group 2: 0 right, 3 and 5 wrong: -4. The others have one kind only."""
    rewards = torch.tensor([4.0, 1, 0, 3, 2, 5, 9, 8], device=device)
    correct = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0], device=device) > 0
    groups = torch.tensor([1, 1, 2, 2, 1, 2, 7, 8], device=device)
    assert float(right_minus_wrong(rewards, correct, groups)) == pytest.approx(-1.0, abs=1e-15)
    assert float(right_minus_wrong(rewards[:2], correct[:2], groups[:2])) == pytest.approx(3.0, abs=1e-15)
    assert math.isnan(float(right_minus_wrong(rewards[6:], correct[6:], groups[6:])))
    with pytest.raises(TypeError, match="correct must have dtype bool"):
        right_minus_wrong(rewards, rewards, groups)


def test_a_curriculum_carries_prompts_over() -> None:
    curriculum: Curriculum[str] = Curriculum(carry=0.5, seed=3)
    first = curriculum.next_round(["a", "b", "c", "d", "e"], torch.tensor([True, True, False, True, True]))
    assert first == ["a", "b", "d", "e"] == list(curriculum.last)
    second = curriculum.next_round(["x", "a", "y"], [True, True, False])
    assert second[:2] == ["x", "a"], "what is kept comes first, in its order"
    assert len(second) == 4 and set(second[2:]) < {"b", "d", "e"}, "half of four, and a is not taken twice"
    assert second[2:] == sorted(second[2:])
    assert Curriculum(carry=0).next_round(["a"], [False]) == []
    everything = Curriculum(carry=1)
    everything.next_round([1, 2, 3], [True] * 3)
    assert everything.next_round([4], [True]) == [4, 1, 2, 3]
    tenth = Curriculum()
    tenth.next_round(list(range(19)), [True] * 19)
    assert len(tenth.next_round([], [])) == 1


def test_a_curriculum_goes_on_after_json() -> None:
    one, other = Curriculum(carry=0.4, seed=5), Curriculum(carry=0.4, seed=5)
    one.next_round(list("abcdefghij"), [True] * 10)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    rounds = [[x.next_round(list("klmno"), [True] * 5), x.next_round(list("pq"), [True, False])] for x in (one, other)]
    assert rounds[0] == rounds[1]
    before = other.state_dict()
    for broken in ({}, {"rounds": -1, "last": []}, {"rounds": 1, "last": ["a", "a"]}, {"rounds": 1, "last": 3}):
        with pytest.raises(ValueError, match="state must be what Curriculum.state_dict returned"):
            other.load_state_dict(broken)
    for prompts, keep, message in (
        (["a", "a"], [True, True], "prompts must be a sequence in which none is twice"),
        ("ab", [True, True], "prompts must be a sequence"),
        (["a"], [], "keep must be 1 flags, one a prompt"),
        (["a"], torch.tensor([1.0]), "keep must be 1 flags, one a prompt"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            other.next_round(prompts, keep)
    assert other.state_dict() == before
    with pytest.raises(ValueError, match="carry must be at most 1"):
        Curriculum(carry=2)


def test_literal_doubts(device: str) -> None:
    """Two rollouts of three tokens and one of none; of each three the two with the largest deviation are reflective."""
    p = torch.tensor([0.5, 0.25, 0.8, 1.0, 0.1, 0.5], dtype=torch.float64, device=device)
    std = torch.tensor([1.0, 3.0, 0.0, 2.0, 0.0, 0.0], dtype=torch.float64, device=device)
    bounds = torch.tensor([0, 3, 3, 6], device=device)
    near, far = 0.5, 0.25  # exp(-gamma), exp(-2 gamma)
    factors = torch.tensor([1, 1 - 0.5 * near, (1 - 0.5 * far) * (1 - 0.75 * near), 1, 1, 1]).to(p)
    found = propagated(p.log(), bounds, std, gamma=math.log(2), fraction=0.5)
    torch.testing.assert_close(found, (p * factors).log(), rtol=1e-12, atol=1e-12)
    assert propagated(p.log().float(), bounds, std.float(), gamma=50, fraction=1.0).dtype == torch.float32
    torch.testing.assert_close(propagated(p.log(), bounds, std, gamma=50, fraction=1.0), p.log())
    unlikely = propagated(torch.full_like(p, -1e4), bounds, std, gamma=math.log(2), fraction=0.3)
    lost = p.new_tensor([0, 0, math.log(near), 0, math.log(near), math.log(1 - far)])
    torch.testing.assert_close(unlikely, lost - 1e4, rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 3)), max_size=9), min_size=1, max_size=5),
    st.sampled_from([0.1, 0.34, 1.0]),
    st.floats(0.2, 3),
)
def test_doubts_match_a_plain_loop(rollouts: list, fraction: float, gamma: float) -> None:
    expected = []
    for tokens in rollouts:
        by_std = sorted(range(len(tokens)), key=lambda j: -tokens[j][1])
        chosen = [k for k in by_std[: math.ceil(fraction * len(tokens) - 1e-9)] if tokens[k][1] > 0]
        for j, (p, _) in enumerate(tokens):
            for k in (k for k in chosen if k < j):
                p *= tokens[k][0] + (1 - tokens[k][0]) * (1 - math.exp(-gamma * (j - k)))
            expected.append(math.log(p))
    flat = [token for tokens in rollouts for token in tokens]
    x, std = (torch.tensor([token[i] for token in flat], dtype=torch.float64) for i in range(2))
    bounds = torch.tensor([0, *map(len, rollouts)]).cumsum(0)
    found = propagated(x.log(), bounds, std, gamma=gamma, fraction=fraction)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0}, "gamma must be"),
        ({"fraction": 1.5}, "fraction must be"),
        ({"std": torch.tensor([-1.0, 0])}, "std must be"),
        ({"std": torch.ones(3)}, "std must have shape"),
        ({"cu_seqlens": torch.tensor([0, 1])}, "cu_seqlens must"),
    ],
)
def test_bad_doubts(change: dict, message: str) -> None:
    known = {"logprobs": -torch.ones(2), "cu_seqlens": torch.tensor([0, 2]), "std": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        propagated(**(known | {"gamma": 1.0, "fraction": 0.5} | change))
