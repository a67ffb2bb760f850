"""What a task's actions are to a recipe that does not ask for them, where an expression of credit does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import trajkern as tk
from trajkern import credit
from trajkern.trainer import collect as collecting
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.models.policy import CharacterModel
from trajkern.trainer.models.transformer import ModelConfig
from trajkern.trainer.packing import pack_pieces
from trajkern.trainer.ranks import ALONE
from trajkern.trainer.setup import load_credit, load_system
from trajkern.trainer.systems.base import Played
from trajkern.trainer.tasks import Question, load_task

ACTING = credit.outcome() + credit.outcome("action", scale="none", singleton="zero").on("call")
QUESTION = Question("Fe+1=", "", "", {"calls": ["Fe", "26+1"], "answer": "27"})


def test_a_plain_recipe_knows_the_actions_of_a_task_that_marks_them() -> None:
    task, model = load_task("tools"), CharacterModel(ModelConfig(layers=1, width=32, heads=2, ffn=32))
    config = TrainConfig(task="tools", recipe="grpo", credit=f"{__name__}:ACTING")
    run = SimpleNamespace(
        config=config,
        system=load_system(config, task, model),
        spec=load_credit(config, task),
        policy=model,
        ranks=ALONE,
    )
    texts = ["<tool>Fe</tool>", "<tool>1/0</tool>7"]
    pieces = [[(model.prompt(QUESTION), False), (model.encode(text), True)] for text in texts]
    batch = pack_pieces(pieces, torch.tensor([0, 0]))
    batch = tk.PackedBatch(batch.tokens, batch.cu_seqlens, batch.loss_mask, batch.group_ids, torch.zeros(2))
    rollouts = collecting.known(run, Played([QUESTION] * 2, texts, batch), None, {})
    assert rollouts.reward("action").tolist() == [1.0, 0.0]
    call = [False] * 5 + [True] * 15 + [False] * 5 + [True] * 16 + [False]
    assert (rollouts.spans["call"].token_span >= 0).tolist() == call
    half = torch.tensor([0.5, -0.5]).repeat_interleave(batch.lengths)
    torch.testing.assert_close(run.spec(rollouts).advantages, half * torch.tensor(call))


def test_a_task_without_actions_is_refused_by_name() -> None:
    config = TrainConfig(task="chain_sum", recipe="grpo", credit=f"{__name__}:ACTING")
    with pytest.raises(ValueError, match="recipe grpo on the task chain_sum cannot give this credit: .*action"):
        load_credit(config, load_task("chain_sum"))
