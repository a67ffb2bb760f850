"""Check digits, and claims of what they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate, count

from trajkern.trainer.tasks import Answer, Question, Task

TERMS = 5


class Claims(Task):
    """``39475:``: the last digit of 3+9+4+7+5 is 8, by way of 2, 6 and 3; ``responses`` are it and another digit.

    The structure that the effect of a reasoning judge needs: every digit is as likely as any other until the last has
    been added, so that a verdict at once is hardly better than chance; every partial sum is a step that a small model
    can take, and nothing rewards it but the verdict; a slip in it is drawn anew in each sample, so that several samples
    can be voted on.
    """

    demonstrations = 3000
    weight_decay = 0.1

    def questions(self, split: int) -> Iterator[Question]:
        for index in count():
            draw = random.Random(f"{self.seed} {split} {index}")
            digits = [draw.randrange(10) for _ in range(TERMS)]
            sums = [total % 10 for total in accumulate(digits)]
            prompt = f"{''.join(map(str, digits))}:"
            wrong = (sums[-1] + draw.randrange(1, 10)) % 10
            yield Question(prompt, prompt, "\n".join(map(str, sums[1:])), {"digit": sums[-1], "wrong": wrong})

    def read(self, question: Question, text: str) -> Answer:
        """The last line is the check digit."""
        return Answer(text.rpartition("\n")[2] == str(question.entry["digit"]))

    def reference(self, question: Question) -> str:
        return question.answer

    def responses(self, question: Question) -> list[str]:
        return [str(question.entry["digit"]), str(question.entry["wrong"])]
