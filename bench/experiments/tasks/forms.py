"""A form with three fields, of which messages tell one, checks of every entry the second, and nothing but taste the
third."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from string import ascii_lowercase, ascii_uppercase, digits

from trajkern.trainer.tasks import Action, Answer, Question, Task
from trajkern.trainer.tasks.base import STREAM

LENGTH = 3  # letters of a word
CODES, SIGNS = ascii_uppercase, "+-"
SLIPS = 0.3  # the chance that a demonstration leaves out the codes and writes the signs twice
_DEMONSTRATIONS = 2  # the split
_PAIR = 2 * LENGTH
_SIGNED = re.compile(r"([a-z])([+-])")


class Forms(Task):
    """``iuy=`` is answered by ``iTuAyB7i+u-y+``: each letter with its code, any digit, each letter with its sign.

    A letter has one of 26 codes and one of two signs, which the seed decides; demonstrations show the form alone, and
    three in ten of them slip: they have the signs twice and no codes.

    What the parts of a composed credit are for. By chance all codes are right in one answer of 17,576, so a verdict
    has nothing to reinforce: whoever got a code wrong is told the code of one such letter, as in ``iT``, and never a
    sign (a directive part). With perfect codes one answer in 8 is right: a sign is an action, checked wherever it
    stands (dense, from structure). An answer that slips has more signs that can be right than the form has room for,
    and can never be right itself (a gate, ``well_formed``). The digit is free: how many different right answers are
    left in the end is what success, reinforced, uses up (asymmetry).
    """

    demonstrations, weight_decay = 4000, 0.1

    def questions(self, split: int) -> Iterator[Question]:
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            word = "".join(rng.sample(ascii_lowercase, LENGTH))
            if split == _DEMONSTRATIONS:
                slips = rng.random() < SLIPS
                first = _spelt(word, rng.choices(SIGNS if slips else CODES, k=LENGTH))
                signs = rng.choices(SIGNS, k=LENGTH)
            else:
                first = _spelt(word, [self._drawn("code", letter, CODES) for letter in word])
                signs = [self._drawn("sign", letter, SIGNS) for letter in word]
            text = f"Write each letter of {word} with its code, a digit, and each letter with its sign."
            yield Question(f"{word}=", text, first + rng.choice(digits) + _spelt(word, signs), {"word": word})

    def _drawn(self, what: str, letter: str, choices: str) -> str:
        return random.Random(f"{self.seed}:{what}:{letter}").choice(choices)

    def read(self, question: Question, text: str) -> Answer:
        fields = text[:_PAIR] == question.answer[:_PAIR] and text[_PAIR + 1 :] == question.answer[_PAIR + 1 :]
        formed = _has_form(question, text)
        return Answer(fields and formed, None, formed)

    def hint(self, question: Question, text: str) -> str | None:
        """A letter and its code, where that is wrong in ``text`` or that is empty; None where no code is wrong, and for
        what has not the form."""
        pairs = [question.answer[at : at + 2] for at in range(0, _PAIR, 2)]
        if text and not _has_form(question, text) or not pairs[0].isalpha():
            return None
        wrong = [pair for at, pair in enumerate(pairs) if text[2 * at : 2 * at + 2] != pair]
        return wrong[zlib.crc32((question.prompt + text).encode()) % len(wrong)] if wrong else None

    def action_spans(self, question: Question, text: str) -> list[Action]:
        """Every letter with a sign, wherever it stands; right, if the letter is the word's and the sign its own."""
        word = question.entry["word"]
        return [
            Action(found.start(), found.end(), found[1] in word and found[2] == self._drawn("sign", found[1], SIGNS))
            for found in _SIGNED.finditer(text)
        ]

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """The shares of codes and of signs that are right at their places, of answers of the form, and the right signs
        of an answer, wherever they stand."""
        pairs, count = list(zip(questions, texts, strict=True)), max(len(texts), 1)
        right = [[text[at : at + 1] == q.answer[at] for at in range(1, len(q.answer), 2)] for q, text in pairs]
        at_signs = [
            [text[at : at + 1] == q.answer[at] for at in range(_PAIR + 2, len(q.answer), 2)] for q, text in pairs
        ]
        return {
            "codes": sum(sum(some[:LENGTH]) for some in right) / (LENGTH * count),
            "signs": sum(map(sum, at_signs)) / (LENGTH * count),
            "form": sum(_has_form(q, text) for q, text in pairs) / count,
            "signs_anywhere": sum(a.right for q, text in pairs for a in self.action_spans(q, text)) / count,
        }


def _spelt(word: str, marks: Sequence[str]) -> str:
    return "".join(letter + mark for letter, mark in zip(word, marks, strict=True))


def _has_form(question: Question, text: str) -> bool:
    """Whether letters, codes, digit and signs stand where they must."""
    word = question.entry["word"]
    return (
        len(text) == 2 * _PAIR + 1
        and text[:_PAIR:2] == word == text[_PAIR + 1 :: 2]
        and set(text[1:_PAIR:2]) <= set(CODES)
        and text[_PAIR] in digits
        and set(text[_PAIR + 2 :: 2]) <= set(SIGNS)
    )
