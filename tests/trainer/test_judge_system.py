"""Recipe judge: what is asked, what a verdict earns under each rule, and that it trains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trajkern.recipes.reward_models import elo, knockout, majority, meta_loss, round_robin, vote
from trajkern.trainer import train as training
from trajkern.trainer.config import Then, TrainConfig, WarmUp
from trajkern.trainer.models import policy_judges
from trajkern.trainer.models.meta import MetaModel
from trajkern.trainer.models.pair_judges import about
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.policy_judges import PolicyJudge
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.models.verdicts import pair_question, question, read_scores
from trajkern.trainer.setup import load_credit
from trajkern.trainer.systems.judge import Judge, Judging
from trajkern.trainer.tasks import Answer, JsonlTask, Question, Task, VoteTask, load_task

A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"


class Doubles(Task):
    """``n*2=``, with two wrong responses."""

    def questions(self, split: int) -> Iterator[Question]:
        for number in range(100 * split, 100 * split + 100):
            yield Question(f"{number}*2=", f"Double {number}.", f"{number}+{number}\n{2 * number}", {"n": number})

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text == str(2 * question.entry["n"]))

    def reference(self, question: Question) -> str:
        return question.answer

    def responses(self, question: Question) -> list[str]:
        return [str(2 * question.entry["n"] + x) for x in (1, 0, -1)]


def judging(**settings: Any) -> Judging:
    return Judging(Doubles("doubles", 3), Judge(**settings))


def drawn(task: Judging) -> list[Question]:
    return task.splits(heldout=50, validation=10, demonstrations=10, train=60).train


def test_one_response_is_scored() -> None:
    task = judging(form="pointwise")
    for asked in drawn(task):
        (response,), number = asked.entry["responses"], int(asked.prompt.partition("*")[0])
        right = response == str(2 * number)
        assert asked.prompt == f"{number}*2={response}?" and asked.text == question(f"Double {number}.", response)
        assert asked.answer == f"{number}+{number}\n{2 * number}\nScore: {10 * right}" and asked.entry["label"] == right
        said = {text: task.read(asked, text) for text in (f"So.\nScore: {10 * right}", "Score: 5", "10")}
        assert [x.correct for x in said.values()] == [True, False, False]
        assert [x.well_formed for x in said.values()] == [True, True, False]
        assert task.rewards([asked] * 2, [asked.answer, "Score: 5"]).tolist() == [1, -1]
    labels = [asked.entry["label"] for asked in drawn(task)]
    assert 15 < sum(labels) < 45, "right and wrong are about as frequent"
    assert drawn(judging(form="pointwise")) == drawn(task)
    brief = judging(form="pointwise", brief=True, reasons=False)
    assert {asked.answer for asked in drawn(brief)} == {"0", "10"}
    assert isinstance(brief, VoteTask) and brief.ballot(drawn(brief)[0], "work\n7") == 7


FORMS = {
    "scores": ({}, ("Scores: 10,0", "Scores: 0,10"), ("So\n9, 8", "3,7"), ("5,5", "9", "11,0", A)),
    "brief scores": ({"brief": True}, ("10,0", "0,10"), ("Scores: 9,8", "3,7"), ("5,5", "nine, eight")),
    "rm_r1": ({"rule": "rm_r1"}, (A, B), (f"So {A}.", f"{B}\n"), ("A", f"{A} {B}", A + 80 * ".")),
    "rrm": ({"rule": "rrm"}, (A, B), (f"So {A}.", f"{B}\n"), ("A", f"{A} {B}")),
    "brief rrm": ({"rule": "rrm", "brief": True}, ("A", "B"), ("So\nA", "B\n"), (A, "AB", "")),
}


@pytest.mark.parametrize(("settings", "shown", "others", "silent"), FORMS.values(), ids=FORMS)
def test_a_right_response_is_told_from_a_wrong_one(
    settings: dict[str, Any], shown: tuple[str, str], others: tuple[str, str], silent: tuple[str, ...]
) -> None:
    task = judging(**settings)
    for asked in drawn(task):
        label, responses, number = asked.entry["label"], asked.entry["responses"], int(asked.prompt.partition("*")[0])
        assert [int(x == str(2 * number)) for x in responses] == [1 - label, label]
        assert asked.prompt == f"{number}*2={responses[0]}|{responses[1]}?"
        scored = settings.get("rule") is None
        assert asked.text == pair_question(f"Double {number}.", *responses, scores=scored)
        assert asked.answer == f"{number}+{number}\n{2 * number}\n{shown[label]}"
        for texts in (shown, others):
            assert [task.read(asked, text).correct for text in texts] == [label == 0, label == 1]
            assert [task.ballot(asked, text) for text in texts] == ["A", "B"]
            assert task.rewards([asked] * 2, list(texts)).tolist() == [1 - 2 * label, 2 * label - 1]
        for text in silent:
            assert task.ballot(asked, text) is None and not task.read(asked, text).correct
    assert {asked.entry["label"] for asked in drawn(task)} == {0, 1}


class Checked(Doubles):
    """Doubles whose responses are checked by halving them."""

    def critique(self, question: Question, response: str) -> str:
        return f"{response}/2={int(response) / 2:g}"


def test_demonstrations_check_each_response() -> None:
    for settings in ({"form": "pointwise"}, {"form": "pairwise"}):
        task = Judging(Checked("checked", 3), Judge(**settings, brief=True))
        for asked in drawn(task):
            *work, _ = asked.answer.split("\n")
            assert work == [f"{x}/2={int(x) / 2:g}" for x in asked.entry["responses"]]
            assert task.read(asked, asked.answer).correct


def test_scores_are_read() -> None:
    assert read_scores("So 3.\nScores: 10 , 0", 2) == [10, 0] and read_scores("7", 1) == [7]
    for text in ("7", "Scores: 7, 8, 9", "7 8", "7,11", "7,-1", "", "7.5,2"):
        assert read_scores(text, 2) is None, text


def test_what_cannot_be_judged_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"judge.rule must be deepseek_grm for judge.form pointwise, got rrm"):
        Judge("pointwise", rule="rrm")
    with pytest.raises(ValueError, match=r"judge.brief must be False for judge.rule rm_r1"):
        Judge(rule="rm_r1", brief=True)
    for name, expected in {
        "tools": "one with `responses` to judge",
        "chain_sum": "judge.reasons must be False",
    }.items():
        with pytest.raises(ValueError, match=expected):
            load_credit(TrainConfig(task=name, recipe="judge"), load_task(name))
    with pytest.raises(ValueError, match=r"then.recipe must ask what the recipe grpo asks; got 'judge'"):
        training.train(TrainConfig(then=Then("judge", 1), judge=Judge(reasons=False)))
    alike = Doubles("doubles")
    alike.responses = lambda question: ["1", "3"]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"responses of task doubles must hold a right and a wrong one; for '0\*2='"):
        next(Judging(alike, Judge()).questions(0))
    file, rows = tmp_path / "rows.jsonl", {"prompt": "p", "answer": "7", "responses": ["7", "8"]}
    file.write_text(json.dumps(rows))
    asked = next(Judging(JsonlTask(str(file)), Judge(reasons=False)).posed(q) for q in _all(JsonlTask(str(file))))
    assert sorted(asked.entry["responses"]) == ["7", "8"]
    for responses, expected in (
        (["8"], "finds one right and one wrong; got .'8'"),
        ("78", "a list of strings that are"),
    ):
        file.write_text(json.dumps({**rows, "responses": responses}))
        with pytest.raises(ValueError, match=rf"rows.jsonl:1: expected responses .*{expected}"):
            JsonlTask(str(file))


def _all(task: Task) -> list[Question]:
    return [question for split in range(3) for question in task.questions(split)]


class Speaks:
    """In place of sampling: what ``says`` makes of the responses in each prompt, K times."""

    def __init__(self, policy: CharacterModel, says: Callable[[list[int]], str]) -> None:
        self.policy, self.says = policy, says

    def __call__(self, policy: Any, prompts: list[list[int]], *, copies: int, **options: Any) -> Any:
        shown = [self.policy.spelling(prompt).partition("=")[2][:-1].split("|") for prompt in prompts]
        said = [self.policy.answer(self.says([int(x) for x in some])) for some in shown]
        return SimpleNamespace(completions=lambda: [tokens for tokens in said for _ in range(copies)])


def test_a_trained_judge_is_asked_for_elo_the_knockout_and_a_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))
    asked = next(Doubles("doubles", 3).questions(0))
    heights = Speaks(policy, lambda some: ",".join(str(min(x, 10)) for x in some))  # a score is what is judged
    monkeypatch.setattr(policy_judges, "sample", heights)
    pairs = PolicyJudge(policy, judging(brief=True), max_new=9, samples=2)
    prefer, responses = pairs.about(asked), ["3", "9", "10", "12", "2"]
    assert prefer(["3", "9", "12"], ["9", "3", "10"]).tolist() == [[0, 1, 0.5]] * 2
    wins = round_robin(prefer, responses)
    assert wins[2, 3] == wins[3, 2] == 2 and wins[1, 0] == 4 and wins.sum() == 4 * 10
    assert set(elo(wins).argsort(descending=True)[:2].tolist()) == {2, 3}
    assert knockout(majority(prefer), responses[:3], seed=1) == "10"
    heights.says = lambda some: "no idea"
    assert prefer(["3"], ["9"]).isnan().all()
    heights.says = lambda some: str(some[0])
    single = PolicyJudge(policy, judging(form="pointwise", brief=True), max_new=9, samples=3)
    scores = single.scores(asked, ["3", "11", "7"])
    torch.testing.assert_close(scores, torch.tensor([[3.0, torch.nan, 7]] * 3), equal_nan=True)
    assert vote(scores[:, [0, 2]]).tolist() == [9, 21]
    with pytest.raises(ValueError, match="judge.form of the task must be pairwise, got pointwise"):
        single.about(asked)
    with pytest.raises(ValueError, match="judge.form of the task must be pointwise, got pairwise"):
        pairs.scores(asked, ["3"])
    monkeypatch.undo()
    one, two = (PolicyJudge(policy, judging(brief=True), max_new=4, samples=2, seed=5)._judged([asked]) for _ in "ab")
    assert one == two and len(one[0]) == 2


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("policy", None),
        ("task", load_task("chain_sum")),
        ("max_new", 1.5),
        ("max_new", 0),
        ("samples", "2"),
        ("temperature", 0),
        ("temperature", float("nan")),
        ("seed", None),
    ],
)
def test_arguments_that_no_policy_judge_takes(argument: str, value: object) -> None:
    policy = CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))
    legal = {"policy": policy, "task": judging(brief=True), "max_new": 2}
    with pytest.raises((TypeError, ValueError), match=rf"^{argument} must be"):
        PolicyJudge(**legal | {argument: value})
    judge = PolicyJudge(**legal)
    question = next(judge.task.questions(0))
    for call, name in (
        (lambda: judge.about(None), "asked"),
        (lambda: judge.about(question)("ab", ["a", "b"]), "firsts"),
        (lambda: judge.about(question)(["a"], [None]), "seconds"),
        (lambda: judge.about(question)(["a"], []), "seconds"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must"):
            call()


def test_a_judge_of_ones_own_that_returns_no_judgements() -> None:
    with pytest.raises(TypeError, match=r"^judge must return Judgements, got None"):
        about(lambda prompts, firsts, seconds: None, "x")(["a"], ["b"])


def test_a_meta_model_learns_which_judgements_are_right() -> None:
    torch.manual_seed(0)
    policy = CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))
    before = [parameter.clone() for parameter in policy.parameters()]
    asked = drawn(judging(form="pointwise", brief=True, reasons=False))
    right = torch.arange(len(asked)) % 3 > 0
    texts = [f"so {'=' if flag else '<'}\n10" for flag in right.tolist()]
    model = MetaModel(policy)
    assert not model.rate(asked, texts).any(), "it begins without an opinion"
    first = meta_loss(model(asked, texts), right).item()
    assert model.fit(asked, texts, right, steps=20, batch=32, lr=1e-2) < first / 2
    rated = model.rate(asked, texts, batch=7)
    assert rated[right].min() > rated[~right].max() and rated.shape == (len(asked),)
    alone = model.body.hidden(
        torch.tensor([*policy.prompt(asked[5]), *policy.answer(texts[5])]),
        torch.tensor([0, len(asked[5].prompt) + len(texts[5]) + 1]),
        torch.tensor([len(asked[5].prompt) + len(texts[5])]),
    )
    torch.testing.assert_close(rated[5], model.head(alone)[0, 0], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(x, y) for x, y in zip(before, policy.parameters(), strict=True)), "the policy stays"
    with pytest.raises(ValueError, match="right must hold True and False; 60 of 60 are True"):
        model.fit(asked, texts, right | True, steps=1)


def test_a_judge_trains(config: Callable[..., TrainConfig]) -> None:
    settings = Judge(form="pointwise", brief=True, reasons=False, meta_steps=1)
    warmup = WarmUp(steps=2, batch=4, demonstrations=16)
    then = Then("judge", steps=1)
    run = training.train(config(recipe="judge", judge=settings, steps=2, warmup=warmup, then=then))
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert {"vote@2", "vote@4", "meta_vote@4", "pass@1"} <= records[-1].keys() and run.steps == 3
    assert all(record["reward"] <= 1 for record in records if record["phase"] == "main")
