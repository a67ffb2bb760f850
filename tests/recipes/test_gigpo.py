"""GiGPO: the episode's and the step's comparison, by hand and against a plain loop."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trajkern.recipes.gigpo import step_advantages

# prompt 0: episode 0 of three steps and episode 1 of one; prompt 1: episode 2 of a single step
TRAJECTORY, GROUP, ANCHOR = [0, 0, 0, 1, 2], [0, 0, 0, 0, 1], [8, 9, 8, 8, 8]
RETURNS, EPISODES = [0.9, 0.95, 1.0, 0.2, 0.4], [1.0, 0.0, 0.5]


def norm(x: list[float], keys: list, scale: str, alone: str) -> list[float]:
    out = []
    for value, key in zip(x, keys, strict=True):
        peers = [v for v, k in zip(x, keys, strict=True) if k == key]
        if len(peers) == 1:
            centred, std = value if alone == "raw" else 0.0, 1.0
        else:
            centred, std = value - statistics.fmean(peers), statistics.stdev(peers)
        out.append(centred / (std + 1e-6) if scale == "std" else centred)
    return out


def call(**change: object) -> Tensor:
    given_ = {"returns": RETURNS, "trajectory": TRAJECTORY, "anchor": ANCHOR, "group": GROUP} | change
    options = {k: v for k, v in given_.items() if k in ("weight", "scale")}
    episodes = given_.get("episode_rewards", EPISODES)
    tensors = {k: torch.tensor(given_[k]) for k in ("returns", "trajectory", "anchor", "group")}
    return step_advantages(**tensors, episode_rewards=torch.tensor(episodes), **options)


def test_literal(device: str) -> None:
    """Episode mean over steps (1+1+1+0)/4; anchor 8 of prompt 0 has returns .9, 1, .2 (mean .7); the rest are alone."""
    places = [torch.tensor(x, device=device) for x in (RETURNS, TRAJECTORY, ANCHOR, GROUP)]
    out = step_advantages(*places, episode_rewards=torch.tensor(EPISODES, device=device), weight=2.0)
    expected = [0.25 + 0.4, 0.25, 0.25 + 0.6, -0.75 - 1.0, 0.5]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.cpu(), torch.tensor(expected))


def test_defaults() -> None:
    assert torch.equal(call(), call(weight=1.0, scale="none"))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.floats(-2, 2), st.integers(0, 5), st.integers(0, 2)), max_size=20),
    st.lists(st.sampled_from([0.0, 1.0]), min_size=6, max_size=6),
    st.floats(0, 2, allow_subnormal=False),
    st.sampled_from(["none", "std"]),
)
def test_matches_a_plain_loop(steps: list[tuple], episodes: list[float], weight: float, scale: str) -> None:
    steps = [(round(r, 2), t, a) for r, t, a in steps]
    returns, trajectory, anchor = ([s[i] for s in steps] for i in range(3))
    group = [t // 2 for t in trajectory]
    whole = norm([episodes[t] for t in trajectory], group, scale, "raw")
    local = norm(returns, list(zip(group, anchor, strict=True)), scale, "zero")
    expected = torch.tensor([a + weight * b for a, b in zip(whole, local, strict=True)], dtype=torch.float64)
    ids = (torch.tensor(x, dtype=torch.int64) for x in (trajectory, anchor, group))
    out = step_advantages(
        torch.tensor(returns, dtype=torch.float64),
        *ids,
        episode_rewards=torch.tensor(episodes, dtype=torch.float64),
        weight=weight,
        scale=scale,
    )
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-9)


def test_one_state_in_two_groups_is_two_states() -> None:
    out = call(returns=[1.0, 0.0], trajectory=[0, 1], anchor=[3, 3], group=[0, 1], episode_rewards=[0.0, 0.0])
    assert out.tolist() == [0, 0]


def test_equal_values_are_exactly_nothing() -> None:
    out = call(returns=[0.1] * 5, anchor=[1] * 5, group=[0] * 5, episode_rewards=[0.3] * 3, scale="std")
    assert out.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"trajectory": [0, 0, 0, 1, 3]}, ValueError, r"lie in \[0, 3\), the trajectories; it is 3 at index 4"),
        ({"anchor": [8, 9]}, ValueError, r"anchor must have shape \[5\]"),
        ({"group": [0.0] * 5}, TypeError, "group must have dtype int64, int32"),
        ({"weight": -1.0}, ValueError, "weight must be at least 0"),
        ({"scale": "mean"}, ValueError, "scale must be one of 'std', 'none'"),
        ({"episode_rewards": [1.0, math.inf, 0.0]}, ValueError, "episode_rewards must be finite"),
    ],
)
def test_refuses(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(**change)
