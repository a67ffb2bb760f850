"""Reasoning-gym tasks by name: questions as short prompts, its own verifier, and four disjoint splits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from trajkern.trainer.extras import require
from trajkern.trainer.tokenizer import ALPHABET

PASSING_SCORE = 0.99
_CHARACTERS = frozenset(ALPHABET)
_STREAM = 10_000_000  # question seeds of one split; reasoning-gym draws item i of seed s from s + i


class Question(NamedTuple):
    """One question: a short prompt for a character model, the task's own text, its answer, and the verifier's entry."""

    prompt: str
    text: str
    answer: str
    entry: dict[str, Any]


@dataclass(frozen=True)
class Splits:
    """Questions with no prompt in common between held-out, validation and the two training sets."""

    heldout: list[Question]
    validation: list[Question]
    demonstrations: list[Question]
    train: list[Question]


@dataclass(frozen=True)
class Spec:
    """How a task is posed.

    Args:
        dataset: its name in reasoning-gym.
        settings: of that dataset; small enough for the built-in transformer.
        short: the question in a few characters, from the entry's metadata; None for the task's own text.
        work: the lines that lead to the answer, from the entry's metadata. Answers then show their work, a step a line,
            and the verifier reads the last line.
        demonstrations: answers that take the built-in transformer into the warm-up's validation band.
        weight_decay: of the warm-up.
    """

    dataset: str
    settings: dict[str, Any]
    short: Callable[[dict[str, Any]], str] | None = None
    work: Callable[[dict[str, Any]], list[str]] | None = None
    demonstrations: int = 3000
    weight_decay: float = 0.5


def _expression(m: dict[str, Any]) -> str:
    return m["expression"].replace(" ", "") + "="


def _matrix(m: dict[str, Any]) -> str:
    rows = "/".join("".join(map(str, row)) for row in m["matrix"])
    return f"{rows}@{m['num_rotations']}="


def _angles(m: dict[str, Any]) -> str:
    return f"{m['n_sides']}:{','.join(str(int(a)) for a in m['known_angles'])}="


def _partial_sums(m: dict[str, Any]) -> list[str]:
    """Of "4 - 1 - 7 + 7": 3 and -4; the answer is the last one."""
    terms = m["expression"].replace("- ", "-").replace("+ ", "").split()
    return [str(total) for total in itertools.accumulate(map(int, terms))][1:-1]


def _partial_counts(m: dict[str, Any]) -> list[str]:
    """The ones up to the end of every fourth digit but the last."""
    bits = m["binary"]
    return [str(bits[:end].count("1")) for end in range(4, len(bits), 4)]


_ONE_DIGIT = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
_TWO_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}

# Only verifiers that compare or parse: some of reasoning-gym's pass the answer to eval(), which a sampled text must
# never reach.
TASKS: dict[str, Spec] = {
    "chain_sum": Spec("chain_sum", _ONE_DIGIT, _expression, demonstrations=1000, weight_decay=0.1),
    "chain_sum_short": Spec("chain_sum", _TWO_DIGITS, _expression),
    "chain_sum_long": Spec("chain_sum", {**_ONE_DIGIT, "min_terms": 4, "max_terms": 4}, _expression),
    "chain_sum_steps": Spec(
        "chain_sum", {**_ONE_DIGIT, "min_terms": 4, "max_terms": 4}, _expression, _partial_sums, demonstrations=1500
    ),
    "chain_sum_text": Spec("chain_sum", _ONE_DIGIT),
    "spell_backward": Spec(
        "spell_backward", {"min_word_len": 3, "max_word_len": 7}, lambda m: m["word"].lower() + ">", demonstrations=1500
    ),
    "spell_backward_text": Spec("spell_backward", {"min_word_len": 3, "max_word_len": 5}),
    "count_bits": Spec("count_bits", {"max_n": 2**16 - 1}, lambda m: m["binary"] + "="),
    "count_bits_steps": Spec("count_bits", {"max_n": 2**16 - 1}, lambda m: m["binary"] + "=", _partial_counts),
    "palindrome_generation": Spec(
        "palindrome_generation", {"min_length": 3, "max_length": 7}, lambda m: "".join(m["letters"]) + ">"
    ),
    "base_conversion": Spec(
        "base_conversion",
        {"min_base": 2, "max_base": 4, "max_value": 1023},
        lambda m: f"{m['source_repr']}:{m['source_base']}>{m['target_base']}=",
    ),
    "word_sequence_reversal": Spec(
        "word_sequence_reversal", {"min_words": 2, "max_words": 3}, lambda m: ", ".join(m["words"]) + ">"
    ),
    "fraction_simplification": Spec(
        "fraction_simplification",
        {"max_value": 60, "max_factor": 9, "styles": ("plain",)},
        lambda m: f"{m['numerator']}/{m['denominator']}=",
    ),
    "products": Spec("products", {"max_digits": 2}, _expression),
    "decimal_chain_sum": Spec(
        "decimal_chain_sum", {"max_terms": 2, "max_digits": 1, "max_decimal_places": 1}, _expression
    ),
    "binary_alternation": Spec("binary_alternation", {"max_n": 16}, lambda m: m["string"] + "="),
    "rotate_matrix": Spec("rotate_matrix", {"max_n": 3, "max_rotations": 3}, _matrix),
    "prime_factorization": Spec("prime_factorization", {"max_value": 4000}, lambda m: f"{m['number']}="),
    "simple_geometry": Spec("simple_geometry", {"min_sides": 3, "max_sides": 4}, _angles),
    "basic_arithmetic": Spec("basic_arithmetic", {"min_terms": 3, "max_terms": 3, "max_digits": 1}, _expression),
}


class Task:
    """A named task at one seed.

    Args:
        name: one of ``TASKS``.
        seed: decides every split; other seeds draw other questions.

    Raises:
        ValueError: an unknown name; the message lists the names.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        if name not in TASKS:
            raise ValueError(f"task must be one of {', '.join(sorted(TASKS))}; got {name!r}")
        self.name, self.seed, self._spec = name, seed, TASKS[name]
        self.demonstrations, self.weight_decay = self._spec.demonstrations, self._spec.weight_decay
        self._gym = require("reasoning_gym")
        self._verifier = self._dataset(seed=0, size=1)

    def _dataset(self, *, seed: int, size: int) -> Any:
        return self._gym.create_dataset(self._spec.dataset, seed=seed, size=size, **self._spec.settings)

    def reward(self, question: Question, answer: str) -> float:
        """1.0 where reasoning-gym's verifier accepts ``answer``, or its last line where it shows work; else 0.0."""
        if self._spec.work:
            answer = answer.rpartition("\n")[2]
        return float(self._verifier.score_answer(answer, question.entry) >= PASSING_SCORE)

    def questions(self, split: int) -> Iterator[Question]:
        """A split's draws, in order and with repetitions."""
        dataset = self._dataset(seed=(self.seed * 16 + split + 1) * _STREAM, size=_STREAM)
        short, work = self._spec.short, self._spec.work
        for index in range(_STREAM):
            entry = dataset[index]
            text = entry["question"]
            prompt = short(entry["metadata"]) if short else text
            lines = work(entry["metadata"]) if work else []
            yield Question(prompt, text, "\n".join([*lines, entry["answer"]]), entry)

    def distinct(self, split: int, draws: int, taken: Collection[str] = (), most: int | None = None) -> list[Question]:
        """The distinct questions among ``draws`` of a split, at most ``most``, whose prompts are not in ``taken``."""
        found: dict[str, Question] = {}
        for question in itertools.islice(self.questions(split), draws):
            if question.prompt not in taken and set(question.prompt + question.answer) <= _CHARACTERS:
                found.setdefault(question.prompt, question)
            if len(found) == most:
                break
        return list(found.values())

    def splits(self, *, heldout: int, validation: int, demonstrations: int | None, train: int) -> Splits:
        """Draw the four splits: each avoids the prompts of held-out and validation, and repeats none of its own.

        Args:
            heldout, validation: questions to find.
            demonstrations: questions to find; None for the task's own number.
            train: draws, of which the distinct ones are kept.

        Raises:
            ValueError: the task has too few distinct questions.
        """
        taken: set[str] = set()
        found: dict[str, list[Question]] = {}
        wanted = {"heldout": heldout, "validation": validation, "demonstrations": demonstrations or self.demonstrations}
        for split, (name, count) in enumerate(wanted.items()):
            some = found[name] = self.distinct(split, 50 * count, taken, count)
            if len(some) < count:
                raise ValueError(f"{name} must be at most {len(some)} for task {self.name}, got {count}")
            if name != "demonstrations":
                taken |= {question.prompt for question in some}
        return Splits(**found, train=self.distinct(3, train, taken))
