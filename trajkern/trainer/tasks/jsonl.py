"""A task in a file: a JSON object a line."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Collection, Hashable, Iterator
from pathlib import Path
from typing import Any

from trajkern.trainer.tasks.base import Answer, Question, Splits, Task
from trajkern.trainer.tasks.capabilities import Action
from trajkern.trainer.tasks.tools import calls_in
from trajkern.trainer.tasks.verifiers import BALLOTS, Row, Verifier, load_verifier, problem

TEXTS = ("prompt", "answer", "verifier", "reference", "hint", "family")
LISTS = ("actions", "responses")
COLUMNS = (*TEXTS, *LISTS, "data")
HELDOUT, VALIDATION = 10, 20  # per cent, up to which a prompt's number is held out, or for validation


class JsonlTask(Task):
    """Questions from a file: its lines' columns are described in ``docs/your-data.md``.

    A prompt's hash decides for good whether it is held out (10 %), for validation (10 %) or for training (80 %); the
    seed decides the order in which training questions are taken. A capability is offered where a line has its column:
    ``hint``, ``family``, ``reference``, ``responses``, ``action_spans`` for the column ``actions``; and
    ``ballot`` where all verifiers are built-in ones.

    Raises:
        ValueError: a file that cannot be read or is empty; a line that is no such object, naming file, line, what was
            expected and what came.
    """

    alphabet = None  # characters that a model cannot spell are an error, see check_characters

    hint: Callable[[Question, str], str | None]
    family: Callable[[Question], str]
    reference: Callable[[Question], str]
    action_spans: Callable[[Question, str], list[Action]]
    ballot: Callable[[Question, str], Hashable | None]
    responses: Callable[[Question], list[str]]

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__(name, seed)
        content = _content(Path(name))
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self.rows = read_rows(Path(name), content)
        self._verifiers: dict[str, Verifier] = {}
        for row in self.rows:
            self._check(row)
        self._shares = self._by_hash()
        self.demonstrations = sum(bool(question.answer) for question in self._shares[2])
        if self._everywhere("reference"):
            self.reference = lambda question: question.entry["reference"]
        if self._everywhere("family"):
            self.family = lambda question: question.entry["family"]
        if any("hint" in row for row in self.rows):
            self.hint = lambda question, text: question.entry.get("hint")
        if any("actions" in row for row in self.rows):
            self.action_spans = lambda question, text: calls_in(text, question.entry.get("actions", ()))
        if self._everywhere("responses"):
            self.responses = lambda question: question.entry["responses"]
        if self._verifiers.keys() <= BALLOTS.keys():
            self.ballot = lambda question, text: BALLOTS[question.entry["verifier"]](text)

    def read(self, question: Question, text: str) -> Answer:
        return self._verifiers[question.entry["verifier"]](question.entry, text)

    def questions(self, split: int) -> Iterator[Question]:
        """The held-out questions, those for validation, and twice those for training, each once."""
        return iter(self._shares[min(split, 2)])

    def splits(self, *, heldout: int, validation: int, demonstrations: int | None, train: int) -> Splits:
        """The first of each share; demonstrations are training questions with an answer or a reference to show.

        Raises:
            ValueError: the file has too few prompts for a split; the error has the numbers of all of them.
        """
        held, validating, training = self._shares
        shown = [question for question in training if question.answer]
        wanted = (
            ("eval.heldout", heldout, len(held)),
            ("eval.validation", validation, len(validating)),
            ("warmup.demonstrations", demonstrations or 0, len(shown)),
            ("the training questions", 1, len(training)),
        )
        short = [f"{name} must be at most {most}, got {count}" for name, count, most in wanted if count > most]
        if short:
            sizes = f"{len(held)} held out, {len(validating)} for validation, {len(training)} for training"
            raise ValueError(f"{'; '.join(short)}: the prompts of {self.name} are {len(self.rows)}: {sizes}")
        return Splits(held[:heldout], validating[:validation], shown[:demonstrations], training[:train])

    def check_characters(self, alphabet: Collection[str]) -> None:
        """Raise ValueError naming the line of a text that cannot be spelt in ``alphabet``, and the character."""
        for row in self.rows:
            columns = ("prompt", "reference", "hint", "responses") + (("answer",) if row["verifier"] != "regex" else ())
            for column in columns:
                for character in "".join(row.get(column, "")):
                    if character not in alphabet:
                        expected = f"characters that the model can spell in {column}"
                        raise _error(self.name, row["line"], expected, f"{character!r} (U+{ord(character):04X})")

    def _check(self, row: Row) -> None:
        """Load the row's verifier, and hold what is to be shown against it."""
        name = row["verifier"]
        try:
            verifier = self._verifiers.get(name) or load_verifier(name)
        except ValueError as error:
            raise ValueError(f"{self.name}:{row['line']}: {error}") from None
        self._verifiers[name] = verifier
        wrong = problem(name, row.get("answer"))
        if wrong:
            raise ValueError(f"{self.name}:{row['line']}: expected {wrong}")
        shown = _shown(row)
        if ":" not in name and shown and not verifier(row, shown).correct:
            expected = f"a {'reference' if 'reference' in row else 'answer'} that the verifier {name!r} accepts"
            raise _error(self.name, row["line"], expected, repr(shown))
        responses = row.get("responses")
        if ":" not in name and responses is not None and len({verifier(row, x).correct for x in responses}) < 2:
            expected = f"responses of which the verifier {name!r} finds one right and one wrong"
            raise _error(self.name, row["line"], expected, repr(responses))

    def _everywhere(self, column: str) -> bool:
        """Whether every line has the column. Raises ValueError where only some have."""
        without = [row["line"] for row in self.rows if column not in row]
        if without and len(without) < len(self.rows):
            raise _error(self.name, without[0], f"{column}, which other lines have", "none")
        return not without

    def _by_hash(self) -> tuple[list[Question], list[Question], list[Question]]:
        shares: tuple[list[Question], list[Question], list[Question]] = ([], [], [])
        for row in sorted(self.rows, key=lambda row: _hash(row["prompt"])):
            number = _hash(row["prompt"]) % 100
            question = Question(row["prompt"], row["prompt"], _shown(row), row)
            shares[0 if number < HELDOUT else 1 if number < VALIDATION else 2].append(question)
        random.Random(self.seed).shuffle(shares[2])
        return shares


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"task must be a readable .jsonl file; {path}: {error.strerror}") from None


