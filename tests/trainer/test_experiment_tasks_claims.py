"""Check digits: a question by hand, and what a judge of them is asked."""

from __future__ import annotations

from trajkern._bench.experiments.tasks.claims import Claims
from trajkern.trainer.systems.judge import Judge, Judging
from trajkern.trainer.tasks import Question

SIZES = {"heldout": 60, "validation": 60, "demonstrations": 60, "train": 200}


def test_a_check_digit_by_hand() -> None:
    task = Claims("claims", 1)
    asked = next(task.questions(0))
    digits = [int(x) for x in asked.prompt[:-1]]
    assert len(digits) == 5 and asked.prompt.endswith(":") and (sum(digits) + int(asked.answer)) % 10 == 0
    hand = Question("39475:", "", "2", {"right": "2", "wrong": "1"})
    assert task.responses(hand) == ["2", "1"]
    assert [task.critique(hand, x) for x in ("2", "1")] == ["2\n6\n3\n8\n0", "2\n6\n3\n8\n9"]
    assert {text: task.read(hand, text).correct for text in ("2", "12", "1", "")} == {
        "2": True,
        "12": False,
        "1": False,
        "": False,
    }


def test_claims_are_right_half_the_time_and_say_nothing_else() -> None:
    task = Judging(Claims("claims", 2), Judge(form="pointwise", brief=True))
    splits = task.splits(**SIZES)
    prompts = {name: {question.prompt[:-2] for question in some} for name, some in vars(splits).items()}
    assert [len(some) for some in vars(splits).values()][:3] == [60, 60, 60]
    assert not prompts["heldout"] & (prompts["validation"] | prompts["demonstrations"] | prompts["train"])
    for question in splits.train:
        digits, claim = question.prompt[:5], int(question.prompt[6])
        right = (sum(map(int, digits)) + claim) % 10 == 0
        assert question.answer.endswith("\n0\n10") == right and question.answer.endswith(f"\n{10 * right}")
        assert task.read(question, question.answer).correct
        assert not task.read(question, f"{10 * (not right)}").correct
    labels = [question.entry["label"] for question in splits.train]
    assert 70 < sum(labels) < 130
    assert splits == Judging(Claims("claims", 2), Judge(form="pointwise", brief=True)).splits(**SIZES)
    assert splits != Judging(Claims("claims", 3), Judge(form="pointwise", brief=True)).splits(**SIZES)
