"""What judges are asked, and how their verdicts are read: in use, and in training."""

from __future__ import annotations

import re

from trajkern.recipes.reward_models import VERDICTS, verdict

HIGHEST = 10  # of the scores that a judge is asked for
RUBRIC = "You judge how well a response answers a question: whether it is correct, complete and to the point."
_REASON = "Reason first, in a few sentences: what does the question ask for, and what"
_ASKED = f"""
{_REASON} does the response get right or wrong? Then \
end with a line of its own: the word "Score:" and a whole number from 0 (useless) to {HIGHEST} (perfect)."""
_ASKED_PAIR = f"""
{_REASON} do the responses get right or wrong? Then \
end with a line of its own: <answer>[[A]]</answer> if response A is better, <answer>[[B]]</answer> if response B is."""
_ASKED_SCORES = f"""
{_REASON} do the responses get right or wrong? Then \
end with a line of its own: the word "Scores:" and two whole numbers from 0 (useless) to {HIGHEST} (perfect), that of \
response A, a comma, that of response B."""
_SCORE = re.compile(
    r"[\W_]*score[*_\s]*[:=][*_\s]*([0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out of)\s*([0-9]+))?[.,;!*_\s]*", re.I
)
_SCORES = re.compile(r"(?:scores:\s*)?([0-9]{1,2}(?:\s*,\s*[0-9]{1,2})*)\s*", re.I)


def question(prompt: str, response: str, *, rubric: str = RUBRIC) -> str:
    """What a judge is asked about a response: also what a judge in training is asked."""
    return f"{rubric}\n\n<question>\n{prompt}\n</question>\n\n<response>\n{response}\n</response>\n{_ASKED}"


def pair_question(prompt: str, first: str, second: str, *, rubric: str = RUBRIC, scores: bool = False) -> str:
    """What a judge is asked about two responses: also what a judge in training is asked, to be rewarded by
    ``rule_rewards(replies, labels, rule="rm_r1")`` with GRPO in any trainer. With ``scores`` it is to give each one, as
    "deepseek_grm" rewards them."""
    responses = f"<response_a>\n{first}\n</response_a>\n\n<response_b>\n{second}\n</response_b>"
    asked = _ASKED_SCORES if scores else _ASKED_PAIR
    return f"{rubric}\n\n<question>\n{prompt}\n</question>\n\n{responses}\n{asked}"


def read_score(text: str, ended: bool) -> float:
    """The score of a reply's last line of the form "Score: k", k from 0 to 10, as k / 10 in [0, 1]; NaN without one.

    "Score: k/10" and Markdown's stars are understood. A line that says k of another number, or a k above 10, is none.

    Args:
        text: the reply.
        ended: False for one that was cut off: its last line may lack digits, and is not read.
    """
    lines = text.split("\n") if ended else text.split("\n")[:-1]
    for line in reversed(lines):
        if match := _SCORE.fullmatch(line):
            score = float(match[1])
            return score / HIGHEST if score <= HIGHEST and match[2] in (None, str(HIGHEST)) else float("nan")
    return float("nan")


def read_scores(text: str, count: int) -> list[int] | None:
    """``count`` whole numbers from 0 to 10 on a reply's last line, after "Scores:" or alone: "7, 10"; None without."""
    match = _SCORES.fullmatch(text.strip().rpartition("\n")[2].strip())
    scores = [int(score) for score in match[1].split(",")] if match else []
    return scores if len(scores) == count and max(scores) <= HIGHEST else None


def read_verdict(text: str, ended: bool) -> float:
    """1 for a reply whose verdict is A, 0 for B, NaN without one; see :func:`trajkern.recipes.reward_models.verdict`.

    Args:
        text: the reply.
        ended: not read: a verdict is whole or none.
    """
    said = verdict(text)
    return float("nan") if said is None else 1.0 - VERDICTS.index(said)
