"""Forms with three fields: a question by hand, what is told and what is checked, what slips, its splits."""

from __future__ import annotations

import itertools

import pytest

from trajkern._bench.experiments.rows.composition import COMPOSITION
from trajkern._bench.experiments.tasks.forms import LENGTH, SLIPS, Forms
from trajkern.trainer.tasks import Action, Question, load_task


def some(task: Forms, split: int, count: int = 300) -> list[Question]:
    return list(itertools.islice(task.questions(split), count))


def test_a_question_by_hand() -> None:
    task = load_task("trajkern._bench.experiments.tasks.forms:Forms")
    assert isinstance(task, Forms)
    (question,) = some(task, 0, 1)
    word, answer = question.prompt[:LENGTH], question.answer
    codes, signs = answer[1 : 2 * LENGTH : 2], answer[2 * LENGTH + 2 :: 2]
    for digit in "07":
        assert task.read(question, answer[:6] + digit + answer[7:]).correct, "the digit is free"
    other = "+-"[signs[0] == "+"]
    wrong = {
        "a code": word[0] + ("B" if codes[0] == "A" else "A") + answer[2:],
        "a sign": answer[:8] + other + answer[9:],
    }
    for text in wrong.values():
        found = task.read(question, text)
        assert found.well_formed and not found.correct
    assert task.hint(question, wrong["a code"]) == word[0] + codes[0]
    assert task.hint(question, wrong["a sign"]) is None and task.hint(question, answer) is None
    for text in ("", answer[:-1], answer + "+", answer[:6] + "x" + answer[7:], answer[7:] + "7" + answer[7:]):
        assert not task.read(question, text).well_formed and (not text or task.hint(question, text) is None)
    assert task.hint(question, "") in [answer[at : at + 2] for at in (0, 2, 4)]
    assert task.action_spans(question, wrong["a sign"]) == [
        Action(7 + 2 * at, 9 + 2 * at, right) for at, right in enumerate((False, True, True))
    ]
    twice = answer[7:] + "7" + answer[7:]
    assert [action.right for action in task.action_spans(question, twice)] == [True] * 6
    statistics = task.statistics([question] * 2, [wrong["a code"], twice])
    assert statistics == {"codes": 2 / 6, "signs": 1.0, "form": 0.5, "signs_anywhere": 4.5}


@pytest.mark.parametrize("split", range(4))
def test_only_demonstrations_slip_and_know_no_fact(split: int) -> None:
    task = Forms("forms", 3)
    formed = right = 0
    for question in some(task, split):
        found = task.read(question, question.answer)
        formed += found.well_formed
        right += all(action.right for action in task.action_spans(question, question.answer))
        assert found.correct or split == 2
    assert formed / 300 == pytest.approx(1 - SLIPS if split == 2 else 1, abs=0.08)
    assert right / 300 == pytest.approx(1 / 8 if split == 2 else 1, abs=0.05)


def test_splits_do_not_overlap_and_tables_follow_the_seed() -> None:
    sizes = {"heldout": 20, "validation": 10, "demonstrations": 30, "train": 60}
    one, again, other = (vars(Forms("forms", seed).splits(**sizes)) for seed in (1, 1, 2))
    assert one == again and one["train"] != other["train"]
    shown = [q.prompt for name in sizes for q in one[name]]
    assert len(set(shown)) == len(shown) > 100
    tables = [{(q.prompt[at], q.answer[2 * at + 1]) for q in some(Forms("forms", 1), 3) for at in range(LENGTH)}]
    assert len(tables[0]) == 26, "a letter has one code"


def test_the_composition_has_its_parts() -> None:
    assert {"reward", "action", "spans:call", "flags:well_formed", "divergence"} <= COMPOSITION.needs
