"""VinePPO: the difference of Monte Carlo values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trajkern.recipes.vineppo import step_advantages

VALUES = st.floats(-8, 8)


def test_literal(device: str) -> None:
    """The outcome 1 is the last step's reward, behind which nothing is to be had."""
    values = torch.tensor([0.5, 0.75, 0.25, 0.0], device=device)
    out = step_advantages(values, torch.tensor([0.0, 0.0, 1.0], device=device))
    assert out.tolist() == [0.25, -0.5, 0.75] and out.dtype == torch.float32


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(VALUES, VALUES), max_size=12), VALUES)
def test_matches_a_plain_loop(steps: list[tuple[float, float]], last: float) -> None:
    values, rewards = [v for v, _ in steps] + [last], [r for _, r in steps]
    out = step_advantages(torch.tensor(values, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64))
    expected = [r + values[i + 1] - values[i] for i, r in enumerate(rewards)]
    torch.testing.assert_close(out, torch.tensor(expected, dtype=torch.float64))
    assert math.isclose(out.sum().item(), sum(rewards) + last - values[0], abs_tol=1e-9)


def test_no_step() -> None:
    assert step_advantages(torch.tensor([0.3]), torch.tensor([])).shape == (0,)


@pytest.mark.parametrize(
    ("values", "rewards", "error", "message"),
    [
        ([0.0, 1.0], [0.0, 1.0], ValueError, r"values must have shape \[3\] \(one a step and one behind the last\)"),
        ([0.0, math.nan], [0.0], ValueError, "values must be finite"),
        ([0.0, 1.0], [[0.0]], ValueError, "step_rewards must have 1 dimension"),
        ([0, 1], [0.0], TypeError, "values must have dtype"),
    ],
)
def test_refuses(values: list, rewards: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        step_advantages(torch.tensor(values), torch.tensor(rewards))
