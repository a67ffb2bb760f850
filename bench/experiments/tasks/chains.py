"""Chains of sums whose references end in a long tail of a style that no reasoning decides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from trajkern.trainer.tasks import Answer, Question, Task
from trajkern.trainer.tasks.base import STREAM

LENGTH = 5  # lines of work
TAIL, LEAN = 80, 0.65  # tokens of the tail, and the share of them that lean to the style
SLIP = 0.25  # of the demonstrations' lines
EASY = {2: 0.5, 3: 0.75}  # the share of the demonstrations and of the training questions that "!" marks
DEMONSTRATIONS = 2  # the split


class Chains(Task):
    """``abc7:01101=`` starts at 7 and adds a bit a line, modulo 10: a style, A or B; 7, 8, 9, 9, 0; and 0 with a tail.

    The reference's style is drawn, and x and o of its tail lean to it: one of its tokens says whether the work was
    right, and its tail whether the rollout's style was the reference's, which nobody can know. Hence what the effect
    of DRO's weights needs: the answer follows from the work (the demonstrations slip on purpose and carry the slip
    on), few of many reference tokens reflect it, the others differ between rollouts for another reason, and the policy
    is right often enough to compare. The style's own line is no reasoning: were it trained it would drift to one value
    and take the noise with it. Rollouts need no tail: let them end with the answer, at 13 tokens.

    What its filter needs: prompts that teach nothing. Three of four training questions end with "!" and not with "=";
    their demonstrations never slip. Held-out questions are never of these.
    """

    demonstrations, weight_decay = 3000, 0.1

    def questions(self, split: int) -> Iterator[Question]:
        for i in range(STREAM):
            yield self._question(split, random.Random(f"{self.seed}:{split}:{i}"))

    def _question(self, split: int, draw: random.Random) -> Question:
        nonce, first, bits = (
            "".join(draw.choices("abcdefghij", k=3)),
            draw.randrange(10),
            draw.choices((0, 1), k=LENGTH),
        )
        easy = draw.random() < EASY.get(split, 0.0)
        style = draw.randrange(2)
        tail = "".join("xo"[style ^ (draw.random() >= LEAN)] for _ in range(TAIL))
        work, now = [], first
        for bit in bits:
            now = (now + bit) % 10
            if split == DEMONSTRATIONS and not easy and draw.random() < SLIP:
                now = draw.randrange(10)
            work.append(str(now))
        prompt = f"{nonce}{first}:{''.join(map(str, bits))}{'!' if easy else '='}"
        lines = ["AB"[style], *work, work[-1] + tail]
        return Question(prompt, prompt, "\n".join(lines), {"answer": str((first + sum(bits)) % 10)})

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text.rpartition("\n")[2][:1] == question.entry["answer"])

    def reference(self, question: Question) -> str:
        return question.answer

    def reasoning(self, question: Question, text: str) -> tuple[int, int]:
        """The lines of sums, behind the style's."""
        return text.find("\n") + 1, text.rfind("\n") + 1

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """How often the answer repeats the last line, and how often the style is A."""
        lines = [text.split("\n") for text in texts]
        follows = sum(some[-1][:1] == some[-2] for some in lines if len(some) > 1)
        return {
            "follows": follows / max(len(texts), 1),
            "style_a": sum(t[:1] == "A" for t in texts) / max(len(texts), 1),
        }
