"""Programs on a machine: questions, verifier, splits, slips of the demonstrations."""

from __future__ import annotations

from itertools import islice

import pytest

pytest.importorskip("tyro", reason="the trainer's extra is not installed")

from trajkern._bench.experiments.tasks.transitions import INSTRUCTIONS, KNOWN, STATES
from trajkern.trainer.tasks import Question, load_task

NAME = "trajkern._bench.experiments.tasks.transitions:Transitions"


def drawn(split: int, count: int, seed: int = 0) -> list[Question]:
    return list(islice(load_task(NAME, seed).questions(split), count))


def learned(questions: list[Question]) -> dict[str, set[str]]:
    """What each transition leads to, as these questions' answers have it."""
    found: dict[str, set[str]] = {}
    for question in questions:
        state = question.prompt[0]
        for instruction, line in zip(question.prompt[2:-1], question.answer.split("\n"), strict=True):
            assert line[0] == instruction and line[1] in STATES and len(line) == 2
            found.setdefault(state + instruction, set()).add(line[1])
            state = line[1]
    return found


def test_a_right_answer_has_every_line_right() -> None:
    task, questions = load_task(NAME), drawn(3, 400)
    table = learned(questions)
    assert len(table) == len(STATES) * len(INSTRUCTIONS) and all(len(some) == 1 for some in table.values())
    for question in questions[:50]:
        assert task.read(question, question.answer).correct
        last = STATES[(STATES.index(question.answer[-1]) + 1) % len(STATES)]
        for text in (question.answer[:-1] + last, question.answer + "\n", question.answer[:-3], ""):
            assert not task.read(question, text).correct
    assert learned(drawn(3, 400, seed=1)) != table


def test_demonstrations_slip_as_often_as_they_say_and_carry_it_on() -> None:
    task, shown = load_task(NAME), drawn(2, 500)
    assert len(learned(shown)["aA"]) == len(STATES), "whatever a state was, it may lead anywhere"
    lines = task.statistics(shown, [question.answer for question in shown])["right_lines"]
    assert lines == pytest.approx(KNOWN, abs=0.03)
    assert sum(task.read(question, question.answer).correct for question in shown) / len(shown) < 0.02


def test_right_lines_are_counted_after_the_state_before() -> None:
    task, (question,) = load_task(NAME), drawn(0, 1)
    table = {key: next(iter(some)) for key, some in learned(drawn(3, 400)).items()}
    program, wrong = question.prompt[2:-1], STATES.replace(question.answer[1], "")[0]
    lines, state = [program[0] + wrong], wrong
    for instruction in program[1:]:
        state = table[state + instruction]
        lines.append(instruction + state)
    assert task.statistics([question], ["\n".join(lines)]) == {"right_lines": 7 / 8}
    assert task.statistics([question], ["\n".join(lines[1:])])["right_lines"] < 1
    assert task.statistics([question, question], [question.answer, ""]) == {"right_lines": 0.5}


def test_splits_share_no_question() -> None:
    assert drawn(0, 30) == drawn(0, 30)
    splits = load_task(NAME).splits(heldout=64, validation=32, demonstrations=200, train=1000)
    parts = [{q.prompt for q in part} for part in (splits.heldout, splits.validation, splits.train)]
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
