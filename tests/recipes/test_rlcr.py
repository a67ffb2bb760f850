"""RLCR: rewards and votes by hand, the bins of the calibration error and the AUROC against plain loops too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trajkern.recipes.rlcr import calibration, rewards, vote

CORRECT, CONFIDENCE = [1.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.5, 1.0, 0.0]
TABLE = {"paper": [1, 0.75, -0.25, -1, 0], "code": [1.5, 1.375, 0.875, 0.5, 1]}
ANSWERS = st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=1, max_size=30)


@pytest.mark.parametrize("form", list(TABLE))
def test_literal_rewards(form: str, device: str) -> None:
    out = rewards(torch.tensor(CORRECT, device=device), torch.tensor(CONFIDENCE, device=device), form=form)
    assert out.tolist() == TABLE[form] and out.dtype == torch.float32


@pytest.mark.parametrize(("form", "least"), [("paper", -1), ("code", 0)])
def test_what_cannot_be_read_earns_the_least(form: str, least: float) -> None:
    """Whatever stands in its place; not even a right answer counts without its format."""
    confidence, well_formed = torch.tensor([0.5, math.nan, 7.0]), torch.tensor([True, False, False])
    out = rewards(torch.ones(3, dtype=torch.bool), confidence, form=form, well_formed=well_formed)
    assert out.tolist() == [TABLE[form][1], least, least]
    everything = rewards(torch.tensor(CORRECT), torch.tensor(CONFIDENCE), form=form)
    assert everything.min() >= least


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(ANSWERS)
def test_forms_agree_up_to_scale(answers: list[tuple[bool, int]]) -> None:
    c, q = (torch.tensor(x, dtype=torch.float64) for x in zip(*((c, k / 20) for c, k in answers), strict=True))
    paper = rewards(c, q)
    expected = [float(a) - (b - float(a)) ** 2 for a, b in zip(c.tolist(), q.tolist(), strict=True)]
    torch.testing.assert_close(paper, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(rewards(c, q, form="code"), 1 + paper / 2)


def test_the_best_confidence_is_the_probability() -> None:
    q = torch.linspace(0, 1, 101, dtype=torch.float64)
    for p in (0.1, 0.5, 0.83):
        expected = p * rewards(torch.ones(101), q) + (1 - p) * rewards(torch.zeros(101), q)
        assert abs(q[expected.argmax()].item() - p) < 1e-9


def test_literal_calibration(device: str) -> None:
    c = torch.tensor([True, False, True, True], device=device)
    out = calibration(c, torch.tensor([0.95, 0.91, 0.25, 0.0], dtype=torch.float64, device=device))
    assert out.size.tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0, 2]
    assert math.isclose(out.ece.item(), (1 + 0.75 + abs(0.5 * 2 - 1.86)) / 4)
    assert math.isclose(out.brier.item(), (0.05**2 + 0.91**2 + 0.75**2 + 1) / 4)
    assert math.isclose(out.auroc.item(), 1 / 3)
    assert math.isclose(out.confidence[9].item(), 0.93) and out.accuracy[9] == 0.5
    assert out.confidence[1].isnan() and out.accuracy[1].isnan()
    assert out.edges.tolist() == np.linspace(0, 1, 11).tolist()


def test_edges_of_the_bins() -> None:
    """0.3 lies below its edge in float64; 1 belongs to the last bin, 0 to the first."""
    q = [0.0, 0.1, 0.3, 0.5, 1.0]
    places = calibration(torch.ones(5), torch.tensor(q, dtype=torch.float64)).size
    assert places.tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 0, 1]
    assert calibration(torch.ones(1), torch.tensor([0.3])).size.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(ANSWERS, st.integers(1, 12))
def test_calibration_matches_plain_loops(answers: list[tuple[bool, int]], bins: int) -> None:
    c, q = [float(c) for c, _ in answers], [k / 20 for _, k in answers]
    out = calibration(torch.tensor(c), torch.tensor(q, dtype=torch.float64), bins=bins)
    edges = np.linspace(0, 1, bins + 1)
    edges[0], edges[-1] = -np.inf, np.inf
    place = np.digitize(q, edges) - 1
    ece = 0.0
    for b in range(bins):
        inside = [i for i in range(len(c)) if place[i] == b]
        if inside:
            gap = np.mean([c[i] for i in inside]) - np.mean([q[i] for i in inside])
            ece += abs(gap) * len(inside) / len(c)
    assert math.isclose(out.ece.item(), ece, abs_tol=1e-12)
    assert math.isclose(out.brier.item(), float(np.mean(np.square(np.subtract(c, q)))), abs_tol=1e-12)
    pairs = [(x > y) + 0.5 * (x == y) for i, x in enumerate(q) for j, y in enumerate(q) if c[i] and not c[j]]
    if pairs:
        assert math.isclose(out.auroc.item(), sum(pairs) / len(pairs), abs_tol=1e-12)
    else:
        assert out.auroc.isnan()


def test_no_answer() -> None:
    out = calibration(torch.zeros(0), torch.zeros(0))
    assert out.ece.isnan() and out.brier.isnan() and out.auroc.isnan() and out.size.sum() == 0
    assert rewards(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rewards(torch.ones(2), torch.tensor([0.5, 1.5])), ValueError, r"confidence must lie in \[0, 1\]"),
        (lambda: rewards(torch.ones(1), torch.tensor([math.nan])), ValueError, r"confidence must lie in \[0, 1\]"),
        (lambda: rewards(torch.tensor([0.5]), torch.ones(1)), ValueError, "correct must be 0 or 1; it is 0.5"),
        (lambda: rewards(torch.ones(2), torch.ones(3)), ValueError, r"correct must have shape \[3\]"),
        (lambda: rewards(torch.ones(1), torch.ones(1), form="log"), ValueError, "form must be one of 'paper', 'code'"),
        (lambda: rewards(torch.ones(1), torch.ones(1), well_formed=torch.ones(1)), TypeError, "well_formed must have"),
        (lambda: calibration(torch.ones(1), torch.tensor([-0.1])), ValueError, r"confidence must lie in \[0, 1\]"),
        (lambda: calibration(torch.ones(1), torch.ones(1), bins=0), ValueError, "bins must be at least 1"),
        (lambda: calibration(torch.ones(1), torch.ones(1), bins=2.5), TypeError, "bins must be an int"),
    ],
)
def test_refuses(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


SAMPLES, STATED = ["12", "7", "7", None, "12", "7"], [0.9, 0.3, 0.2, 1.0, 0.1, 0.3]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("weighted", (0, "12", 1.0 / 1.8)),  # 0.9 + 0.1 against 0.3 + 0.2 + 0.3
        ("max", (0, "12", 0.9)),
        ("majority", (1, "7", 3 / 5)),  # the unread answer has no vote, however sure it is
    ],
)
def test_vote(method: str, expected: tuple) -> None:
    for confidences in (STATED, torch.tensor(STATED, dtype=torch.float64)):
        place, answer, confidence = vote(SAMPLES, confidences, method=method)
        assert (place, answer) == expected[:2]
        assert confidence == pytest.approx(expected[2], rel=1e-12)


def test_vote_ties_go_to_the_first_and_silence_weighs_nothing() -> None:
    nan = math.nan
    assert vote("b a a b".split(), [0.5, 0.25, 0.25, 0.0])[:2] == (0, "b")
    assert vote(["b", "a"], [0.5, 0.5], method="max")[:2] == (0, "b")
    assert vote(["b", "a", "a", "b"], [nan] * 4, method="majority") == (0, "b", 0.5)
    assert vote(["b", "a", "a"], [nan, nan, 0.1])[:2] == (1, "a")
    place, answer, confidence = vote(["b", "a"], [nan, nan])
    assert (place, answer) == (0, "b") and math.isnan(confidence)
    for silent in ([], [None, None]):
        place, answer, confidence = vote(silent, [0.5] * len(silent))
        assert place is None and answer is None and math.isnan(confidence)


def test_a_weighted_vote_beats_the_majority_where_confidences_tell() -> None:
    """A right sample says so with 0.9, wrong ones agree by chance and say 0.2: by counting, they win."""
    answers, confidences = ["right", "wrong", "wrong"], [0.9, 0.2, 0.2]
    assert vote(answers, confidences).answer == "right"
    assert vote(answers, confidences, method="majority").answer == "wrong"


@pytest.mark.parametrize(
    ("answers", "confidences", "method", "error", "message"),
    [
        (["a"], [0.5], "mean", ValueError, "method must be one of 'weighted', 'max', 'majority'"),
        ("ab", [0.5, 0.5], "max", TypeError, "answers must be a sequence of answers, one a sample"),
        (["a"], [0.5, 0.5], "max", ValueError, "confidences must have one entry for each of the 1 answers, got 2"),
        (["a", "b"], [0.5, 1.5], "weighted", ValueError, r"confidences must lie in \[0, 1\]; it is 1.5 at index 1"),
        ([None, "b"], [-1.0, 0.5], "weighted", ValueError, r"confidences must lie in \[0, 1\]; it is -1.0 at index 0"),
        (["a"], ["high"], "max", TypeError, "confidences must be a number, got 'high'"),
        (["a"], torch.tensor([1]), "max", TypeError, "confidences must have dtype"),
    ],
)
def test_vote_refuses(answers, confidences, method: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        vote(answers, confidences, method=method)
