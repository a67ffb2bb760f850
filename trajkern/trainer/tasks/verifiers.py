"""Verifiers by name: how a text is held against a row's answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from decimal import Decimal
from typing import Any

from trajkern.credit import load
from trajkern.trainer.returned import agreed, as_flag
from trajkern.trainer.tasks.base import Answer
from trajkern.trainer.tasks.checked import as_answer

Row = dict[str, Any]
Verifier = Callable[[Row, str], Answer]

_NUMBER = re.compile(r"(?:(?<![0-9])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")


def exact(row: Row, text: str) -> Answer:
    """The answer, but for white space around it."""
    return Answer(text.strip() == row["answer"].strip())


def number(row: Row, text: str) -> Answer:
    """The last number in the text has the answer's value: ``so 1,234.50.`` is ``1234.5``."""
    found = _number_in(text)
    return Answer(found == _value(row["answer"].strip()), well_formed=found is not None)


def regex(row: Row, text: str) -> Answer:
    """The answer is a regular expression, which the whole text matches, but for white space around it."""
    return Answer(re.fullmatch(row["answer"], text.strip()) is not None)


def last_line(row: Row, text: str) -> Answer:
    """The last line that is not blank is the answer, but for white space around it."""
    return Answer(text.strip().rpartition("\n")[2].strip() == row["answer"].strip())


VERIFIERS: dict[str, Verifier] = {"exact": exact, "number": number, "regex": regex, "last_line": last_line}


def _number_in(text: str) -> Decimal | None:
    found = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return _value(found[-1]) if found else None


# What a text answers in a verifier's eyes, None where it finds nothing: texts that answer alike are right alike.
BALLOTS: dict[str, Callable[[str], Hashable | None]] = {
    "exact": str.strip,
    "number": _number_in,
    "regex": str.strip,
    "last_line": lambda text: text.strip().rpartition("\n")[2].strip(),
}


def load_verifier(name: str) -> Verifier:
    """The verifier called ``name``: one of ``VERIFIERS``, or ``package.module:function``.

    A function is called with a row's columns as a dict and the text, and returns a bool or an :class:`Answer`.

    Raises:
        ValueError: there is none of that name.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    expected = f"verifier must be one of {', '.join(VERIFIERS)} or"
    try:
        function = load(name)
    except ValueError as error:
        raise ValueError(f"{expected} {error}") from None
    if not callable(function):
        raise ValueError(f"{expected} package.module:function; {name!r} is {function!r}")

    def checked(row: Row, text: str) -> Answer:
        found = agreed(f"verifier {name}", function, row, text)
        if isinstance(found, Answer):
            return as_answer(f"verifier {name}", found)
        return Answer(as_flag(f"verifier {name}", found, "a bool or an Answer"))

    return checked


def problem(verifier: str, answer: str | None) -> str | None:
    """What a built-in verifier expected of a row's answer and did not find; None where there is nothing."""
    if verifier not in VERIFIERS:
        return None
    if answer is None:
        return f"an answer for the verifier {verifier!r}, got none"
    if verifier == "number" and not _NUMBER.fullmatch(answer.strip()):
        return f"an answer that is a number, got {answer!r}"
    if verifier == "last_line" and "\n" in answer.strip():
        return f"an answer of one line for the verifier 'last_line', got {answer!r}"
    if verifier == "regex":
        try:
            re.compile(answer)
        except (re.error, OverflowError, RecursionError) as error:  # of counts and depths beyond the engine
            return f"an answer that is a regular expression, got {answer!r}: {error}"
    return None


def _value(written: str) -> Decimal:
    return Decimal(written.replace(",", ""))
