"""Five lookups and a sort: what a rollout looks up is noise to the tokens that sort it."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence

from trajkern.trainer.tasks import Action, Answer, Question, Reply, Task
from trajkern.trainer.tasks.base import STREAM

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TERMS = 5
SLIPS = 0.5  # the chance that a demonstration's call asks for a letter drawn at random
_CALL = re.compile(r"<([^<>]*)>")
_ASKED = re.compile(r"[a-z]\d")


class Lookups(Task):
    """``kdmqa=`` is answered by ``<k3>7<d0>2<m8>9<q1>2<a5>4=22479``: five letters' values, then these sorted.

    A call is a letter and one of ten mirrors, all of which are up. The reply is the letter's value in this question, or
    ``?`` for a letter that is not in it. A call is right if its letter is in the question and has not been asked for.

    The structure that attribution needs: the calls' rewards vary for reasons of their own (half of the demonstrations'
    calls ask for random letters, and the answer is right all the same), and the answer is hard even where all calls
    were right. Credited to whole rollouts, the calls' rewards are noise on the answer's tokens.
    """

    demonstrations = 4000
    weight_decay = 0.1
    interactive = True

    def questions(self, split: int) -> Iterator[Question]:
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            letters = "".join(rng.sample(LETTERS, TERMS))
            turns = []
            for letter in letters:
                asked = rng.choice(LETTERS) if split == 2 and rng.random() < SLIPS else letter
                turns += [(f"<{asked}{rng.randrange(10)}>", True), (_reply(letters, asked), False)]
            answer = "".join(sorted(_value(letters, letter) for letter in letters))
            entry = {"letters": letters, "answer": answer, "turns": turns}
            shown = "".join(text for text, _ in turns) + "=" + answer
            yield Question(f"{letters}=", f"{letters}=", shown, entry)

    def read(self, question: Question, text: str) -> Answer:
        return Answer(text.rpartition("=")[2] == question.entry["answer"])

    def reply(self, question: Question, text: str) -> Reply | None:
        if not text.endswith(">"):
            return None
        asked = text[:-1].rpartition("<")[2]
        return Reply(_reply(question.entry["letters"], asked[:1] if _ASKED.fullmatch(asked) else ""))

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        return [*question.entry["turns"], (f"={question.entry['answer']}", True)]

    def action_spans(self, question: Question, text: str) -> list[Action]:
        due, actions = set(question.entry["letters"]), []
        for call in _CALL.finditer(text):
            right = bool(_ASKED.fullmatch(call[1])) and call[1][0] in due
            due -= {call[1][0]} if right else set()
            actions.append(Action(call.start(), call.end(), right))
        return actions

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """The share of letters that were looked up, of rollouts that looked up all, and of these that were right."""
        pairs = list(zip(questions, texts, strict=True))
        found = [sum(action.right for action in self.action_spans(q, text)) for q, text in pairs]
        whole = [self.read(q, text).correct for (q, text), count in zip(pairs, found, strict=True) if count == TERMS]
        return {
            "found": sum(found) / max(TERMS * len(found), 1),
            "all_found": len(whole) / max(len(found), 1),
            "right_given_all": sum(whole) / max(len(whole), 1),
        }


def _value(letters: str, letter: str) -> str:
    """A digit that only this question gives the letter."""
    return str(hashlib.sha256(f"{letters}:{letter}".encode()).digest()[0] % 10)


def _reply(letters: str, letter: str) -> str:
    return _value(letters, letter) if letter and letter in letters else "?"
