"""Lookups and a sort, and the puzzle with many answers: questions by hand, their verifiers, their splits."""

from __future__ import annotations

import itertools

import pytest
import torch

import trajkern as tk
from trajkern import credit
from trajkern._bench.experiments.rows.toolpo import Dealt
from trajkern._bench.experiments.tasks.lookups import TERMS, Lookups
from trajkern._bench.experiments.tasks.puzzle import LEAST, MOST, Puzzle, answers
from trajkern.trainer.tasks import ActionTask, Question, Reply, Task, load_task

BY_HAND = Question("kdmqa=", "", "", {"letters": "kdmqa", "answer": "22479"})
PUZZLE = Question("19:128=", "", "", {"missing": 8})


@pytest.mark.parametrize("kind", [Lookups, Puzzle])
def test_splits_do_not_overlap_and_follow_the_seed(kind: type[Task]) -> None:
    assert isinstance(load_task(f"{kind.__module__}:{kind.__name__}", 1), kind)
    sizes = {"heldout": 20, "validation": 10, "demonstrations": 30, "train": 60}
    one, again, other = (vars(kind("name", seed).splits(**sizes)) for seed in (1, 1, 2))
    assert one == again and one["train"] != other["train"]
    shown = [q.prompt for name in sizes for q in one[name]]
    assert len(set(shown)) == len(shown) > 100


def test_lookups_answer_calls_and_mark_those_that_serve() -> None:
    task = Lookups("lookups", 3)
    values = {x: task.reply(BY_HAND, f"<{x}0>") for x in "kdmqa"}
    assert all(reply.text in "0123456789" and len(reply.text) == 1 for reply in values.values())
    for call, reply in (("<k7>", values["k"].text), ("<z3>", "?"), ("<k>", "?"), ("<kd3>", "?"), ("k3>", "?")):
        assert task.reply(BY_HAND, f"<d1>4{call}") == Reply(reply)
    assert task.reply(BY_HAND, "<k3") is None and task.reply(BY_HAND, "<k3>7") is None
    assert Lookups("lookups", 4).reply(BY_HAND, "<k7>") == values["k"], "a value is the question's, whatever the seed"
    others = [BY_HAND._replace(entry={"letters": f"kabc{x}"}) for x in "defghijl"]
    assert len({task.reply(other, "<k1>") for other in others}) > 3, "a letter has other values elsewhere"
    text = "<k3>1<z3>?<k4>1<dd>?<d9>2=22479"
    found = [(text[x.begin : x.end], x.right) for x in task.action_spans(BY_HAND, text)]
    assert found == [("<k3>", True), ("<z3>", False), ("<k4>", False), ("<dd>", False), ("<d9>", True)]
    assert isinstance(task, ActionTask) and task.reward(BY_HAND, text) == 1
    assert task.reward(BY_HAND, text[:-1]) == task.reward(BY_HAND, "22479") - 1 == task.reward(BY_HAND, "") == 0
    whole = "".join(f"<{x}0>?" for x in "kdmqa")
    figures = task.statistics([BY_HAND] * 4, [text, whole + "=22479", whole + "=0", ""])
    assert figures == pytest.approx({"found": 12 / 20, "all_found": 0.5, "right_given_all": 0.5})


@pytest.mark.parametrize("split", range(4))
def test_demonstrations_slip_and_are_right_all_the_same(split: int) -> None:
    task, right = Lookups("lookups", 5), 0
    for question in itertools.islice(task.questions(split), 100):
        written = ""
        for text, learned in task.pieces(question):
            assert learned or task.reply(question, written) == Reply(text)
            written += text
        assert written == question.answer and task.reward(question, written) == 1
        right += sum(action.right for action in task.action_spans(question, written))
    slipping = 1 - right / (100 * TERMS)
    missed = (0.5 - 0.5 / 26) * (1 - 0.5 / 26) ** (TERMS - 1)  # by its own call, and by the others' slips
    assert slipping == pytest.approx(missed, abs=0.07) if split == 2 else slipping == 0


def test_the_puzzle_has_many_answers() -> None:
    task = Puzzle("puzzle", 2)
    assert len(answers(8)) == 45 and {"080", "341", "008"} < set(answers(8))
    assert all(task.reward(PUZZLE, text) == 1 for text in answers(8))
    for text in ("081", "80", "0080", "", "8 0", "-19"):
        assert task.reward(PUZZLE, text) == 0
    assert [len(answers(missing)) for missing in (LEAST, MOST)] == [28, 28]
    for question in itertools.islice(task.questions(3), 100):
        total, given = question.prompt[:-1].split(":")
        assert int(total) == question.entry["missing"] + sum(map(int, given)) and len(given) == 3
        assert task.reward(question, question.answer) == 1


def test_dealt_rewards_stay_in_their_group() -> None:
    groups, values = torch.arange(40) // 8, torch.arange(40.0)
    batch = tk.PackedBatch(torch.arange(80), 2 * torch.arange(41), torch.arange(80) % 2 > 0, groups, values)
    rollouts = credit.Rollouts(batch, rewards={"reward": values, "action": values})
    reward = Dealt("action")
    dealt = reward(rollouts)
    assert torch.equal(dealt, reward(rollouts)) and not torch.equal(dealt, values) and reward.needs == {"action"}
    for group in range(5):
        assert torch.equal(dealt[groups == group].sort().values, values[groups == group])
