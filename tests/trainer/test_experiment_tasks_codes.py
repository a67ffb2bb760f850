"""Codes asked for by letter: a game by hand, what it is credited with, and the control that deals its gains."""

from __future__ import annotations

import itertools

import pytest
import torch

from trajkern import PackedBatch, credit
from trajkern._bench.experiments.rows.delta_belief import DEALT, DealtGains
from trajkern._bench.experiments.tasks.codes import PLACES, Codes
from trajkern.trainer.tasks import Belief, Question, Reply, load_task

NAME = "DFMRW"  # told by c, f, h, k and p
GAME = Question("5820?", "", "", {"name": NAME})


@pytest.fixture
def codes() -> Codes:
    task = Codes("codes", 0)
    task.telling = "cfhkp"
    return task


def played(codes: Codes, letters: str) -> str:
    """The transcript of these questions, with what the environment writes."""
    text = ""
    for letter in letters:
        reply = codes.reply(GAME, text + letter)
        assert reply is not None and not reply.done
        text += letter + reply.text
    return text


def test_a_game_by_hand(codes: Codes) -> None:
    text = played(codes, "cfxcA")
    assert text == "cDfFx-cDA!"
    assert codes.reply(GAME, text) is None and codes.reply(GAME, "") is None  # it is the policy's turn
    assert codes.belief_target(GAME, text) == codes.belief_target(GAME, "") == Belief("=", NAME)
    guess = f"{text}={NAME}"
    assert codes.reply(GAME, guess) is None and codes.reply(GAME, guess + "\n") == Reply("", done=True)
    assert codes.belief_target(GAME, guess + "\n") is None
    assert codes.read(GAME, guess + "\n").correct
    for wrong in (guess, f"{text}={NAME[:-1]}V\n", f"{text}={NAME}x\n", text, ""):
        assert not codes.read(GAME, wrong).correct
    assert codes.penalties(GAME, guess) == [0, 0, 0, 0, -5, 0]
    assert codes.statistics([GAME, GAME], [guess, "kR"]) == {"turns": 3.0, "useful_questions": 1.5}


def test_a_sixth_question_tells_nothing_and_ends_the_game(codes: Codes) -> None:
    text = played(codes, "abdeg")
    assert text == "a-b-d-e-g-"
    assert codes.reply(GAME, text + "c") == Reply("!", done=True)
    assert codes.belief_target(GAME, text) and codes.belief_target(GAME, text + "c!") is None
    assert codes.penalties(GAME, text + "c!") == [0, 0, 0, 0, 0, -5]


def test_demonstrations_end_anywhere_and_name_the_code(codes: Codes) -> None:
    seen = set()
    for question in itertools.islice(codes.questions(2), 100):
        assert codes.read(question, question.answer).correct
        pieces = codes.pieces(question)
        assert "".join(text for text, _ in pieces) == question.answer
        *play, guess, name = pieces
        count = len(play) // 2
        asks = question.entry["asks"]
        assert [learned for _, learned in play] == [asks, False] * count
        assert guess == ("=", count == PLACES) and name == (question.entry["name"] + "\n", True)
        replies = [codes.reply(question, question.answer[: 2 * turn + 1]) for turn in range(count)]
        assert [reply.text for reply in replies if reply] == [text for text, _ in play[1::2]]
        seen.add((asks, count))
    assert len(seen) == 2 * (PLACES + 1)
    assert all(len(q.answer) == 2 * PLACES + len(NAME) + 2 for q in itertools.islice(codes.questions(3), 20))


def test_codes_depend_on_the_seed_and_nothing_else() -> None:
    draws = [list(itertools.islice(Codes("codes", seed).questions(3), 30)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    letters = [Codes("codes", seed).telling for seed in (0, 0, 1)]
    assert letters[0] == letters[1] != letters[2] and len(set(letters[0])) == PLACES
    task = load_task("trajkern._bench.experiments.tasks.codes:Codes")
    splits = task.splits(heldout=40, validation=40, demonstrations=100, train=100)
    some = [{q.prompt for q in s} for s in (splits.heldout, splits.validation, [*splits.demonstrations, *splits.train])]
    assert not some[0] & some[1] and not (some[0] | some[1]) & some[2]


def test_gains_are_dealt_within_a_group() -> None:
    tokens = torch.arange(12)
    mask = torch.tensor([0, 1, 0, 1] * 2 + [0, 1, 0, 1], dtype=torch.bool)  # two turns of a token each
    batch = PackedBatch(tokens, torch.tensor([0, 4, 8, 12]), mask, torch.tensor([0, 0, 1]))
    gain = torch.tensor([0.5, torch.nan, 0.25, -1.0, 3.0, 4.0])
    rollouts = credit.Rollouts(
        batch,
        rewards={"reward": torch.tensor([1.0, 0.0, 0.0])},
        span_rewards={"gain": gain, "penalty": torch.tensor([0.0, 0, 0, 0, 0, -5])},
    )
    dealt = DealtGains(scale=0.1, win_reward=2.0)(rollouts)
    torch.testing.assert_close(dealt, torch.tensor([2.025, 2.0, 0.05, 0.0, 0.3, -4.6]))
    assert DEALT.needs == {"reward", "spans:turn", "span_rewards:gain", "span_rewards:penalty"}
    assert DEALT == credit.recipe("delta_belief", reward=DealtGains())
