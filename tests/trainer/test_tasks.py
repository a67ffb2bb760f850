"""Every task: short text in the alphabet, answers its own verifier accepts, splits that share nothing."""

from __future__ import annotations

import inspect

import pytest

from trajkern.trainer.models.tokenizer import decode, encode
from trajkern.trainer.tasks import Task, load_task, task_names
from trajkern.trainer.tasks.gym import SPECS, GymTask, Spec


@pytest.fixture(scope="module", params=task_names())
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(request.param, seed=3)


def test_there_are_enough_tasks() -> None:
    assert {"chain_sum", "spell_backward", "count_bits"} <= set(task_names()) and len(SPECS) >= 10
    assert any(spec.short is None for spec in SPECS.values()), "no task poses reasoning-gym's full text"


def test_accepts_its_own_answers_only(task: Task) -> None:
    questions = task.distinct(3, 100)
    for question in questions:
        assert decode(encode(question.prompt)) == question.prompt
        assert task.reward(question, question.answer) == 1.0
        assert task.reward(question, "") == 0.0
    others = [other.answer for other in questions[1:]] + [questions[0].answer]
    wrong = [task.reward(q, answer) for q, answer in zip(questions, others, strict=True)]
    assert sum(wrong) / len(wrong) < 0.5, "a stranger's answer should rarely be right"


def test_is_short_enough_to_learn(task: Task) -> None:
    longest = max(len(q.prompt + q.answer) for q in task.distinct(3, 100))
    long = task.interactive or SPECS[task.name].short is None
    assert longest <= (140 if long else 80)


def test_verifier_never_evaluates_a_sampled_text(task: Task) -> None:
    if not isinstance(task, GymTask):
        return
    source = inspect.getsource(type(task._verifier).score_answer)
    assert "eval(" not in source and "parse_expr" not in source


def test_splits_are_disjoint_and_distinct(task: Task) -> None:
    splits = task.splits(heldout=40, validation=30, demonstrations=50, train=200)
    heldout, validation, demonstrations, train = (
        [q.prompt for q in part] for part in (splits.heldout, splits.validation, splits.demonstrations, splits.train)
    )
    assert (len(heldout), len(validation), len(demonstrations)) == (40, 30, 50) and 100 < len(train) <= 200
    for part in (heldout, validation, demonstrations, train):
        assert len(set(part)) == len(part)
    assert not set(heldout) & set(validation)
    assert not (set(heldout) | set(validation)) & (set(demonstrations) | set(train))


def test_seeds_draw_other_questions_and_repeat_themselves() -> None:
    first, again, other = (load_task("spell_backward", seed).distinct(0, 50) for seed in (0, 0, 1))
    assert first == again
    assert len({q.prompt for q in first} & {q.prompt for q in other}) < 5


def test_too_many_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    one_sum = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    monkeypatch.setitem(SPECS, "sum", Spec("chain_sum", one_sum, lambda m: m["expression"]))
    with pytest.raises(ValueError, match="heldout must be at most 200 for task sum, got 201"):
        GymTask("sum").splits(heldout=201, validation=1, demonstrations=1, train=1)


def test_unknown_task_lists_the_tasks() -> None:
    with pytest.raises(ValueError, match="task must be one of .*chain_sum.*spell_backward.*; got 'chess'"):
        load_task("chess")
    for name in (None, 3, ["chain_sum"]):
        with pytest.raises(TypeError, match="task must be a name, got"):
            load_task(name)
