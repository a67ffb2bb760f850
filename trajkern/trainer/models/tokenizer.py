"""A character tokenizer over printable ASCII: one character is one token."""

from __future__ import annotations

from collections.abc import Iterable

ALPHABET = "\n×" + "".join(map(chr, range(32, 127)))
EOS = 0
_ID = {character: i for i, character in enumerate(ALPHABET, start=1)}
VOCABULARY = len(ALPHABET) + 1


def encode(text: str) -> list[int]:
    """Token ids of ``text``. Raises ValueError naming a character outside ``ALPHABET``."""
    try:
        return [_ID[character] for character in text]
    except KeyError as error:
        raise ValueError(f"text must be printable ASCII, newlines and '×'; got {error.args[0]!r} in {text!r}") from None


def decode(tokens: Iterable[int]) -> str:
    """The text of ``tokens`` up to the first end-of-sequence token."""
    characters = []
    for token in tokens:
        if token == EOS:
            break
        characters.append(ALPHABET[token - 1])
    return "".join(characters)
