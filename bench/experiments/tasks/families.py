"""Families of questions, each with a secret that only earlier successes in it show."""

from __future__ import annotations

import random
from collections.abc import Iterator
from string import ascii_lowercase

from trajkern.trainer.tasks import Answer, Question, Task
from trajkern.trainer.tasks.base import STREAM

FAMILIES = 800  # to train and to be tested on, and as many others for demonstrations
DEMONSTRATIONS = 2  # split


class Families(Task):
    """``wux:331=`` is answered by the secret digit of the family wux and the last digit of 331: ``41``.

    What a bank of skills needs for an effect: what helps is the same in all of a family and nowhere in the question,
    there are so many families that the weights learn the secrets slowly, and a policy that can read a skill. The
    demonstrations teach that, and no secret: they are of other families, whose names are in capitals.
    """

    demonstrations, weight_decay = 3000, 0.1

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__(name, seed)
        draw = random.Random(f"families:{seed}")
        names = ["".join(draw.sample(ascii_lowercase, 3)) for _ in range(4 * FAMILIES)]
        names = list(dict.fromkeys(names))[: 2 * FAMILIES]
        self._names = names[:FAMILIES], [name.upper() for name in names[FAMILIES:]]
        self._secrets = {name: draw.randrange(10) for name in (*self._names[0], *self._names[1])}

    def questions(self, split: int) -> Iterator[Question]:
        names = self._names[split == DEMONSTRATIONS]
        for i in range(STREAM):
            draw = random.Random(f"{self.seed}:{split}:{i}")
            name, number = draw.choice(names), draw.randrange(1000)
            prompt = f"{name}:{number:03d}="
            yield Question(prompt, prompt, f"{self._secrets[name]}{number % 10}", {"family": name})

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text == question.answer)

    def family(self, question: Question) -> str:
        return question.entry["family"]
