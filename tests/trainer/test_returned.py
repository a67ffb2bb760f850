"""Tasks of one's own as the trainer wraps them: still what they were, and held to what they return."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from trajkern import credit
from trajkern.trainer import returned
from trajkern.trainer.config import TrainConfig, WarmUp
from trajkern.trainer.folder import ResultsError
from trajkern.trainer.models.tokenizer import ALPHABET
from trajkern.trainer.tasks import Action, Answer, Belief, HintTask, Question, Reply, Splits, Task, VoteTask
from trajkern.trainer.tasks.checked import CHECKS, checked, spelling_in
from trajkern.trainer.train import train

QUESTION = Question("1+1=", "1+1", "2", {})


class Plain(Task):
    """Has capabilities by its class, by itself and by a property; ``hint`` is none of its own."""

    hint = None

    def __init__(self, name: str = "plain", seed: int = 0) -> None:
        super().__init__(name, seed)
        self.tool: Callable[[str], str] = lambda call: "tool"
        self.family = lambda question: "f"
        self.count = 0

    def questions(self, split: int) -> Iterator[Question]:
        for n in range(100):
            yield Question(f"{split}{n}=", "x", str(n), {})

    def read(self, question: Question, text: str) -> Answer:
        self.count += 1
        return Answer(text == "2")

    def reply(self, question: Question, text: str) -> Reply | None:
        return Reply(self.tool(text))

    def simulated(self, simulate: Callable[[str], str]) -> Task:
        task = copy.copy(self)
        task.tool = simulate
        return task

    @property
    def ballot(self) -> Callable[[Question, str], str]:
        return lambda question, text: text


def test_a_checked_task_is_what_it_was() -> None:
    task = checked(Plain())
    assert type(task).__name__ == "Plain" and isinstance(task, Plain) and checked(task) is task
    assert isinstance(task, VoteTask) and not isinstance(task, HintTask)
    assert task.reward(QUESTION, "2") == 1.0 and task.count == 1
    assert task.family(QUESTION) == "f" and task.ballot(QUESTION, "x") == "x"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_checked_and_its_own(copied: Callable[[Any], Any]) -> None:
    task = checked(Plain())
    vars(task).pop("family")
    task.tool = str.upper
    other = copied(task)
    other.tool = str.lower
    assert (task.reply(QUESTION, "Aa"), other.reply(QUESTION, "Aa")) == (Reply("AA"), Reply("aa"))
    other.tool = lambda text: 3
    with pytest.raises(TypeError, match=r"^Plain\.reply must return a Reply .* got 3 \(int\) as text"):
        other.reply(QUESTION, "Aa")


def test_simulated_tools_answer_of_a_task_that_copies_itself() -> None:
    task = checked(Plain())
    simulated = task.simulated(lambda call: "simulated")
    assert simulated.reply(QUESTION, "x") == Reply("simulated") and task.reply(QUESTION, "x") == Reply("tool")


@dataclass(frozen=True, eq=False)
class Frozen(Plain):
    name: str = "frozen"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "tool", str.upper)


def test_a_frozen_task() -> None:
    assert checked(Frozen()).reply(QUESTION, "x") == Reply("X")


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("interactive", "yes", "interactive must be True or False, got 'yes'"),
        ("states_confidence", None, "states_confidence must be True or False, got None"),
        ("demonstrations", 0, "demonstrations must be at least 1, got 0"),
        ("demonstrations", 1.5, "demonstrations must be a whole number of at least 1, got 1.5"),
        ("weight_decay", float("nan"), "weight_decay must be a number of at least 0, got nan"),
        ("weight_decay", -1, "weight_decay must be a number of at least 0, got -1"),
        ("fingerprint", 3, "fingerprint must be a text, got 3"),
        ("name", None, "name must be a text, got None"),
        ("alphabet", 3, "alphabet must be a set of characters or None, got 3"),
        ("alphabet", [3], "alphabet must be a set of characters or None, got 3"),
        ("hint", "x", "hint must be a method, got 'x'"),
        ("hint", lambda question: "", r"hint must take \(question, text\); too many positional arguments"),
    ],
)
def test_attributes_of_another_kind(attribute: str, value: Any, words: str) -> None:
    task = Plain()
    setattr(task, attribute, value)
    with pytest.raises((TypeError, ValueError), match=rf"^Plain\.{words}"):
        checked(task)


def checked_question(task: Task, number: int) -> Question:
    found = [Question("", "x", "é", {}), Question("é", "x", "é", {})][number]
    return CHECKS["distinct"]("Foreign.questions", [found], task, {})[0]


def test_what_the_model_cannot_spell_is_refused_by_the_methods_name() -> None:
    class Foreign(Plain):
        alphabet = None

        def questions(self, split: int) -> Iterator[Question]:
            yield from (Question("", "x", "é", {}), Question("é", "x", "é", {}))

    task = checked(Foreign())
    task.tool = lambda text: "é"
    assert task.reply(QUESTION, "x") == Reply("é") and next(task.questions(0)).answer == "é"
    spelling_in(task, ALPHABET)
    with pytest.raises(ValueError, match=r"^Foreign\.reply must .* can spell, got 'é' \(str\) as U\+00E9 in text"):
        task.reply(QUESTION, "x")
    for drawn, words in (
        (0, "with a prompt that is not empty, got ''"),
        (1, r"three texts .* that the model can spell"),
    ):
        with pytest.raises(ValueError, match=rf"^Foreign\.questions must return .*Question.*{words}"):
            checked_question(task, drawn)
    task.alphabet = frozenset("x")
    assert checked_question(task, 1).prompt == "é", "it is passed over"


@pytest.mark.parametrize(
    "value", [True, 1, 1.0, np.float32(1), np.int8(1), np.bool_(True), np.array(1), torch.tensor(1), torch.tensor(True)]
)
def test_numbers_and_flags(value: Any) -> None:
    assert returned.as_number("f", value) == 1.0 and type(returned.as_number("f", value)) is float
    assert returned.as_flag("f", value) is True


@pytest.mark.parametrize("value", [0.5, 2, -1, float("nan"), "1", None, [1], np.ones(1), torch.ones(1), np.ma.masked])
def test_what_is_no_flag(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^f must return True or False, got"):
        returned.as_flag("f", value)


def test_lists() -> None:
    for value in ([1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2])):
        assert returned.as_list("f", value, "a list") == [1, 2]
    for value in ("ab", {1, 2}, {1: 2}, Belief("a", "b"), Action(0, 1, True), iter([1]), np.ones((1, 2)), None):
        with pytest.raises(TypeError, match=r"^f must return a list, got"):
            returned.as_list("f", value, "a list")


def test_a_function_changes_neither_lists_nor_what_all_compute_by(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["b", "a"]
    assert returned.ask("f", lambda x: x.sort() or x, texts) == ["a", "b"] and texts == ["b", "a"]
    try:
        with pytest.raises(
            ValueError, match=r"^f must leave torch's default dtype at torch.float32, got torch.float64"
        ):
            returned.ask("f", torch.set_default_dtype, torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


def in_place(rollouts: credit.Rollouts) -> torch.Tensor:
    return rollouts.reward("reward").add_(1)


spec = credit.outcome(in_place)


def test_a_credits_function_that_changes_the_rollouts_is_refused(config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(
        ResultsError, match=rf"^credit {__name__}:spec must leave the tensors of the rollouts as they are"
    ):
        train(config(credit=f"{__name__}:spec", steps=1, warmup=WarmUp(steps=0)))


class Leaking(Plain):
    def splits(self, **sizes: Any) -> Splits:
        found = super().splits(**sizes)
        return found if self.seed else replace(found, train=[*found.train, *found.heldout])


class Fewer(Plain):
    def splits(self, **sizes: Any) -> Splits:
        return super().splits(**sizes | {"heldout": 1})


SIZES = {"heldout": 2, "validation": 2, "demonstrations": 2, "train": 4}


def test_splits_of_ones_own() -> None:
    assert len(checked(Leaking(seed=1)).splits(**SIZES).train) == 4
    with pytest.raises(ValueError, match=r"^Leaking\.splits must keep .* apart .*; heldout and train both have '00='"):
        checked(Leaking()).splits(**SIZES)
    with pytest.raises(ValueError, match=r"^Fewer\.splits must return Splits with 2 questions in heldout, got 1"):
        checked(Fewer()).splits(**SIZES)


def test_a_class_of_which_no_other_can_be_made() -> None:
    class Flavoured(Plain):
        def __init_subclass__(cls, flavour: str) -> None:
            """Every flavour is given."""

    with pytest.raises(TypeError, match=r"^Flavoured must be a class of which another can be made; .*flavour"):
        checked(Flavoured())


def test_methods_of_getattr() -> None:
    class Any_(Plain):
        def __getattr__(self, name: str) -> Any:
            if name == "critique":
                return lambda question, response: 3
            raise AttributeError(name)

    with pytest.raises(TypeError, match=r"^Any_\.critique must return a text, got 3"):
        checked(Any_()).critique(QUESTION, "x")


class Figures(Plain):
    def statistics(self, questions: Any, texts: Any) -> dict[str, float]:
        return {"pass@1": 1.0}


def test_statistics_are_not_called_as_the_evaluations_own(config: Callable[..., TrainConfig]) -> None:
    warmup = WarmUp(steps=0, demonstrations=4)
    settings = {"task": f"{__name__}:Figures", "max_new": 2, "questions": 50, "warmup": warmup}
    with pytest.raises(ResultsError, match="statistics of task .*Figures must not have the names .* got 'pass@1'"):
        train(config(**settings, steps=1))
