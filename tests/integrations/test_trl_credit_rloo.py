"""Credits and recipes in TRL's RLOOTrainer: one value a rollout, beside its KL and its bounds of the reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")

import trajkern as tk  # noqa: E402
from tests.integrations.trl_trainers import generated, length_reward, trainer_of, trl, won  # noqa: E402
from trajkern import credit  # noqa: E402
from trajkern.integrations import trl as adapter  # noqa: E402

SIZES = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2, "learning_rate": 0.1}


@pytest.fixture(autouse=True)
def nothing_left():
    """Whatever a test enables is gone behind it."""
    yield
    for target in list(adapter._enabled):
        adapter.disable(target)


def rloo(folder: Path, rewards: Any, seed: int = 0, **options: Any) -> Any:
    """A trainer whose policy is not its reference."""
    trainer = trainer_of(folder, "RLOO", rewards=rewards, beta=0.5, **{**SIZES, **options})
    g = torch.Generator().manual_seed(seed)
    for x in trainer.model.parameters():
        x.data.add_(0.3 * torch.randn(x.shape, generator=g))
    trainer.model.train()
    return trainer


def some_scored(completions: list[str], **_: Any) -> list[float | None]:
    return [None if len(x) % 3 == 0 else float(len(set(x))) for x in completions]


LEAVE_ONE_OUT: dict[str, Any] = {"baseline": "leave_one_out", "scale": "none", "singleton": "zero"}


def left_out(rollouts: adapter.Rollouts) -> Tensor:
    scored = ~rollouts.rewards.isnan()
    return tk.group_advantages(rollouts.rewards, rollouts.group_ids, gate=scored, **LEAVE_ONE_OUT)[rollouts.here]


@pytest.mark.parametrize("by", [{"credit": credit.outcome(**LEAVE_ONE_OUT)}, {"recipe": left_out}])
def test_rloo_s_own_advantages(by: dict[str, Any], tmp_path: Path) -> None:
    """With its KL and its bounds of the reward, and completions that nobody could score."""
    trainer = rloo(tmp_path, some_scored, reward_clip_range=(2.0, 4.0))
    theirs = generated(trainer)
    assert float(theirs["advantages"].std()) > 0.5
    adapter.enable(trainer, **by)
    ours = generated(trainer)
    assert torch.equal(ours["completion_ids"], theirs["completion_ids"])
    torch.testing.assert_close(ours["advantages"], theirs["advantages"], rtol=1e-4, atol=1e-4)
    assert "tool_mask" not in ours and "_get_per_token_logps_and_entropies" not in vars(trainer)


def test_rloo_counts_who_is_kept(tmp_path: Path) -> None:
    """The KL does not turn a failure into a success, and who is left out is in no mean."""
    trainer = rloo(tmp_path, won, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    adapter.enable(trainer, "nsr")
    made = generated(trainer)
    rewards = torch.tensor(won(trainer.processing_class.batch_decode(made["completion_ids"], skip_special_tokens=True)))
    keep = rewards == 0
    assert 0 < int(keep.sum()) < 8 and torch.equal(made["advantages"] != 0, keep)
    trainer.current_gradient_accumulation_steps = 2
    made["old_logps"] = made["old_logps"] + 0.1 * torch.randn(8, generator=torch.Generator().manual_seed(1))
    halves = [{k: x[i : i + 4] if x.ndim else x for k, x in made.items()} for i in (0, 4)]
    loss = sum(trainer._compute_loss(trainer.model, half) for half in halves) / 2  # the trainer divides
    ids = torch.cat((made["prompt_ids"], made["completion_ids"]), 1)
    mask = torch.cat((made["prompt_mask"], made["completion_mask"]), 1)
    logits = trainer.model(ids, attention_mask=mask).logits.double()
    length = made["completion_ids"].shape[1]
    new = logits[:, -length - 1 : -1].log_softmax(2).gather(2, made["completion_ids"][..., None])[..., 0]
    ratio = ((new * made["completion_mask"]).sum(1) - made["old_logps"]).exp()
    a = made["advantages"]
    terms = -torch.minimum(ratio * a, ratio.clamp(1 - trainer.epsilon_low, 1 + trainer.epsilon_high) * a)
    torch.testing.assert_close(loss.double(), terms[keep].mean(), rtol=1e-5, atol=1e-6)


def test_rloo_takes_one_value_a_rollout(tmp_path: Path) -> None:
    trainer = rloo(tmp_path, [won, length_reward], reward_weights=[1.0, 0.5])
    whole = (credit.outcome() - 0.5 * credit.outcome("length_reward", within="batch")).whiten().clip(-1, 1)
    adapter.enable(trainer, credit=whole)
    assert generated(trainer)["advantages"].shape == (8,)
    for spec, says in (
        (credit.outcome() + credit.spans("turn", reward=turn_lengths), r"credit.spans\('turn', reward="),
        (credit.directive(), r"credit.directive\(\)"),
        (credit.outcome().on("turn"), r"credit.outcome\(\).on\('turn'\)"),
        (2 * credit.outcome().only("turn"), r"credit.outcome\(\).only\('turn'\)"),
        (credit.recipe("delta_belief"), "OfTurns"),
    ):
        for target in (trainer, trl.RLOOTrainer):
            with pytest.raises(ValueError, match=f"one value a rollout for RLOOTrainer; .*{says}.* differs inside"):
                adapter.enable(target, credit=spec)
    for by in ({"recipe": "psr"}, {"recipe": left_out}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "normalize_advantages", True)
            with pytest.raises(ValueError, match="normalize_advantages must be False"):
                adapter.enable(trainer, **by)
    adapter.enable(trainer, lambda rollouts: torch.zeros(rollouts.completion_mask.shape))
    with pytest.raises(ValueError, match=r"recipe must return advantages of shape \[8\]; got"):
        generated(trainer)


def turn_lengths(rollouts: credit.Rollouts) -> Tensor:
    return rollouts.spans["turn"].lengths.float()
