"""Judges of pairs: which verdicts are read, what a reply without one becomes, and what they feed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.trainer.test_judges import PROMPTS, RESPONSES, Server, _said, _script, server, tiny  # noqa: F401
from trajkern.recipes.reward_models import elo, knockout, majority, round_robin, rule_rewards
from trajkern.trainer.models.judges import JudgeError
from trajkern.trainer.models.pair_judges import (
    LocalPairJudge,
    PairJudge,
    ServerPairJudge,
    about,
)
from trajkern.trainer.models.verdicts import pair_question, read_verdict

NAN = math.nan
A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"
OTHERS = ["3", "4", "7"]


@pytest.mark.parametrize(
    ("text", "expected"), [(f"So.\n{A}", 1.0), (f"{B}\n", 0.0), (f"{A} or {B}", NAN), ("A", NAN), ("", NAN)]
)
def test_read_verdict(text: str, expected: float) -> None:
    for ended in (True, False):
        assert read_verdict(text, ended) == pytest.approx(expected, nan_ok=True)


def test_a_local_judge_compares(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What it wrote is what the rule of training reads; where it wrote no verdict it goes on once."""
    asked = _script(
        monkeypatch,
        tiny,
        [f"The first is right.\n{A}|", "I cannot say.|", f"{B}|", "Both are", f"{B} no, {A}|", f"{B}|"],
        ["B]]</answer>|", "maybe|", "A]]</answer>\nfor"],
    )
    judge: PairJudge = LocalPairJudge(*tiny, samples=2, batch=3, rubric="Be strict.")
    judged = judge(PROMPTS, RESPONSES, OTHERS)
    torch.testing.assert_close(judged.scores, torch.tensor([[1, 0, NAN], [0, NAN, 0]]), equal_nan=True)
    assert judged.replies[0] == [f"The first is right.\n{A}", f"I cannot say.\n{B}"]
    assert judged.replies[1][1] == "Both are\n<answer>[[maybe"
    assert rule_rewards(judged.replies[0], ["B", "B"], rule="rm_r1").tolist() == [-1, 1]
    asked_first = pair_question("1+1", "2", "3", rubric="Be strict.")
    assert asked[0][0].startswith(asked_first) and asked_first.startswith("Be strict.")
    assert "<response_a>\n2\n</response_a>\n\n<response_b>\n3\n</response_b>" in asked[0][0]
    assert asked[1][0] == f"{asked[0][0]}I cannot say.\n<answer>[["


def test_a_local_judges_draws_are_its_own(tiny: tuple[Any, Any]) -> None:  # noqa: F811
    judge = LocalPairJudge(*tiny, max_new_tokens=8, samples=2, seed=3)
    first = judge(PROMPTS[:2], RESPONSES[:2], OTHERS[:2])
    assert judge(PROMPTS[1:2], RESPONSES[1:2], OTHERS[1:2]).replies == first.replies[1:]
    assert first.scores.isnan().all(), "a random model gives no verdict"
    with pytest.raises(ValueError, match="seconds must have one for each of the 2 prompts, got 1"):
        judge(PROMPTS[:2], RESPONSES[:2], OTHERS[:1])
    with pytest.raises(TypeError, match="firsts must be a sequence of strings, got 'ab'"):
        judge(PROMPTS[:2], "ab", OTHERS[:2])


def test_a_server_compares_for_elo_and_the_knockout(server: Server) -> None:  # noqa: F811
    """It finds the longer response better."""

    def reply(turn: int, text: str) -> tuple[int, bytes]:
        asked = server.bodies[-1]["messages"][0]["content"]
        a, b = (asked.partition(f"<response_{x}>\n")[2].partition(f"\n</response_{x}>")[0] for x in "ab")
        return _said(f"Long.\n{A if len(a) > len(b) else B}" if len(a) != len(b) else "Alike.")

    server.script = reply
    prefer = about(ServerPairJudge(server.url, "m", concurrency=1), "Say much.")
    responses = ["yes", "yes indeed", "no", "in no way at all", "ja!"]
    wins = round_robin(prefer, responses)
    assert wins[0, 4] == wins[4, 0] == 0, "no verdict, no game"
    assert wins.sum() == 2 * 9 and elo(wins).argsort(descending=True)[:2].tolist() == [3, 1]
    assert knockout(majority(prefer), responses[:4], seed=1) == "in no way at all"
    server.script = lambda turn, text: (401, b"{}")
    with pytest.raises(JudgeError, match="1 of 1 calls to the judge 'm' failed"):
        knockout(majority(prefer), responses[:2], seed=1)
