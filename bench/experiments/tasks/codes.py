"""Hidden codes, asked for letter by letter: what a question was worth shows in the policy's belief, seldom in a win."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from string import ascii_lowercase

from trajkern.trainer.tasks import Answer, Belief, Question, Reply, Task
from trajkern.trainer.tasks.base import STREAM
from trajkern.trainer.tasks.twenty_questions import END, GUESS, read_game

PLACES = 5
VALUES = "ABCDEFGHIJKLMNOPQRSTUVWXY"  # five of each place in turn
NOTHING, ILLEGAL = "-", "!"
DEMONSTRATIONS = 2  # the split of questions that are shown answered


class Codes(Task):
    """``5820?`` is answered by ``cDx-q-kRa-=DFMRW`` and a newline: five questions, and the code's name.

    A code has five places, one of five values each, which nothing but the replies to five of the 26 letters tells; the
    seed decides which. After five questions the name is due: a sixth ends the game.

    What the effect needs: a win is rare until nearly all places are known (each that is not divides it by five), so an
    outcome seldom differs in a group, while a place that is told gains ln 5 of belief at once. And beliefs that can be
    read: demonstrations name the code after 0 to 5 replies. Half of them ask at random, and teach that; the others show
    replies that tell more, and teach no question. When the name is due, only those of five questions teach.
    """

    interactive = True
    demonstrations, weight_decay = 6000, 0.1

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__(name, seed)
        self.telling = "".join(random.Random(f"{seed}:letters").sample(ascii_lowercase, PLACES))  # one a place

    def questions(self, split: int) -> Iterator[Question]:
        for index in range(STREAM):
            rng = random.Random(f"{self.seed}:{split}:{index}")
            name = "".join(VALUES[at + rng.randrange(PLACES)] for at in range(0, len(VALUES), PLACES))
            prompt = "".join(rng.choices("0123456789", k=4)) + "?"
            count = rng.randint(0, PLACES) if split == DEMONSTRATIONS else PLACES
            asks = rng.random() < 0.5
            letters = rng.sample(ascii_lowercase, count) if asks else self._lesson(rng, count)
            play = "".join(letter + self.told(name, letter) for letter in letters)
            text = (
                f"Guess the code {prompt[:-1]}. A letter from a to z asks; {PLACES} of them tell a part of its name. "
                f"After {PLACES} letters write {GUESS}, the name and a new line."
            )
            yield Question(prompt, text, f"{play}{GUESS}{name}{END}", {"name": name, "asks": asks})

    def _lesson(self, rng: random.Random, count: int) -> list[str]:
        """Letters of which any number tells."""
        telling = rng.randint(0, count)
        others = [letter for letter in ascii_lowercase if letter not in self.telling]
        letters = rng.sample(self.telling, telling) + rng.sample(others, count - telling)
        rng.shuffle(letters)
        return letters

    def read(self, question: Question, text: str) -> Answer:
        return Answer(read_game(text).guess == question.entry["name"] + END)

    def reply(self, question: Question, text: str) -> Reply | None:
        game = read_game(text)
        if game.guess is not None:
            return Reply("", done=True) if text.endswith(END) else None
        if not text or len(text) % 2 == 0:
            return None
        if len(game.asked) > PLACES:
            return Reply(ILLEGAL, done=True)
        return Reply(self.told(question.entry["name"], game.asked[-1]))

    def pieces(self, question: Question) -> list[tuple[str, bool]]:
        play, _, name = question.answer.partition(GUESS)
        shown = [(character, at % 2 == 0 and question.entry["asks"]) for at, character in enumerate(play)]
        return [*shown, (GUESS, len(play) == 2 * PLACES), (name, True)]

    def belief_target(self, question: Question, text: str) -> Belief | None:
        game = read_game(text)
        over = game.guess is not None or len(game.asked) > PLACES
        return None if over else Belief(GUESS, question.entry["name"])

    def penalties(self, question: Question, text: str) -> list[float]:
        """Of each turn: -5 for what is no letter and for a sixth, 0 otherwise and for the guess."""
        game = read_game(text)
        legal = [x in ascii_lowercase and at < PLACES for at, x in enumerate(game.asked)]
        return [0.0 if x else -5.0 for x in legal] + [0.0] * (game.guess is not None)

    def statistics(self, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
        """Of a game on average: the questions asked, and the places that they told."""
        asked = [read_game(text).asked for text in texts]
        count = max(len(texts), 1)
        return {
            "turns": sum(map(len, asked)) / count,
            "useful_questions": sum(len(set(letters) & set(self.telling)) for letters in asked) / count,
        }

    def told(self, name: str, letter: str) -> str:
        """What the environment replies to ``letter``."""
        if letter in self.telling:
            return name[self.telling.index(letter)]
        return NOTHING if letter in ascii_lowercase else ILLEGAL
