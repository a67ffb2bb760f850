"""Check digits, and claims of what they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, count

from trajkern.trainer.tasks import Answer, Question, Task

DIGITS = 5


class Claims(Task):
    """``39475:2``: the digits of a number and its check digit come to a multiple of ten.

    ``responses`` are the check digit and another one, ``critique`` checks a response by the last digits of the sums on
    the way: 2, 6, 3, 8 and 0.

    The structure that the effect of a reasoning judge needs: every digit is as likely as any other until the last has
    been added, so that a verdict at once is hardly better than chance; every sum is a step that a small model can take,
    and nothing rewards it but the verdict; a slip in it is drawn anew in each sample, so that several samples can be
    voted on.
    """

    demonstrations = 3000
    weight_decay = 0.1

    def questions(self, split: int) -> Iterator[Question]:
        for index in count():
            draw = random.Random(f"{self.seed} {split} {index}")
            digits = [draw.randrange(10) for _ in range(DIGITS)]
            right = -sum(digits) % 10
            prompt = f"{''.join(map(str, digits))}:"
            entry = {"right": str(right), "wrong": str((right + draw.randrange(1, 10)) % 10)}
            yield Question(prompt, prompt, entry["right"], entry)

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text == question.entry["right"])

    def responses(self, question: Question) -> list[str]:
        return [question.entry["right"], question.entry["wrong"]]

    def critique(self, question: Question, response: str) -> str:
        digits = map(int, question.prompt[:-1] + response)
        return "\n".join(str(total % 10) for total in list(accumulate(digits))[1:])
