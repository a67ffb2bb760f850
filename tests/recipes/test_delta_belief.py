"""Delta-Belief-RL: the reward and the advantage of a turn, by hand and against plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trajkern.recipes.delta_belief import FINISHED, turn_advantages, turn_rewards

NAN, INF = math.nan, math.inf
# a won game of three turns (the last belief was not asked for), a lost one of a single turn, one without any
BELIEFS = {
    "log_beliefs": torch.tensor([-4.0, -3.0, -3.5, NAN, -4.0, -2.0, -1.0]),
    "cu_beliefs": torch.tensor([0, 4, 6, 7]),
    "won": torch.tensor([True, False, False]),
    "penalty": torch.tensor([0.0, -1.0, 0.0, -5.0]),
}
# prompt 7 has rollouts of two, one and no turns; prompt 8 one rollout
TURNS = {
    "turn_rewards": torch.tensor([3.0, 2.0, 1.0, 0.5]),
    "trajectory": torch.tensor([0, 0, 1, 3]),
    "turn": torch.tensor([0, 1, 0, 0]),
    "group_ids": torch.tensor([7, 7, 7, 8]),
}


def rewards(**change: object) -> Tensor:
    return turn_rewards(**(BELIEFS | change))


def advantages(**change: object) -> Tensor:
    return turn_advantages(**(TURNS | change))


def test_literal_rewards(device: str) -> None:
    out = rewards(**{name: x.to(device) for name, x in BELIEFS.items()})
    end = 2 - 0.05 * 3
    torch.testing.assert_close(out.cpu(), torch.tensor([end + 0.1, end - 1, end, 0.2 - 5]))
    assert out.dtype == torch.float32


def test_losses_of_belief_without_the_clip() -> None:
    torch.testing.assert_close(rewards(clip=False) - rewards(), torch.tensor([0, -0.05, 0, 0]))


def test_options() -> None:
    out = rewards(scale=1.0, win_reward=10.0, turn_cost=0.5)
    torch.testing.assert_close(out, torch.tensor([8.5 + 1, 8.5 - 1, 8.5, 2.0 - 5]))


def test_beliefs_that_are_infinite_teach_nothing() -> None:
    beliefs = torch.tensor([-INF, -INF, -2.0, -INF, -1.0, -3.0, NAN])
    out = rewards(log_beliefs=beliefs, won=torch.tensor([False] * 3), penalty=torch.zeros(4), clip=False)
    torch.testing.assert_close(out, torch.tensor([-0.15, -0.15, -0.15, -0.2]))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.sampled_from([-3.0, -1.0, -0.5, NAN, -INF]), min_size=1, max_size=5)),
        max_size=6,
    ),
    st.booleans(),
)
def test_rewards_match_a_plain_loop(games: list[tuple[bool, list[float]]], clip: bool) -> None:
    expected, penalty = [], []
    for won, beliefs in games:
        turns = len(beliefs) - 1
        for before, after in zip(beliefs, beliefs[1:], strict=False):
            delta = after - before
            delta = 0.0 if math.isnan(delta) or math.isinf(delta) else max(delta, 0) if clip else delta
            penalty.append(-float(len(penalty) % 3))
            expected.append(2.0 * won - (0.05 * turns if turns > 1 else 0) + 0.1 * delta + penalty[-1])
    double = {"dtype": torch.float64}
    out = turn_rewards(
        torch.tensor([b for _, beliefs in games for b in beliefs], **double),
        torch.tensor([0] + [len(beliefs) for _, beliefs in games]).cumsum(0),
        won=torch.tensor([won for won, _ in games], dtype=torch.bool),
        penalty=torch.tensor(penalty, **double),
        clip=clip,
    )
    torch.testing.assert_close(out, torch.tensor(expected, **double))


def test_literal_advantages(device: str) -> None:
    """Turn 0 of prompt 7 has 3, 1 and a zero, turn 1 has 2 and two zeros; the lone rollout stays raw."""
    given_ = {name: x.to(device) for name, x in TURNS.items()}
    std0, std1 = statistics.stdev([3, 1, 0]), statistics.stdev([2, 0, 0])
    expected = [(3 - 4 / 3) / std0, (2 - 2 / 3) / std1, (1 - 4 / 3) / std0, 0.5]
    torch.testing.assert_close(advantages(**given_).cpu(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    half = math.sqrt(0.5)
    masked = advantages(**given_, finished="masked").cpu()
    torch.testing.assert_close(masked, torch.tensor([half, 2, -half, 0.5]), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.sampled_from([0.0, 1.0, -2.0, 0.5]), max_size=4)), max_size=8),
    st.sampled_from(FINISHED),
)
def test_advantages_match_a_plain_loop(games: list[tuple[int, list[float]]], finished: str) -> None:
    expected = []
    for group, game in games:
        for t, r in enumerate(game):
            alive = [x for g, x in games if g == group and (t < len(x) or finished == "included")]
            peers = [x[t] if t < len(x) else 0.0 for x in alive]
            mean, std = (statistics.fmean(peers), statistics.stdev(peers)) if len(peers) > 1 else (0, 1)
            expected.append((r - mean) / (std + 1e-6))
    double = {"dtype": torch.float64}
    out = turn_advantages(
        torch.tensor([r for _, game in games for r in game], **double),
        torch.tensor([n for n, (_, game) in enumerate(games) for _ in game], dtype=torch.int64),
        torch.tensor([t for _, game in games for t in range(len(game))], dtype=torch.int64),
        torch.tensor([group for group, _ in games], dtype=torch.int64),
        finished=finished,
    )
    torch.testing.assert_close(out, torch.tensor(expected, **double), rtol=1e-9, atol=1e-9)


def test_equal_turns_are_exactly_nothing() -> None:
    out = advantages(turn_rewards=torch.full((4,), 0.1), turn=torch.tensor([0, 1, 0, 0]), finished="masked")
    assert out[[0, 2]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rewards(cu_beliefs=torch.tensor([0, 4, 4, 7])), ValueError, "belief; trajectory 1 has none"),
        (lambda: rewards(cu_beliefs=torch.tensor([0, 4, 6, 8])), ValueError, "cu_beliefs must run from 0 to the 7"),
        (lambda: rewards(penalty=torch.zeros(7)), ValueError, r"penalty must have shape \[4\]"),
        (lambda: rewards(won=torch.ones(3)), TypeError, "won must have dtype bool"),
        (lambda: rewards(scale=-1.0), ValueError, "scale must be at least 0"),
        (lambda: advantages(turn=torch.tensor([0, 0, 0, 0])), ValueError, "0 is twice in trajectory 0"),
        (lambda: advantages(trajectory=torch.tensor([0, 0, 1, 4])), ValueError, r"trajectory must lie in \[0, 4\)"),
        (lambda: advantages(finished="dropped"), ValueError, "finished must be one of 'included', 'masked'"),
        (lambda: advantages(turn_rewards=torch.tensor([1, 2, NAN, 0])), ValueError, "turn_rewards must be finite"),
    ],
)
def test_refuses(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
