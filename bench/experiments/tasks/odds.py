"""Bits of known odds: how likely an answer is right can be read off its question, and no answer is sure."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence

import torch

from trajkern.recipes import rlcr
from trajkern.trainer.tasks import Answer, Question, Task
from trajkern.trainer.tasks.base import STREAM

ODDS = {"0": 0.0, "1": 1.0, "a": 0.95, "b": 0.85, "c": 0.7, "d": 0.5}  # that a place of this letter is a 1
PLACES = 4
UNINFORMED = 0.4  # the share of the demonstrations whose confidence is any tenth
BOLDNESS = 6  # the confidence of the others is the sixth root of the chance: informed, and too sure
_ANSWER = re.compile(r"(.*?) (\d)")


class Odds(Task):
    """``5820:1ad0=`` is answered by ``1110 4``: four bits, and a digit t that states the confidence (t + 1/2) / 10.

    A place is 0 or 1 as it says, or 1 with the odds of its letter, drawn once a question; the digits before the colon
    only tell questions apart.

    What the effect needs: answers whose chance of being right varies and shows in the question, and demonstrations
    whose confidence is informative, if far too high: what is sampled must differ for a reward to choose from it. An
    outcome alone teaches the likelier bits and has no use for the digit.
    """

    states_confidence = True
    demonstrations, weight_decay = 4000, 0.1

    def questions(self, split: int) -> Iterator[Question]:
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            shown = "".join(rng.choices(tuple(ODDS), k=PLACES))
            bits = "".join(str(int(rng.random() < ODDS[letter])) for letter in shown)
            chance = chance_of(shown, likeliest(shown))
            uninformed = rng.random() < UNINFORMED
            tenth = rng.randrange(10) if uninformed else min(9, int(10 * chance ** (1 / BOLDNESS)))
            prompt = f"{rng.randrange(10_000):04d}:{shown}="
            odds = ", ".join(f"{letter} {100 * p:.0f} %" for letter, p in ODDS.items())
            text = (
                f"Guess {PLACES} bits. The odds that a place is 1: {odds}. The places: {shown}. "
                "Write the bits, a space and a digit, the tenth that your confidence lies in."
            )
            yield Question(prompt, text, f"{bits} {tenth}", {"answer": bits, "places": shown})

    def read(self, question: Question, text: str) -> Answer:
        found = _ANSWER.fullmatch(text)
        if not found:
            return Answer(False, None, False)
        return Answer(found[1] == question.entry["answer"], (int(found[2]) + 0.5) / 10, True)

    def ballot(self, question: Question, text: str) -> str | None:
        found = _ANSWER.fullmatch(text)
        return found[1] if found else None

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """Brier score and AUROC of somebody who states the odds of each well-formed answer: the best there is."""
        answers = [(q, self.ballot(q, text)) for q, text in zip(questions, texts, strict=True)]
        read = [
            (q.entry["answer"] == bits, chance_of(q.entry["places"], bits)) for q, bits in answers if bits is not None
        ]
        known = rlcr.calibration(
            torch.tensor([right for right, _ in read], dtype=torch.bool),
            torch.tensor([chance for _, chance in read], dtype=torch.float64),
        )
        return {"ideal_brier": known.brier.item(), "ideal_auroc": known.auroc.item()}


def chance_of(places: str, bits: str) -> float:
    """That ``bits`` is the answer."""
    if len(bits) != len(places) or not set(bits) <= {"0", "1"}:
        return 0.0
    return math.prod(ODDS[place] if bit == "1" else 1 - ODDS[place] for place, bit in zip(places, bits, strict=True))


def likeliest(places: str) -> str:
    """The likeliest answer; of two as likely, the one of 1."""
    return "".join("1" if ODDS[place] >= 0.5 else "0" for place in places)
