"""Judges of pairs: language models that reason about two responses and then say which is better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from trajkern._checks import describe
from trajkern.trainer.models.judge_settings import side_by_side
from trajkern.trainer.models.judges import Judgements, _Local, _Server
from trajkern.trainer.models.verdicts import pair_question, read_verdict

_OPENING = "\n<answer>[["


class PairJudge(Protocol):
    """Compares responses to prompts, two of each."""

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> Judgements:
        """K votes on each pair: 1 where the first is better, 0 where the second is, NaN where a vote is missing."""


def about(judge: PairJudge, prompt: str) -> Callable[[Sequence[str], Sequence[str]], Tensor]:
    """The judge's votes on responses to one prompt: what :func:`trajkern.recipes.reward_models.round_robin` asks, and
    :func:`trajkern.recipes.reward_models.majority` for the knockout."""

    def prefer(firsts: Sequence[str], seconds: Sequence[str]) -> Tensor:
        found: object = judge([prompt] * len(firsts), firsts, seconds)
        if not isinstance(found, Judgements):
            raise TypeError(f"judge must return Judgements, got {describe(found)}")
        return found.scores

    return prefer


class LocalPairJudge(_Local):
    """A HuggingFace causal language model that compares two responses; arguments and rules are LocalJudge's.

    It is asked for a last line "<answer>[[A]]</answer>" or "<answer>[[B]]</answer>", in the form that
    :func:`trajkern.recipes.reward_models.rule_rewards` rewards as "rm_r1". Where its reply has neither, it goes on once
    after "<answer>[["; where that brings no verdict either, the vote is missing.
    """

    opening = _OPENING
    glue = ""
    whole = True

    def question(self, *item: str) -> str:
        return pair_question(*item, rubric=self._rubric)

    def read(self, text: str, ended: bool) -> float:
        return read_verdict(text, ended)

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> Judgements:
        return self.judged(side_by_side(prompts=prompts, firsts=firsts, seconds=seconds))


class ServerPairJudge(_Server):
    """A model behind a server that compares two responses; arguments and failures are ServerJudge's, its words
    LocalPairJudge's."""

    def question(self, *item: str) -> str:
        return pair_question(*item, rubric=self._rubric)

    def read(self, text: str, ended: bool) -> float:
        return read_verdict(text, ended)

    def __call__(self, prompts: Sequence[str], firsts: Sequence[str], seconds: Sequence[str]) -> Judgements:
        return self.judged(side_by_side(prompts=prompts, firsts=firsts, seconds=seconds))
