"""Reasoning-gym tasks: questions as short prompts and its own verifier."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trajkern.trainer.optional import require
from trajkern.trainer.tasks.base import STREAM, Answer, Question, Task

PASSING_SCORE = 0.99
WHOLE = ("chain_sum", "count_bits", "products")  # datasets whose answers are whole numbers
NEAR = (-2, -1, 1, 2)  # by how much a response to judge is wrong
_CONFIDENCE = re.compile(r"(.*) (\d{1,3})%", re.DOTALL)


@dataclass(frozen=True)
class Spec:
    """How a task is posed.

    Args:
        dataset: its name in reasoning-gym.
        settings: of that dataset; small enough for the built-in transformer.
        short: the question in a few characters, from the entry's metadata; None for the task's own text.
        work: the lines that lead to the answer, from the entry's metadata. Answers then show their work, a step a line,
            and the verifier reads the last line.
        confidence: whether an answer is followed by how likely it is to be right, as in "42 80%".
        demonstrations: answers that take the built-in transformer into the warm-up's validation band.
        weight_decay: of the warm-up.
    """

    dataset: str
    settings: dict[str, Any]
    short: Callable[[dict[str, Any]], str] | None = None
    work: Callable[[dict[str, Any]], list[str]] | None = None
    confidence: bool = False
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
SPECS: dict[str, Spec] = {
    "chain_sum": Spec("chain_sum", _ONE_DIGIT, _expression, demonstrations=1000, weight_decay=0.1),
    "chain_sum_short": Spec("chain_sum", _TWO_DIGITS, _expression),
    "chain_sum_long": Spec("chain_sum", {**_ONE_DIGIT, "min_terms": 4, "max_terms": 4}, _expression),
    "chain_sum_steps": Spec(
        "chain_sum", {**_ONE_DIGIT, "min_terms": 4, "max_terms": 4}, _expression, _partial_sums, demonstrations=1500
    ),
    "chain_sum_confidence": Spec("chain_sum", _ONE_DIGIT, _expression, confidence=True, weight_decay=0.1),
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


class GymTask(Task):
    """A task of ``SPECS``. Its entries are reasoning-gym's, which also verifies the answers.

    It offers ``ballot``, ``reference`` where answers show their work, ``hint`` unless they state a confidence, and then
    ``responses`` where they are whole numbers.
    """

    hint: Callable[[Question, str], str | None]
    reference: Callable[[Question], str]
    responses: Callable[[Question], list[str]]

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__(name, seed)
        self._spec = SPECS[name]
        self.demonstrations, self.weight_decay = self._spec.demonstrations, self._spec.weight_decay
        self.states_confidence = self._spec.confidence
        if self._spec.work:
            self.reference = _shown_work
        if not self.states_confidence:
            self.hint = _missing_line
            if self._spec.dataset in WHOLE:
                self.responses = _near_answers
        self._gym = require("reasoning_gym")
        self._verifier = self._dataset(seed=0, size=1)

    def _dataset(self, *, seed: int, size: int) -> Any:
        return self._gym.create_dataset(self._spec.dataset, seed=seed, size=size, **self._spec.settings)

    def read(self, question: Question, text: str) -> Answer:
        """The verifier reads the last line where work is shown, and what stands before the confidence."""
        answer, confidence = self._parts(text)
        if answer is None:
            return Answer(False, None, False)
        return Answer(self._verifier.score_answer(answer, question.entry) >= PASSING_SCORE, confidence, True)

    def ballot(self, question: Question, text: str) -> str | None:
        return self._parts(text)[0]

    def _parts(self, text: str) -> tuple[str | None, float | None]:
        """What the verifier scores, None in a text that it does not read; and the confidence, where one is stated."""
        confidence = None
        if self._spec.confidence:
            parts = _CONFIDENCE.fullmatch(text)
            if not parts or int(parts[2]) > 100:
                return None, None
            text, confidence = parts[1], int(parts[2]) / 100
        return text.rpartition("\n")[2] if self._spec.work else text, confidence

    def questions(self, split: int) -> Iterator[Question]:
        dataset = self._dataset(seed=(self.seed * 16 + split + 1) * STREAM, size=STREAM)
        short, work = self._spec.short, self._spec.work
        for index in range(STREAM):
            entry = dataset[index]
            text = entry["question"]
            prompt = short(entry["metadata"]) if short else text
            answer = "\n".join([*(work(entry["metadata"]) if work else []), entry["answer"]])
            if self._spec.confidence:  # a demonstration knows nothing of its reader's confidence: any tenth
                answer += f" {10 * (zlib.crc32(prompt.encode()) % 11)}%"
            yield Question(prompt, text, answer, entry)


def _shown_work(question: Question) -> str:
    return question.answer


def _near_answers(question: Question) -> list[str]:
    """The answer, and numbers that are near it."""
    answer = question.entry["answer"]
    return [answer, *(str(int(answer) + difference) for difference in NEAR)]


def _missing_line(question: Question, text: str) -> str | None:
    """The first line of the shown answer that ``text`` does not have at its place."""
    theirs = text.split("\n")
    lines = enumerate(question.answer.split("\n"))
    return next((line for at, line in lines if at >= len(theirs) or theirs[at] != line), None)
