"""Letters with codes and signs: messages tell a code, nothing but verdicts a sign, and a verdict is seldom good."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from string import ascii_lowercase, ascii_uppercase

from trajkern.trainer.tasks import Answer, Question, Task
from trajkern.trainer.tasks.base import STREAM

LENGTH, SIGNED = 3, 2  # letters of a word, and of these those whose sign is asked for
CODES, SIGNS = ascii_uppercase, "+-"
DEMONSTRATIONS = 2  # the split of questions that are shown answered


class Letters(Task):
    """``iuy=`` is answered by ``iTuAyBi-u+``: each letter with its code, then the first two with their signs.

    A letter has one of 26 codes and one of two signs, which the seed decides; demonstrations show the form alone, their
    codes and signs are drawn anew each time. Whoever got a code wrong is told the code of one such letter, as in
    ``yB``, never a sign.

    What the effect needs: a part that only a message tells (by chance all codes are right in one answer of 17,576, so
    a verdict has nothing to reinforce), and one that only a verdict does (perfect codes alone are right in a quarter);
    and hints that are read, which the demonstrations teach: what stands before the question stands in the answer.
    """

    demonstrations, weight_decay = 4000, 0.1

    def questions(self, split: int) -> Iterator[Question]:
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            word = rng.sample(ascii_lowercase, LENGTH)
            if split == DEMONSTRATIONS:
                codes, signs = rng.choices(CODES, k=LENGTH), rng.choices(SIGNS, k=SIGNED)
            else:
                codes = [self._drawn("code", letter, CODES) for letter in word]
                signs = [self._drawn("sign", letter, SIGNS) for letter in word[:SIGNED]]
            prompt = "".join(word) + "="
            text = (
                f"Write each letter of {prompt[:-1]} with its code, a capital, and then the first {SIGNED} letters "
                "with their signs, + or -."
            )
            yield Question(prompt, text, spelt(word, codes) + spelt(word[:SIGNED], signs), {})

    def _drawn(self, what: str, letter: str, choices: str) -> str:
        return random.Random(f"{self.seed}:{what}:{letter}").choice(choices)

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text == question.answer, None, has_form(question, text))

    def hint(self, question: Question, text: str) -> str | None:
        """The code of a letter whose code is wrong in ``text``, or missing where that is empty; None where all are
        right, and where letters do not stand where they must."""
        if text and not has_form(question, text):
            return None
        pairs = [question.answer[at : at + 2] for at in range(0, 2 * LENGTH, 2)]
        wrong = [pair for at, pair in enumerate(pairs) if text[2 * at : 2 * at + 2] != pair]
        return wrong[zlib.crc32((question.prompt + text).encode()) % len(wrong)] if wrong else None

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """The shares of codes, of signs and of answers' forms that are right."""
        places, count = range(1, 2 * (LENGTH + SIGNED), 2), max(len(texts), 1)
        pairs = list(zip(questions, texts, strict=True))
        right = [sum(text[at : at + 1] == q.answer[at] for q, text in pairs) / count for at in places]
        return {
            "codes": sum(right[:LENGTH]) / LENGTH,
            "signs": sum(right[LENGTH:]) / SIGNED,
            "form": sum(has_form(q, text) for q, text in pairs) / count,
        }


def spelt(letters: Sequence[str], marks: Sequence[str]) -> str:
    return "".join(letter + mark for letter, mark in zip(letters, marks, strict=True))


def has_form(question: Question, text: str) -> bool:
    """Whether the question's letters stand where they must, each with something after it."""
    return len(text) == len(question.answer) and text[::2] == question.answer[::2]
