"""Letters with codes and signs: an answer by hand, what is said of it, and what demonstrations do not tell."""

from __future__ import annotations

import itertools

import pytest
import torch

from trajkern._bench.experiments.tasks.letters import Letters
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.systems.feedback import Feedback, HintedTeacher
from trajkern.trainer.tasks import Answer, HintTask, Question, load_task

WORD = Question("iuy=", "", "iTuAyBi-u+", {})


@pytest.fixture
def letters() -> Letters:
    return Letters("letters", 0)


def test_an_answer_by_hand(letters: Letters) -> None:
    assert letters.read(WORD, "iTuAyBi-u+") == Answer(True, None, True)
    assert letters.read(WORD, "iTuAyBi-u-") == Answer(False, None, True)
    for malformed in ("iTuAyBi-u", "uAiTyBi-u+", "iTuAyBi-u+x", ""):
        assert letters.read(WORD, malformed) == Answer(False, None, False)
    found = letters.statistics([WORD] * 2, ["iTuAyCi+u+", "iTuA"])
    assert found == {"codes": (2 + 2) / 6, "signs": 1 / 4, "form": 0.5}


def test_a_message_tells_a_wrong_code_and_never_a_sign(letters: Letters) -> None:
    assert letters.hint(WORD, "iTuAyCi-u+") == "yB"
    assert letters.hint(WORD, "iTuCyCi+u-") in ("uA", "yB")
    assert letters.hint(WORD, "iTuAyBi+u-") is None, "only signs are wrong"
    assert letters.hint(WORD, "uAiTyBi-u+") is None and letters.hint(WORD, "iTuA") is None
    some = {letters.hint(WORD._replace(prompt=f"{n}="), "") for n in range(40)}
    assert some == {"iT", "uA", "yB"}


def test_demonstrations_tell_no_code(letters: Letters) -> None:
    known: dict[str, set[str]] = {}
    shown: dict[str, set[str]] = {}
    for split, seen in ((3, known), (2, shown)):
        for question in itertools.islice(letters.questions(split), 200):
            assert letters.read(question, question.answer).correct
            for at in range(0, len(question.answer), 2):
                kind = question.answer[at] + ("sign" if question.answer[at + 1] in "+-" else "code")
                seen.setdefault(kind, set()).add(question.answer[at + 1])
    assert all(len(marks) == 1 for marks in known.values()) and len(known) == 52
    assert all(len(marks) > 1 for marks in shown.values()) and len(shown) == 52


def test_demonstrations_obey_their_hints() -> None:
    task = Letters("letters", 0)
    assert isinstance(task, HintTask)
    torch.manual_seed(0)
    policy = CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))
    system = HintedTeacher("feedback", Feedback(hinted=0.5), task, policy)
    hinted = 0
    for question in itertools.islice(task.questions(2), 40):
        before, *answer = [(policy.text(tokens), learned) for tokens, learned in system.demonstration(question)]
        assert "".join(text for text, _ in answer) == question.answer and not before[1]
        hint, mark, prompt = before[0].rpartition("|")
        assert prompt == question.prompt and (not mark or hint in question.answer[:6])
        hinted += bool(mark)
    assert 10 < hinted < 30


def test_tables_depend_on_the_seed_and_nothing_else() -> None:
    draws = [list(itertools.islice(Letters("letters", seed).questions(3), 30)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    task = load_task("trajkern._bench.experiments.tasks.letters:Letters")
    splits = task.splits(heldout=40, validation=40, demonstrations=100, train=100)
    some = [{q.prompt for q in s} for s in (splits.heldout, splits.validation, [*splits.demonstrations, *splits.train])]
    assert not some[0] & some[1] and not (some[0] | some[1]) & some[2]
