"""What tasks offer recipes: who has which capability, and what a recipe makes of a task that nobody here wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from trajkern.trainer import setup
from trajkern.trainer import train as training
from trajkern.trainer.checkpoint import load
from trajkern.trainer.config import TrainConfig, WarmUp
from trajkern.trainer.evaluate import by_family
from trajkern.trainer.models.huggingface import HuggingFacePolicy
from trajkern.trainer.models.policy import CharacterModel, Policy
from trajkern.trainer.ranks import ALONE
from trajkern.trainer.systems.actions import actions_of, token_ranges, tokens_within
from trajkern.trainer.systems.base import Played
from trajkern.trainer.systems.toolpo import ToolPO
from trajkern.trainer.tasks import (
    Action,
    ActionTask,
    Answer,
    Belief,
    BeliefTask,
    FamilyTask,
    HintTask,
    PenaltyTask,
    Question,
    ReferenceTask,
    Reply,
    ResponseTask,
    SimulatedTask,
    Task,
    load_task,
)

SLOW = pytest.mark.slow  # a file with these columns trains with them in test_jsonl.py
BRIEF = WarmUp(steps=2, batch=4, demonstrations=16)
OFFERED = {
    "chain_sum": {HintTask, ResponseTask},
    "chain_sum_steps": {HintTask, ReferenceTask, ResponseTask},
    "chain_sum_confidence": set(),
    "tools": {ActionTask, SimulatedTask},
    "twenty_questions": {BeliefTask, PenaltyTask},
}


@pytest.mark.parametrize("name", OFFERED)
def test_who_offers_what(name: str) -> None:
    protocols = (HintTask, ReferenceTask, ActionTask, BeliefTask, PenaltyTask, FamilyTask, SimulatedTask, ResponseTask)
    assert {p for p in protocols if isinstance(load_task(name), p)} == OFFERED[name]


class Boxes(Task):
    """``r7?``: a box of red balls holds 7 minus what a question, any of "a" and "b", takes out; of two families."""

    interactive = True

    def questions(self, split: int) -> Iterator[Question]:
        for number in range(1000):
            colour, digit = "rg"[number % 2], str(number // 2 % 10)
            prompt = f"{colour}{digit}{split}{number}?"
            yield Question(prompt, prompt, f"a+={digit}", {"digit": digit, "colour": colour})

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text.endswith(f"={question.entry['digit']}"))

    def reply(self, question: Question, text: str) -> Reply | None:
        return Reply("+") if text[-1:] in ("a", "b") else None

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        return [("a", True), ("+", False), (f"={question.entry['digit']}", True)]

    def belief_target(self, question: Question, text: str) -> Belief | None:
        return None if "=" in text else Belief("=", question.entry["digit"])

    def action_spans(self, question: Question, text: str) -> list[Action]:
        return [Action(at, at + 1, letter == "a") for at, letter in enumerate(text) if letter in "ab"]

    def hint(self, question: Question, text: str) -> str | None:
        return question.entry["digit"]

    def family(self, question: Question) -> str:
        return question.entry["colour"]

    def reference(self, question: Question) -> str:
        return f"a\n{question.entry['digit']}"


@pytest.mark.parametrize(
    "recipe", ["delta_belief", "toolpo", *(pytest.param(x, marks=SLOW) for x in ("feedback", "skillrl", "dro", "srl"))]
)
def test_a_task_from_outside_trains_with_every_recipe_that_it_can_serve(
    config: Callable[..., TrainConfig], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_task", lambda name, seed: Boxes(name, seed))
    settings = {"recipe": recipe, "task": "boxes", "max_new": 8, "steps": 2, "prompts": 4, "warmup": BRIEF}
    state = load(training.train(config(**settings)).checkpoint).place["system"]
    if recipe == "skillrl":
        assert {skill["family"] for skill in state["skills"]} == {"r", "g"}


def test_a_family_s_lessons_follow_its_own_accuracy(config: Callable[..., TrainConfig]) -> None:
    settings = config(recipe="skillrl")
    system = setup.load_system(settings, Boxes("boxes"), CharacterModel(settings.tiny), ALONE)
    red, green = list(Boxes("boxes").distinct(3, 2))
    system.learn([red, green], ["a+=x", "a+=y"], [0.0, 0.0])
    system.validated(0.5, {"r": 0.1, "g": 0.9})
    assert [(skill.kind, skill.family) for skill in system.bank.skills] == [("lesson", "r")]
    assert system.policy.spelling(system.prompt(red)).endswith(red.prompt)
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert by_family(Boxes("boxes"), [red, green, red], rewards) == {"r": 0.25, "g": 1.0}
    assert by_family(load_task("tools"), [red, green, red], rewards) == {}


class WithTool(Boxes):
    """Boxes whose question is put to a tool."""

    tool: Callable[[str], str]

    def reply(self, question: Question, text: str) -> Reply | None:
        return Reply(self.tool(text[-1])) if text[-1:] in ("a", "b") else None

    def simulated(self, simulate: Callable[[str], str]) -> Task:
        task = WithTool(self.name, self.seed)
        task.tool = simulate
        return task


def simulator(call: str) -> str:
    ASKED.append("simulator")
    return "-"


ASKED: list[str] = []


def test_simulated_tools_answer_in_training_and_in_no_evaluation(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_task(name: str, seed: int) -> Task:
        task = WithTool(name, seed)
        task.tool = lambda call: ASKED.append("tool") or "+"
        return task

    monkeypatch.setattr(setup, "load_task", load_task)
    settings = {"task": "boxes", "recipe": "toolpo", "toolpo": ToolPO(simulate=f"{__name__}:simulator")}
    training.train(config(**settings, max_new=8, steps=1, warmup=replace(BRIEF, steps=20, check_every=100)))
    assert [who for who, _ in groupby(ASKED)] == ["tool", "simulator", "tool"]


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        ("tools", "nowhere:tool", 'toolpo.simulate: "package.module:name" is expected, got .nowhere:tool'),
        ("tools", f"{__name__}:ASKED", r"toolpo.simulate must be package.module:function; .* is \["),
        (f"{__name__}:Boxes", f"{__name__}:simulator", "task must be one with `simulated`, for toolpo.simulate; got"),
    ],
)
def test_simulators_that_cannot_be(task: str, name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        training.train(TrainConfig(task=task, recipe="toolpo", toolpo=ToolPO(simulate=name), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


class Counts(Boxes):
    """Rewards are whole numbers."""

    def reward(self, question: Question, text: str) -> int:
        return len(text) % 3


def test_rewards_may_be_counts(config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "load_task", lambda name, seed: Counts(name, seed))
    result = training.train(config(task="boxes", recipe="toolpo", max_new=8, steps=1, warmup=BRIEF))
    assert result.after.pass_at_1 > 0


class Pieces:
    """A policy that spells a token as the piece of that number."""

    text = Policy.text

    def __init__(self, *pieces: str, left_out: str | None = None) -> None:
        self.pieces, self.left_out = pieces, left_out

    def spelling(self, tokens: list[int]) -> str:
        return "".join(self.pieces[t] for t in tokens)

    def answer_in(self, spelling: str) -> slice:
        begin = len(spelling) - len(spelling.lstrip()) if self.left_out is None else len(self.left_out)
        return slice(begin, len(spelling.rstrip()))


def test_an_action_s_tokens_are_those_that_overlap_it() -> None:
    policy = Pieces("  ", " ab", "c<t", ">x</", "t>y", "", "z<t>", "</t>", " ")
    tokens = list(range(9))
    text = policy.text(tokens)
    assert text == "abc<t>x</t>yz<t></t>"
    actions = [Action(0, 1, True), Action(3, 11, True), Action(13, 20, False)]
    assert token_ranges(policy, tokens, actions) == [(1, 2), (2, 5), (6, 8)]
    halves = [Action(0, 5, True), Action(5, 6, False), Action(6, 8, True)]
    assert token_ranges(policy, tokens, halves) == [(1, 3), (3, 4), (4, 4)], "a token is of one action"
    echo = Pieces("<t>", "x", "<t>", "x", left_out="<t>x")
    assert echo.text([0, 1, 2, 3]) == "<t>x"
    assert token_ranges(echo, [0, 1, 2, 3], [Action(0, 3, True)]) == [(2, 3)], "not in what is left out, which is alike"


def test_a_part_s_tokens_are_those_within_it() -> None:
    """Spelt "  A1\\nB2\\nC": the text is all but the blanks, and some tokens write across the ends of a line."""
    policy: Any = Pieces(" ", " A", "1\n", "B", "2", "\nC")
    tokens = [0, 1, 2, 3, 4, 5]
    assert tokens_within(policy, tokens, 0, 3) == (0, 3) and tokens_within(policy, tokens, 0, 0) == (0, 0)
    assert tokens_within(policy, tokens, 3, 6) == (3, 5), "the last newline is of the next line's token"
    assert tokens_within(policy, tokens, 6, 7) == (6, 6) and tokens_within(policy, tokens, 2, 2) == (3, 3)


@pytest.mark.parametrize("actions", [[(0, 2), (1, 3)], [(2, 2)], [(0, 9)], [(-1, 1)]])
def test_actions_that_cannot_be_are_refused(actions: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    task = Boxes("boxes")
    found = [Action(begin, end, True) for begin, end in actions]
    monkeypatch.setattr(task, "action_spans", lambda question, text: found, raising=False)
    sample = Played(task.distinct(0, 1), ["abab"], None)
    with pytest.raises(ValueError, match="the action_spans of task boxes must be ascending, disjoint .* of 4 char"):
        actions_of(task, sample)


def test_a_byte_level_tokenizer_s_actions(make_llama: Callable[..., Path]) -> None:
    policy = HuggingFacePolicy.load(str(make_llama()))
    text = " é<tool>ß</tool>"
    (first, end), tokens = token_ranges(policy, policy.encode(text), [Action(1, len(text) - 1, True)])[0], text.encode()
    assert tokens[first:end].decode() == "<tool>ß</tool>"
