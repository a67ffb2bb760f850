"""Families with a secret: questions, verifier, splits."""

from __future__ import annotations

from itertools import islice

import pytest

pytest.importorskip("tyro", reason="the trainer's extra is not installed")

from trajkern._bench.experiments.tasks.families import FAMILIES, Families
from trajkern.trainer.tasks import FamilyTask, Question, family_of, load_task

NAME = "trajkern._bench.experiments.tasks.families:Families"


def drawn(split: int, count: int, seed: int = 0) -> list[Question]:
    return list(islice(load_task(NAME, seed).questions(split), count))


def test_an_answer_is_the_family_s_secret_and_the_question_s_last_digit() -> None:
    task = load_task(NAME)
    assert isinstance(task, FamilyTask)
    secrets: dict[str, set[str]] = {}
    for question in drawn(3, 4000):
        assert question.prompt[3] == ":" and question.prompt.endswith(f"{question.answer[1]}=")
        assert family_of(task, question) == question.prompt[:3]
        secrets.setdefault(question.prompt[:3], set()).add(question.answer[0])
        assert task.read(question, question.answer).correct
        wrong = str((int(question.answer[0]) + 1) % 10)
        for text in (wrong + question.answer[1], question.answer[0], question.answer + "0", ""):
            assert not task.read(question, text).correct
    assert len(secrets) > 0.97 * FAMILIES and all(len(some) == 1 for some in secrets.values())
    shares = [sum(some == {str(digit)} for some in secrets.values()) / len(secrets) for digit in range(10)]
    assert max(shares) < 0.16, "no digit is the secret of many"


def test_demonstrations_are_of_other_families_and_all_else_of_the_same() -> None:
    shown, trained, tested = ({q.entry["family"] for q in drawn(split, 4000)} for split in (2, 3, 0))
    assert not {family.lower() for family in shown} & (trained | tested)
    assert len(shown) <= FAMILIES and len(trained | tested) <= FAMILIES


def test_secrets_are_the_seed_s_and_splits_share_no_question() -> None:
    assert drawn(0, 50) == drawn(0, 50)
    secrets = [{q.entry["family"]: q.answer[0] for q in drawn(3, 2000, seed)} for seed in (0, 1)]
    assert secrets[0] != secrets[1]
    splits = Families(NAME, 0).splits(heldout=64, validation=32, demonstrations=200, train=2000)
    parts = [{q.prompt for q in part} for part in (splits.heldout, splits.validation, splits.train)]
    assert not parts[0] & parts[1] and not (parts[0] | parts[1]) & parts[2]
