"""Bits of known odds: an answer by hand, how sure its question allows one to be, and what is reported of it."""

from __future__ import annotations

import itertools

import pytest

from trajkern._bench.experiments.tasks.odds import Odds, chance_of, likeliest
from trajkern.trainer.tasks import Answer, Question, load_task

PLAIN = Question("5820:1ad0=", "", "1110 4", {"answer": "1110", "places": "1ad0"})


@pytest.fixture
def odds() -> Odds:
    return Odds("odds", 0)


def test_an_answer_by_hand(odds: Odds) -> None:
    assert odds.read(PLAIN, "1110 4") == Answer(True, 0.45, True)
    assert odds.read(PLAIN, "1100 9") == Answer(False, 0.95, True)
    for illegible in ("1110", "1110 ", "1110 45", "1110 x", "1110  4", ""):
        assert not odds.read(PLAIN, illegible).correct
    for illegible in ("1110", "1110 45", ""):
        assert odds.read(PLAIN, illegible) == Answer(False, None, False)


def test_the_odds_of_an_answer_by_hand() -> None:
    assert chance_of("1ad0", "1110") == pytest.approx(0.95 * 0.5)
    assert chance_of("bcd0", "0110") == pytest.approx(0.15 * 0.7 * 0.5)
    assert chance_of("1ad0", "0110") == chance_of("1ad0", "1111") == chance_of("1ad0", "111") == 0
    assert likeliest("01ab") == "0111" and likeliest("cd00") == "1100"


def test_answers_come_out_as_often_as_their_odds_say(odds: Odds) -> None:
    right, expected = 0, 0.0
    for question in itertools.islice(odds.questions(3), 1000):
        places, bits = question.entry["places"], question.entry["answer"]
        assert question.prompt[4:] == f":{places}=" and chance_of(places, bits) > 0
        right += bits == likeliest(places)
        expected += chance_of(places, likeliest(places))
        assert odds.read(question, question.answer).correct
    assert abs(right - expected) < 4 * 0.5 * 1000**0.5


def test_demonstrations_are_informed_and_too_sure(odds: Odds) -> None:
    some = [
        (chance_of(q.entry["places"], likeliest(q.entry["places"])), q)
        for q in itertools.islice(odds.questions(2), 2000)
    ]
    sure, unsure = ([q for chance, q in some if low <= chance <= high] for low, high in ((0.9, 1), (0, 0.2)))
    mean = [sum(odds.read(q, q.answer).confidence or 0 for q in group) / len(group) for group in (sure, unsure)]
    assert mean[0] > mean[1] + 0.1 and mean[1] > 0.4


def test_who_knows_the_odds_is_calibrated_best(odds: Odds) -> None:
    values = odds.statistics([PLAIN] * 4, ["1110 4", "1110 9", "0000 4", "illegible"])
    assert values == {"ideal_brier": pytest.approx((2 * 0.525**2 + 0) / 3), "ideal_auroc": 1.0}


def test_questions_depend_on_the_seed_and_nothing_else() -> None:
    draws = [list(itertools.islice(Odds("odds", seed).questions(3), 30)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    task = load_task("trajkern._bench.experiments.tasks.odds:Odds")
    splits = task.splits(heldout=40, validation=40, demonstrations=100, train=100)
    some = [{q.prompt for q in s} for s in (splits.heldout, splits.validation, [*splits.demonstrations, *splits.train])]
    assert not some[0] & some[1] and not (some[0] | some[1]) & some[2]


def test_answers_are_voted_on_without_their_confidence(odds: Odds) -> None:
    assert odds.ballot(PLAIN, "1110 4") == odds.ballot(PLAIN, "1110 9") == "1110"
    assert odds.ballot(PLAIN, "1110") is None
