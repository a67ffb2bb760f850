"""vote@k: what is counted, by hand, and what each task's texts answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from trajkern.trainer.tasks import Answer, JsonlTask, Question, Task, VoteTask, load_task
from trajkern.trainer.votes import votes

ONE, TWO = Question("p", "p", "a", {}), Question("q", "q", "b", {})


class Silent(Task):
    """The answer is a letter; a digit after it is the confidence in tenths."""

    states_confidence = True

    def questions(self, split: int) -> Iterator[Question]:
        yield from (ONE, TWO)

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text[:1] == question.answer, int(text[1:]) / 10 if text[1:] else None)


class Letters(Silent):
    def ballot(self, question: Question, text: str) -> str | None:
        return text[:1] or None


def counted(task: Task, questions: list[Question], texts: list[list[str]]) -> dict[str, float]:
    many = [question for question, some in zip(questions, texts, strict=True) for _ in some]
    flat = [text for some in texts for text in some]
    rewards = torch.tensor([task.reward(q, text) for q, text in zip(many, flat, strict=True)])
    return votes(task, many, flat, rewards.view(len(questions), -1))


def test_votes_are_counted_over_runs_of_samples() -> None:
    texts = ["a1", "b2", "a1", "b9", "", "c"]
    # runs of 2 from each place: a b, b a, a b, b -, - c, c a: the first of a tie wins
    # runs of 4: aba b tie -> a; bab- -> b; ab-c tie -> a; b-ca tie -> b; -cab tie -> c; caba -> a
    found = counted(Letters("letters"), [ONE], [texts])
    assert found["vote@2"] == pytest.approx(2 / 6) and found["vote@4"] == pytest.approx(3 / 6)
    # of all six two say a and two b: what stands first, from each place: a, b, a, b, a, a
    assert found["vote@6"] == pytest.approx(4 / 6)
    # weighted runs of 2: b, b, b, b, c (which weighs nothing, but nobody else does), a
    assert found["weighted_vote@2"] == pytest.approx(1 / 6)
    assert found["weighted_vote@6"] == 0, "1.1 for b, 0.2 for a"
    two = counted(Letters("letters"), [ONE, TWO], [texts, ["b", "b", "b", "", "", ""]])
    assert two["vote@2"] == pytest.approx((2 / 6 + 4 / 6) / 2) and two["vote@6"] == pytest.approx((4 / 6 + 1) / 2)
    assert set(counted(Letters("letters"), [ONE], [["a"]])) == set(), "a single sample does not vote"


def test_the_better_rated_half_votes() -> None:
    texts, rated = ["a", "b", "b", "c"], [0.9, 0.2, 0.1, 0.9]
    found = votes(Letters("letters"), [ONE] * 4, texts, torch.tensor([[1.0, 0, 0, 0]]), torch.tensor(rated))
    # of 2 the better: a b -> a, b b -> b, b c -> c, c a -> c, which is rated alike and stands first
    assert found["meta_vote@2"] == 1 / 4
    # of 4 the two best are a and c, the first of which wins: from each place a, c, c, c
    assert found["meta_vote@4"] == 1 / 4 and found["vote@4"] == 0, "b has the majority"


def test_what_is_no_vote() -> None:
    assert counted(Silent("silent"), [ONE], [["a", "b"]]) == {}
    unsteady = Letters("letters")
    with pytest.raises(ValueError, match=r"a ballot of task letters must be worth one reward; 'a' has 1.0 and 0.0"):
        votes(unsteady, [ONE, ONE], ["a", "a"], torch.tensor([[1.0, 0.0]]))


def test_what_texts_answer(tmp_path: Path) -> None:
    plain, steps, sure = (load_task(name) for name in ("chain_sum", "chain_sum_steps", "chain_sum_confidence"))
    assert isinstance(plain, VoteTask) and isinstance(steps, VoteTask) and isinstance(sure, VoteTask)
    assert plain.ballot(ONE, "12") == "12" and steps.ballot(ONE, "3\n9\n12") == "12"
    assert sure.ballot(ONE, "-4 80%") == "-4" and sure.ballot(ONE, "-4 180%") is None
    assert not isinstance(load_task("twenty_questions"), VoteTask)
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": name, "answer": "7", "verifier": name} for name in ("exact", "number", "last_line", "regex")]
    file.write_text("\n".join(map(json.dumps, rows)))
    task = JsonlTask(str(file))
    assert isinstance(task, VoteTask)
    asked = {row["prompt"]: Question(row["prompt"], "", "", row) for row in rows}
    found = {name: task.ballot(question, "So\n it is 7.0 ") for name, question in asked.items()}
    said = "So\n it is 7.0"
    assert found == {"exact": said, "number": Decimal(7), "last_line": "it is 7.0", "regex": said}
    assert task.ballot(asked["number"], "none") is None
    file.write_text(json.dumps({"prompt": "p", "answer": "7", "verifier": "builtins:print"}))
    assert not isinstance(JsonlTask(str(file)), VoteTask), "nobody knows what a function reads"