def read_rows(path: Path, content: bytes) -> list[Row]:
    """The objects of a file, each with the number of its line and the name of its verifier; blank lines are none.

    Raises:
        ValueError: naming the file, the line, what was expected and what came.
    """
    rows: list[Row] = []
    first: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            row = _object(path, number, line)
            _check_columns(path, number, row)
            if row["prompt"] in first:
                raise _error(path, number, "a new prompt", f"that of line {first[row['prompt']]}")
            first[row["prompt"]] = number
            rows.append({"verifier": "exact", **row, "line": number})
    if not rows:
        raise ValueError(f"task must be a .jsonl file with a JSON object a line; {path} has none")
    return rows


def _object(path: Path, number: int, line: bytes) -> Row:
    """The JSON object of a line, without columns of null."""

    def unique(pairs: list[tuple[str, Any]]) -> Row:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name occurs twice")
        return dict(pairs)

    try:
        text = line.decode()
        row = json.loads(text, object_pairs_hook=unique)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise _error(path, number, "a JSON object in UTF-8", f"{line[:60]!r} ({error})") from None
    if not isinstance(row, dict):
        raise _error(path, number, "a JSON object", repr(row)[:60])
    return {name: value for name, value in row.items() if value is not None}


def _check_columns(path: Path, number: int, row: Row) -> None:
    for name, value in row.items():
        if name not in COLUMNS:
            raise _error(path, number, f"the columns {', '.join(COLUMNS)}", repr(name))
        if name in TEXTS and (not isinstance(value, str) or not value.strip()):
            raise _error(path, number, f"{name} to be a string that is not blank", repr(value))
    if "prompt" not in row:
        raise _error(path, number, "a prompt", f"only {', '.join(row) or 'an empty object'}")
    for name in LISTS:
        items = row.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
            raise _error(path, number, f"{name} to be a list of strings that are not empty", repr(items))


def _shown(row: Row) -> str:
    """The text of a demonstration; empty where there is none: a pattern is no answer to learn."""
    return row.get("reference") or ("" if row["verifier"] == "regex" else row.get("answer", ""))


def _hash(prompt: str) -> int:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big")


def _error(path: Path | str, line: int, expected: str, got: str) -> ValueError:
    return ValueError(f"{path}:{line}: expected {expected}; got {got}")
