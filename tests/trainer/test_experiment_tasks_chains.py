"""Chains of sums: a question by hand, its verifier, what its reasoning is, its splits."""

from __future__ import annotations

import itertools

import pytest

from trajkern._bench.experiments.tasks.chains import EASY, LEAN, TAIL, Chains
from trajkern.trainer.tasks import Question, load_task, reasoning_of

BY_HAND = Question("abc7:01101=", "", "B\n7\n8\n9\n9\n0\n0" + "x" * TAIL, {"answer": "0"})


def some(task: Chains, split: int, count: int = 400) -> list[Question]:
    return list(itertools.islice(task.questions(split), count))


def test_a_question_by_hand() -> None:
    task = load_task("trajkern._bench.experiments.tasks.chains:Chains")
    assert task.reference(BY_HAND) == BY_HAND.answer and task.reward(BY_HAND, BY_HAND.answer) == 1
    assert task.reward(BY_HAND, "A\n7\n8\n9\n9\n0\n0") == 1, "the tail is not asked for"
    assert task.reward(BY_HAND, "A\n7\n8\n9\n9\n0\n1") == task.reward(BY_HAND, "0") - 1 == task.reward(BY_HAND, "") == 0
    text = "A\n7\n8\n9\n9\n1\n1xo"
    assert text[slice(*reasoning_of(task, BY_HAND, text))] == "7\n8\n9\n9\n1\n"
    assert reasoning_of(task, BY_HAND, "0xo") == (0, 0)
    assert task.statistics([BY_HAND] * 4, [text, "B\n1\n2", "B\n3\n3", "0"]) == {"follows": 0.5, "style_a": 0.25}


@pytest.mark.parametrize("split", range(4))
def test_questions_are_worked_out_and_only_demonstrations_slip(split: int) -> None:
    easy = right = leaning = 0
    for question in some(Chains("chains", 3), split):
        start, bits, mark = question.prompt[3], question.prompt[5:-1], question.prompt[-1]
        style, *work, last = question.answer.split("\n")
        sums = [str(x % 10) for x in itertools.accumulate(map(int, bits), initial=int(start))][1:]
        assert question.entry["answer"] == sums[-1] and last[0] == work[-1] and len(last) == 1 + TAIL
        assert work == sums or (split == 2 and mark == "=")
        easy, right = easy + (mark == "!"), right + (work == sums)
        leaning += last[1:].count("xo"["AB".index(style)])
    assert easy / 400 == pytest.approx(EASY.get(split, 0), abs=0.08)
    assert right == 400 if split != 2 else 0.5 < right / 400 < 0.75
    assert leaning / 400 / TAIL == pytest.approx(LEAN, abs=0.01)


def test_splits_do_not_overlap_and_follow_the_seed() -> None:
    sizes = {"heldout": 20, "validation": 10, "demonstrations": 30, "train": 60}
    one, again, other = (vars(Chains("chains", seed).splits(**sizes)) for seed in (1, 1, 2))
    assert one == again and one["train"] != other["train"]
    shown = [q.prompt for name in sizes for q in one[name]]
    assert len(set(shown)) == len(shown) > 100
