"""A puzzle with many right answers: what a policy finds of them is its diversity."""

from __future__ import annotations

import random
from collections.abc import Iterator

from trajkern.trainer.tasks import Answer, Question, Task
from trajkern.trainer.tasks.base import STREAM

LEAST, MOST = 6, 21  # what three digits are to add; between them each has 28 answers at least


class Puzzle(Task):
    """``19:128=`` is answered by any three digits that bring the sum of all to 19, such as ``080`` or ``341``.

    A question has 28 to 75 right answers, and demonstrations draw theirs evenly.

    The structure that learning from failures needs: many right answers, so that what is kept or lost can be counted; a
    start at which about half of all samples are right; and several updates on each batch, as an on-policy update of
    success, of failure and of both has one expected gradient.
    """

    demonstrations = 4000
    weight_decay = 0.1

    def questions(self, split: int) -> Iterator[Question]:
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            given = [rng.randint(0, 9) for _ in range(3)]
            missing = rng.randint(LEAST, MOST)
            answer = rng.choice(answers(missing))
            prompt = f"{missing + sum(given)}:{''.join(map(str, given))}="
            yield Question(prompt, prompt, answer, {"missing": missing})

    def read(self, question: Question, text: str) -> Answer:
        digits = len(text) == 3 and text.isdecimal()
        return Answer(digits and sum(map(int, text)) == question.entry["missing"], well_formed=digits)


def answers(missing: int) -> list[str]:
    """Every three digits with this sum."""
    digits = range(10)
    return [f"{a}{b}{missing - a - b}" for a in digits for b in digits if missing - a - b in digits]
