"""The recipe toolpo in the trainer: calls and folds, credited to the tokens that made them."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.test_systems import by_tokens, credited, played, run_of
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.systems.toolpo import ToolPO
from trajkern.trainer.tasks import Question


@pytest.fixture(scope="module")
def model() -> CharacterModel:
    torch.manual_seed(5)
    return CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))


@pytest.mark.parametrize("attribution", [True, False])
def test_calls_are_credited_to_their_tokens(model: CharacterModel, attribution: bool) -> None:
    run = run_of(model, "tools", "toolpo", toolpo=ToolPO(attribution=attribution))
    question = Question("Fe+1=", "", "", {"calls": ["Fe", "26+1"], "answer": "27"})
    games = [
        [("hm<tool>Fe</tool>", True), ("26;", False), ("27", True)],
        [("<tool>1/0</tool>", True), ("error;", False), ("9", True)],
    ]
    sample = played(run.system, [question] * 2, games, [0, 0])
    rollouts, found = credited(run, sample)
    mask = sample.batch.loss_mask
    call = [False] * 5 + [False] * 2 + [True] * 15 + [False] * 5 + [False] * 5 + [True] * 16 + [False] * 7
    assert (rollouts.spans["call"].token_span >= 0).tolist() == call
    # success is 1 and 0, right calls are 1 and 0: each centred is 0.5 and -0.5
    half = torch.tensor([0.5, -0.5]).repeat_interleave(sample.batch.lengths)
    expected = half + half * (torch.tensor(call) if attribution else mask)
    torch.testing.assert_close(found.advantages, torch.where(mask, expected, 0))


def test_folds_are_credited_by_what_they_save(model: CharacterModel) -> None:
    """By hand: the group's direct rollouts take 60 and 42 tokens, the folded ones 34 and 68; another group's 2."""
    run = run_of(model, "tools_fold", "toolpo", toolpo=ToolPO(call_weight=0.5, preference_weight=2.0))
    question = Question("Fe+3-1=", "", "", {"calls": ["Fe", "26+3", "29-1"], "answer": "28"})
    look, fold = [("<tool>Fe</tool>", True), ("26;", False)], [("<fold>26+3-1</fold>", True), ("28;", False)]
    first, last = [("<tool>26+3</tool>", True), ("29;", False)], [("<tool>29-1</tool>", True), ("28;", False)]
    games = [
        [*look, *first, *last, ("28", True)],
        [*look, *last, ("2828", True)],
        [*fold, ("1" * 12, True)],
        [*look, *fold, *fold, ("+" * 6, True)],
        [("28", True)],
    ]
    spent = [sum(len(text) for text, _ in game) for game in games]
    assert spent == [60, 42, 34, 68, 2]
    sample = played(run.system, [question] * 5, games, [1, 1, 1, 1, 0])
    rollouts, found = credited(run, sample)
    preference = torch.tensor([0, 0, (51 - 34) / (51 + 34), (51 - 68) / (51 + 68), 0])
    torch.testing.assert_close(rollouts.reward("preference"), preference)
    action = 0.5 * torch.tensor([3.0, 2, 0, 1, 0]) + 2 * preference
    torch.testing.assert_close(rollouts.reward("action"), action)
    batch = sample.batch
    acts = rollouts.spans["call"].token_span >= 0
    begin = int(batch.cu_seqlens[2]) + len(question.prompt)
    assert acts[begin : begin + 22].tolist() == [True] * 19 + [False] * 3, "a fold is an action, its reply is none"
    centred = [torch.where(batch.group_ids == 1, x - x[:4].mean(), 0) for x in (sample.rewards, action)]
    outcome, acted = (by_tokens(x, sample) for x in centred)
    torch.testing.assert_close(found.advantages, outcome + acted * acts)
