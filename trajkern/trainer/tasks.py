"""Reasoning-gym tasks by name: questions as short prompts, its own verifier, and four disjoint splits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trajkern.trainer.extras import require
from trajkern.trainer.tokenizer import ALPHABET

PASSING_SCORE = 0.99
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
    """How a task is posed: a reasoning-gym dataset, its settings, and a short form of its question (None: the text)."""

    dataset: str
    settings: dict[str, Any] = field(default_factory=dict)
    short: Callable[[dict[str, Any]], str] | None = None


def _expression(m: dict[str, Any]) -> str:
    return m["expression"].replace(" ", "") + "="


def _matrix(m: dict[str, Any]) -> str:
    rows = "/".join("".join(map(str, row)) for row in m["matrix"])
    return f"{rows}@{m['num_rotations']}="


_ONE_DIGIT = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}

# Only verifiers that compare or parse: some of reasoning-gym's pass the answer to eval(), which a sampled text must
# never reach.
TASKS: dict[str, Spec] = {
    "chain_sum": Spec("chain_sum", _ONE_DIGIT, _expression),
    "chain_sum4": Spec("chain_sum", {**_ONE_DIGIT, "min_terms": 4, "max_terms": 4}, _expression),
    "chain_sum2d": Spec("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, _expression),
    "chain_sum_text": Spec("chain_sum", _ONE_DIGIT),
    "spell_backward": Spec(
        "spell_backward", {"min_word_len": 3, "max_word_len": 7}, lambda m: m["word"].lower() + ">"
    ),
    "count_bits": Spec("count_bits", {"max_n": 2**16 - 1}, lambda m: m["binary"] + "="),
    "letter_counting": Spec(
        "letter_counting", {"min_words": 1, "max_words": 3}, lambda m: f"{m['target_letter']}:{' '.join(m['span'])}="
    ),
    "palindrome_generation": Spec(
        "palindrome_generation", {"min_length": 3, "max_length": 7}, lambda m: "".join(m["letters"]) + ">"
    ),
    "base_conversion": Spec(
        "base_conversion",
        {"min_base": 2, "max_base": 4, "max_value": 255},
        lambda m: f"{m['source_repr']}:{m['source_base']}>{m['target_base']}=",
    ),
    "caesar_cipher": Spec(
        "caesar_cipher", {"min_words": 1, "max_words": 3, "max_rotation": 3}, lambda m: m["cipher_text"] + ">"
    ),
    "word_sequence_reversal": Spec(
        "word_sequence_reversal", {"min_words": 2, "max_words": 3}, lambda m: ", ".join(m["words"]) + ">"
    ),
    "fraction_simplification": Spec(
        "fraction_simplification",
        {"max_value": 20, "max_factor": 6, "styles": ("plain",)},
        lambda m: f"{m['numerator']}/{m['denominator']}=",
    ),
    "gcd": Spec("gcd", {"max_value": 99}, lambda m: ",".join(map(str, m["numbers"])) + "="),
    "products": Spec("products", {"max_digits": 2}, _expression),
    "decimal_chain_sum": Spec(
        "decimal_chain_sum",
        {"max_terms": 2, "max_digits": 1, "max_decimal_places": 1},
        _expression,
    ),
    "binary_alternation": Spec("binary_alternation", {"max_n": 16}, lambda m: m["string"] + "="),
    "rotate_matrix": Spec("rotate_matrix", {"max_n": 3, "max_rotations": 3}, _matrix),
    "prime_factorization": Spec("prime_factorization", {"max_value": 4000}, lambda m: f"{m['number']}="),
    "simple_geometry": Spec("simple_geometry", {"min_sides":3, "max_sides":4}, lambda m: f"{m['n_sides']}:{','.join(str(int(a)) for a in m['known_angles'])}="),
    "basic_arithmetic": Spec("basic_arithmetic", {"min_terms":3, "max_terms":3, "max_digits":1}, _expression),
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
        self._gym = require("reasoning_gym")
        self._verifier = self._dataset(seed=0, size=1)

    def _dataset(self, *, seed: int, size: int) -> Any:
        return self._gym.create_dataset(self._spec.dataset, seed=seed, size=size, **self._spec.settings)

    def reward(self, question: Question, answer: str) -> float:
        """1.0 where reasoning-gym's verifier accepts ``answer``, else 0.0."""
        return float(self._verifier.score_answer(answer, question.entry) >= PASSING_SCORE)

    def questions(self, split: int) -> Iterator[Question]:
        """The endless, repeating stream of one split's draws."""
        dataset = self._dataset(seed=(self.seed * 16 + split + 1) * _STREAM, size=_STREAM)
        short = self._spec.short
        for index in range(_STREAM):
            entry = dataset[index]
            text = entry["question"]
            prompt = short(entry["metadata"]) if short else text
            yield Question(prompt, text, entry["answer"], entry)

    def distinct(self, split: int, count: int, taken: Collection[str] = ()) -> list[Question]:
        """``count`` questions of a split with distinct prompts, none in ``taken``.

        Raises ValueError where the task does not have that many within 50 draws a question.
        """
        found: dict[str, Question] = {}
        stream = self.questions(split)
        for _ in range(50 * count):
            question = next(stream)
            if question.prompt not in taken and set(question.prompt + question.answer) <= set(ALPHABET):
                found.setdefault(question.prompt, question)
            if len(found) == count:
                return list(found.values())
        raise ValueError(f"task {self.name} has fewer than {count} further questions (found {len(found)}); ask for fewer")

    def splits(self, *, heldout: int, validation: int, demonstrations: int, train: int) -> Splits:
        """Draw the four splits: each avoids the prompts of held-out and validation, and repeats none of its own."""
        test = self.distinct(0, heldout)
        check = self.distinct(1, validation, taken := {q.prompt for q in test})
        taken |= {q.prompt for q in check}
        return Splits(test, check, self.distinct(2, demonstrations, taken), self.distinct(3, train, taken))
