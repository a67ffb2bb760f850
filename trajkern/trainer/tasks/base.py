"""What the trainer asks of a task: questions in four disjoint splits, a verifier, and for some an environment."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trajkern.trainer.models.tokenizer import ALPHABET

STREAM = 10_000_000  # question seeds of one split; a task draws item i of seed s from s + i
_CHARACTERS = frozenset(ALPHABET)


class Question(NamedTuple):
    """One question: a short prompt for a character model, the task's own text, its answer, and the verifier's entry."""

    prompt: str
    text: str
    answer: str
    entry: dict[str, Any]


class Answer(NamedTuple):
    """What the verifier makes of a text: is it right, how sure does it say it is (in [0, 1]), is it legible?"""

    correct: bool
    confidence: float | None = None
    well_formed: bool = True


class Reply(NamedTuple):
    """What the environment writes after a turn, and whether the rollout ends there."""

    text: str
    done: bool = False


@dataclass(frozen=True)
class Splits:
    """Questions of which none is both in held-out or validation and in another set."""

    heldout: list[Question]
    validation: list[Question]
    demonstrations: list[Question]
    train: list[Question]


class Task(abc.ABC):
    """A named task at one seed, which decides every split; other seeds draw other questions.

    What else recipes ask of a task is in ``capabilities``.

    Attributes:
        demonstrations: answers that take the built-in transformer into the warm-up's validation band.
        weight_decay: of the warm-up.
        interactive: whether an environment replies within a rollout; see :meth:`reply`.
        states_confidence: whether answers end with a confidence.
        alphabet: what prompts and answers are written in, the built-in model's; draws with other characters are passed
            over. None for any, where a pretrained model plays.
        fingerprint: of the data behind the questions, which must not change while a run is resumed; empty where the
            name and the seed say everything.
    """

    demonstrations: int = 3000
    weight_decay: float = 0.5
    interactive = False
    states_confidence = False
    alphabet: frozenset[str] | None = _CHARACTERS
    fingerprint: str = ""

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name, self.seed = name, seed

    @abc.abstractmethod
    def questions(self, split: int) -> Iterator[Question]:
        """A split's draws, in order and with repetitions."""

    @abc.abstractmethod
    def read(self, question: Question, text: str) -> Answer:
        """What the verifier makes of ``text``, all that stands after the prompt."""

    def reward(self, question: Question, text: str) -> float:
        """1.0 for a right answer, else 0.0."""
        return float(self.read(question, text).correct)

    def reply(self, question: Question, text: str) -> Reply | None:
        """The environment's turn, once the policy has ended its own with the last character of ``text``; else None."""
        return None

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        """The demonstration in parts: a text, and whether the policy is to learn it; the rest is the environment's."""
        return [(question.answer, True)]

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """What else an evaluation reports of these rollouts."""
        return {}

    def identity(self, question: Question) -> str:
        """What tells a question from others: its prompt, unless an environment says later what is asked."""
        return question.prompt

    def distinct(self, split: int, draws: int, taken: Collection[str] = (), most: int | None = None) -> list[Question]:
        """The distinct questions among ``draws`` of a split, at most ``most``, of identities that are not ``taken``."""
        found: dict[str, Question] = {}
        for question in itertools.islice(self.questions(split), draws):
            identity = self.identity(question)
            if identity not in taken and self._spelt(question):
                found.setdefault(identity, question)
            if len(found) == most:
                break
        return list(found.values())

    def _spelt(self, question: Question) -> bool:
        return self.alphabet is None or set(question.prompt + question.answer) <= self.alphabet

    def splits(self, *, heldout: int, validation: int, demonstrations: int | None, train: int) -> Splits:
        """Draw the four splits: each avoids the questions of held-out and validation, and repeats none of its own.

        Args:
            heldout, validation: questions to find.
            demonstrations: questions to find; None for the task's own number.
            train: draws, of which the distinct ones are kept.

        Raises:
            ValueError: the task has too few distinct questions.
        """
        taken: set[str] = set()
        drawn: dict[str, list[Question]] = {}
        wanted = {"heldout": heldout, "validation": validation, "demonstrations": demonstrations or self.demonstrations}
        for split, (name, count) in enumerate(wanted.items()):
            some = drawn[name] = self.distinct(split, 50 * count, taken, count)
            if len(some) < count:
                passed_over = sum(not self._spelt(q) for q in itertools.islice(self.questions(split), 50 * count))
                others = f" ({passed_over} draws have characters outside its alphabet)" if passed_over else ""
                raise ValueError(f"{name} must be at most {len(some)} for task {self.name}, got {count}{others}")
            if name != "demonstrations":
                taken |= {self.identity(question) for question in some}
        return Splits(**drawn, train=self.distinct(3, train, taken))
