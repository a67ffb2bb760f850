"""Twenty questions: the policy asks for attributes of a hidden entity, the environment answers, the policy guesses."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trajkern.trainer.tasks.base import STREAM, Answer, Question, Reply, Task
from trajkern.trainer.tasks.capabilities import Belief
from trajkern.trainer.tasks.entities import ATTRIBUTES, ENTITIES, KINDS

GUESS, END = "=", "\n"
LIMIT = 6  # questions of a game


class Game(NamedTuple):
    """A transcript, read: the letters asked for in order, and the guess, which may be unfinished."""

    asked: str
    guess: str | None


class TwentyQuestions(Task):
    """``dog:b+k-?`` is something of the dog's kind, with two facts; ``c-e+=cat`` and a newline asks twice and guesses.

    A turn is a letter of ``ATTRIBUTES``, to which the environment adds ``+`` or ``-`` (``!`` for any other
    character), or a guess, which ends the game. So does asking more than ``LIMIT`` times. A demonstration asks at
    random and ends with the hidden entity's name.
    """

    interactive = True
    weight_decay = 0.1
    demonstrations = 8000

    def questions(self, split: int) -> Iterator[Question]:
        letters = "".join(ATTRIBUTES)
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            kind = list(rng.choice(KINDS))
            entity = rng.choice(kind)
            known = "".join(sorted(rng.sample(letters, 2)))
            asked = rng.sample([x for x in letters if x not in known], rng.randint(1, LIMIT))
            facts = "".join(x + answer(entity, x) for x in known)
            play = "".join(x + answer(entity, x) for x in asked)
            lines = "\n".join(f"{letter}: {text}" for letter, text in ATTRIBUTES.items())
            text = (
                f"Guess the thing I think of; it is like a {kind[0]}. Known: {facts}. Write a letter to ask\n{lines}\n"
                f"and read + or - after it; at most {LIMIT} times. Then write {GUESS}, its name and a new line."
            )
            yield Question(
                f"{kind[0]}:{facts}?", text, f"{play}{GUESS}{entity}{END}", {"entity": entity, "known": known}
            )

    def read(self, question: Question, text: str) -> Answer:
        return Answer(read_game(text).guess == question.entry["entity"] + END)

    def reply(self, question: Question, text: str) -> Reply | None:
        game = read_game(text)
        if game.guess is not None:
            return Reply("", done=True) if text.endswith(END) else None
        if not text or len(text) % 2 == 0:
            return None
        known = game.asked[-1] in ATTRIBUTES
        return Reply(answer(question.entry["entity"], game.asked[-1]) if known else "!", len(game.asked) > LIMIT)

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        play, _, name = question.answer.partition(GUESS)
        return [(character, at % 2 == 0) for at, character in enumerate(play)] + [(GUESS + name, True)]

    def belief_target(self, question: Question, text: str) -> Belief | None:
        return None if read_game(text).guess is not None else Belief(GUESS, question.entry["entity"] + END)

    def penalties(self, question: Question, text: str) -> list[float]:
        """Of each turn: -5 for what is no question, -1 where the answer was known, 0 otherwise and for the guess."""
        game, known, out = read_game(text), set(question.entry["known"]), []
        for letter in game.asked:
            out.append(-5.0 if letter not in ATTRIBUTES else -1.0 if letter in known else 0.0)
            known.add(letter)
        return out + [0.0] * (game.guess is not None)

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """Questions asked in a game, and the share of them whose answer was not known yet."""
        asked = [
            self.penalties(q, text)[: len(read_game(text).asked)] for q, text in zip(questions, texts, strict=True)
        ]
        count = sum(map(len, asked))
        return {
            "turns": count / max(len(texts), 1),
            "fresh_questions": sum(x == 0 for game in asked for x in game) / max(count, 1),
        }


def answer(entity: str, letter: str) -> str:
    return "+" if letter in ENTITIES[entity] else "-"


def read_game(text: str) -> Game:
    """Turns of two characters, the second the environment's, up to the guess."""
    for at in range(0, len(text), 2):
        if text[at] == GUESS:
            return Game(text[:at:2], text[at + 1 :])
    return Game(text[::2], None)
