"""A task and functions for flags, which give back what they are told to at one call, and else what is right."""

from __future__ import annotations

import inspect
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from trajkern import credit
from trajkern.trainer.tasks import Action, Answer, Belief, Question, Reply, Splits, Task

CALLS: Counter[str] = Counter()
TOLD: dict[str, tuple[int, Callable[..., Any]]] = {}  # of a method or function, at which call, what


FICKLE: list[random.Random] = []  # which answers, where they are to differ between calls
# what else might be right
OTHERS: dict[str, list[Any]] = {
    "read": [Answer(True), Answer(False), Answer(True, 0.5, False)],  # of a judge's responses one is to stay wrong
    "reward": [0.0, 1.0, 0.25],
    "reply": [None, Reply("+"), Reply(""), Reply("-", True)],
    "pieces": [[("a", True)], [("a", False), ("bc", True)]],
    "statistics": [{}, {"a": 1.0}, {"a": float("nan"), "b": 2.0}],
    "belief_target": [Belief("?", "1"), Belief("?", "1"), None],
    "penalties": [[], [-1.0], [-0.5] * 5],
    "action_spans": [[], [Action(0, 1, True)], [Action(0, 1, False, True)]],
    "hint": [None, "a", "bcd"],
    "family": ["r", "g", "b"],
    "reference": ["a\nb", "c", "d\n\ne\nffff"],
    "reasoning": [(0, 0), (0, 1), (1, 1)],
    "critique": ["", "a", "b\nc"],
    "ballot": [None, 1, "x", (1, 2)],
    "verifier": [True, False],
    "simulate": ["", "-", "a long answer"],
    "embed": [torch.ones(2, 2), torch.ones(3, 2), torch.ones(3, 4)],
    "teacher": [[], ["a"], ["b", "c"]],
    "distiller": [[], ["a"], ["b", "c"]],
    "rubric": [[True] * 4, [False] * 4, [True, False, True, False]],
}


def tell(name: str = "", at: int = 0, give: Callable[..., Any] = lambda: None) -> None:
    """Forget what was counted and told, and from now on give this at that call of ``name``."""
    CALLS.clear()
    TOLD.clear()
    if name:
        TOLD[name] = at, give


def given(name: str, right: Any) -> Any:
    CALLS[name] += 1
    at, give = TOLD.get(name, (0, None))
    if FICKLE and name in OTHERS and not (name == "read" and "responses" in CALLS):
        return FICKLE[0].choice([right, *OTHERS[name]])
    if give is None or CALLS[name] != at:
        return right
    return give(right) if inspect.signature(give).parameters else give()


def luck(text: str) -> int:
    return zlib.crc32(text.encode())


def is_right(text: str) -> bool:
    return luck(text) % 3 == 0


class Hostile(Task):
    """Texts are right by chance; there is something of whatever a recipe may ask for."""

    interactive = True
    demonstrations = 8

    def questions(self, split: int) -> Iterator[Question]:
        return given("questions", self._drawn(split))

    def _drawn(self, split: int) -> Iterator[Question]:
        for n in range(1000):
            yield given("a question", Question(f"{'rg'[n % 2]}{split}{n}=", f"What is {n}?", str(n % 10), {"n": n}))

    def read(self, question: Question, text: str) -> Answer:
        return given("read", Answer(is_right(text)))

    def reward(self, question: Question, text: str) -> float:
        return given("reward", super().reward(question, text))

    def reply(self, question: Question, text: str) -> Reply | None:
        return given("reply", Reply("+") if text[-1:] in "abcdefgh" else None)

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        return given("pieces", [("a", True), ("+", False), (question.answer, True)])

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        return given("statistics", {"letters": sum(map(len, texts)) / max(len(texts), 1)})

    def identity(self, question: Question) -> str:
        return given("identity", question.prompt)

    def distinct(self, split: int, draws: int, taken: Any = (), most: int | None = None) -> list[Question]:
        return given("distinct", super().distinct(split, draws, taken, most))

    def splits(self, **sizes: Any) -> Splits:
        return given("splits", super().splits(**sizes))

    def belief_target(self, question: Question, text: str) -> Belief | None:
        return given("belief_target", Belief("?", question.answer))

    def penalties(self, question: Question, text: str) -> list[float]:
        return given("penalties", [-1.0] * min(len(text), 1))

    def action_spans(self, question: Question, text: str) -> list[Action]:
        return given("action_spans", [Action(0, 1, luck(text) % 3 == 0)] if text else [])

    def simulated(self, simulate: Callable[[str], str]) -> Task:
        task = type(self)(self.name, self.seed)
        vars(task)["reply"] = lambda question, text: Reply(simulate(text)) if text[-1:] in "abcdefgh" else None
        return given("simulated", task)

    def hint(self, question: Question, text: str) -> str | None:
        return given("hint", question.answer)

    def family(self, question: Question) -> str:
        return given("family", question.prompt[0])

    def reference(self, question: Question) -> str:
        return given("reference", f"a\n{question.answer}")

    def reasoning(self, question: Question, text: str) -> tuple[int, int]:
        return given("reasoning", (0, len(text) // 2))

    def responses(self, question: Question) -> Sequence[str]:
        texts = [str(n) for n in range(20)]
        right = [x for x in texts if is_right(x)]
        return given("responses", [right[0], next(x for x in texts if x not in right)])

    def critique(self, question: Question, response: str) -> str:
        return given("critique", "so")

    def ballot(self, question: Question, text: str) -> Any:
        return given("ballot", text)


class Quiet(Hostile):
    """With no environment, for trees."""

    interactive = False


class Sure(Hostile):
    """Answers state a confidence."""

    states_confidence = True

    def read(self, question: Question, text: str) -> Answer:
        return given("read", Answer(is_right(text), luck(text) % 11 / 10))


def verifier(row: dict[str, Any], text: str) -> bool:
    return given("verifier", is_right(text))


def rubric(questions: Sequence[Question], texts: Sequence[str]) -> list[bool]:
    return given("rubric", [luck(text) % 3 > 0 for text in texts])


def simulate(call: str) -> str:
    return given("simulate", "-")


def embed(texts: Sequence[str]) -> torch.Tensor:
    return given("embed", torch.tensor([[float(luck(x) % 7), 1.0] for x in texts]))


def teacher(family: str | None, failures: Sequence[Any]) -> list[str]:
    return given("teacher", ["Think."])


def distiller(family: str | None, success: Any) -> list[str]:
    return given("distiller", [f"Say {success.response[:1]!r}."])


def of_rollouts(rollouts: credit.Rollouts) -> torch.Tensor:
    return given("of_rollouts", rollouts.reward("reward") + 1)


spec = credit.outcome(of_rollouts)
