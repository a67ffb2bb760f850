"""Programs on a machine of few states whose transitions only the seed knows: rare success, decided line by line."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from trajkern.trainer.tasks import Answer, Question, Task
from trajkern.trainer.tasks.base import STREAM

STATES, INSTRUCTIONS = "abcdef", "ABCDEFGH"
LENGTH = 8  # instructions of a program
KNOWN = 0.45  # share of the demonstrations' lines that are right
DEMONSTRATIONS = 2  # split


class Transitions(Task):
    """``c:FDCHEBAG=`` starts in state c and is answered by eight lines, of an instruction and the state it leads to.

    There are 48 transitions, of the seed, and right is a rollout whose lines are all right. What comparing branches
    needs for an effect: few rollouts a prompt and rare success, so that whole rollouts seldom differ, and an outcome
    that steps decide one by one. The demonstrations are right 45 % of the time, lead to any of the other states
    otherwise, and carry that on: the most likely line is right from the start, and eight of them hardly ever are. What
    is to be learned is to be sure.
    """

    demonstrations, weight_decay = 6000, 0.1

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__(name, seed)
        draw = random.Random(f"transitions:{seed}")
        self._next = {state + instruction: draw.choice(STATES) for state in STATES for instruction in INSTRUCTIONS}

    def questions(self, split: int) -> Iterator[Question]:
        for i in range(STREAM):
            draw = random.Random(f"{self.seed}:{split}:{i}")
            state, program = draw.choice(STATES), "".join(draw.choices(INSTRUCTIONS, k=LENGTH))
            prompt = f"{state}:{program}="
            right = self._run(state, program)
            answer = self._run(state, program, draw) if split == DEMONSTRATIONS else right
            yield Question(prompt, prompt, answer, {"right": right})

    def _run(self, state: str, program: str, slips: random.Random | None = None) -> str:
        """The lines of a program, with as many slips as the demonstrations make where they are drawn."""
        lines = []
        for instruction in program:
            right = self._next[state + instruction]
            slip = slips is not None and slips.random() >= KNOWN
            state = slips.choice(STATES.replace(right, "")) if slips and slip else right
            lines.append(instruction + state)
        return "\n".join(lines)

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text == question.entry["right"])

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """The share of the lines that are right after the state before, whichever that was."""
        right = 0
        for question, text in zip(questions, texts, strict=True):
            state, lines = question.prompt[0], text.split("\n")
            for instruction, line in zip(question.prompt[2:-1], lines, strict=False):
                right += line == instruction + self._next.get(state + instruction, "")
                state = line[1:2]
        return {"right_lines": right / max(LENGTH * len(texts), 1)}
