"""What an evaluation makes of its samples, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trajkern.trainer.evaluate import distinct_right, pass_at, reliability
from trajkern.trainer.tasks.base import Answer

REWARDS = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]])


def test_pass_at_every_k_counts_the_draws_without_a_right_one() -> None:
    rights = [2, 0, 1]
    expected = [1 - sum(math.comb(4 - right, k) for right in rights) / (3 * math.comb(4, k)) for k in (1, 2, 3, 4)]
    assert pass_at(REWARDS) == pytest.approx(expected)


def test_the_best_of_k_of_other_rewards() -> None:
    """Of -1, 2 and 0.5: the mean, of the three pairs the better ones 2, 2 and 0.5, and the best of all."""
    assert pass_at(torch.tensor([[-1.0, 2.0, 0.5]])) == pytest.approx([0.5, 1.5, 2.0])
    assert pass_at(torch.full((2, 2), -1.0)) == pytest.approx([-1.0, -1.0])


def test_right_texts_are_counted_once_a_question() -> None:
    texts = ["a", "a", "b", "c", "a", "b", "c", "d", "a", "b", "c", "d"]
    assert distinct_right(REWARDS, texts) == pytest.approx((2 + 0 + 1) / 3)
    assert distinct_right(torch.ones(3, 4), texts) == pytest.approx((3 + 4 + 4) / 3)


def test_confidences_fall_into_tenths() -> None:
    answers = [Answer(True, 0.7), Answer(False, 0.75), Answer(True, 1.0), Answer(False, None), Answer(True, 0.3)]
    bins = reliability(answers)
    assert [count for count, _, _ in bins] == [0, 0, 0, 1, 0, 0, 0, 2, 0, 1]
    assert bins[7] == pytest.approx([2, 0.725, 0.5]) and bins[9] == [1, 1.0, 1.0] and bins[0] == [0, 0.0, 0.0]
