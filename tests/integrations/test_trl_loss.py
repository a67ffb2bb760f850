"""The losses of TRL's trainers with every option: values, gradients and what is logged are TRL's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.trl_trainers import batch, trainer_of, trl
from trajkern.integrations._trl_loss import grpo_loss, read_logged, rloo_loss


def compared(trainer: Any, ours: Any, inputs: dict[str, Tensor]) -> None:
    """Loss, gradients and everything logged are TRL's."""
    base = trl.GRPOTrainer if ours is grpo_loss else trl.RLOOTrainer
    state = {name: getattr(trainer, name, None) for name in STATE}
    outcomes = []
    for function in (base._compute_loss, ours):
        vars(trainer).update(state)
        trainer._metrics["train"].clear()
        trainer._metrics["eval"].clear()
        loss = function(trainer, trainer.model, dict(inputs))
        grads = torch.autograd.grad(loss, [x for x in trainer.model.parameters() if x.requires_grad])
        read_logged(trainer)
        logged = {(mode, k): v for mode in ("train", "eval") for k, v in trainer._metrics[mode].items()}
        outcomes.append((loss.detach(), grads, logged))
    (loss, grads, logged), (our_loss, our_grads, our_logged) = outcomes
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grads, grads, rtol=1e-4, atol=1e-6)
    assert our_logged.keys() == logged.keys()
    for key, values in logged.items():
        assert our_logged[key] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), key


STATE = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")  # of an adaptive coefficient
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"beta": 0.0},
    "kl": {"args.use_bias_correction_kl": False},
    "sequence": {"importance_sampling_level": "sequence"},
    "corrected kl": {"args.use_bias_correction_kl": True},
    "sequence, corrected kl": {"importance_sampling_level": "sequence", "args.use_bias_correction_kl": True},
    "two-sided": {"args.delta": 1.5},
    "high entropy": {"top_entropy_quantile": 0.4},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "everything": {
        "top_entropy_quantile": 0.6,
        "off_policy_mask_threshold": 0.05,
        "_entropy_bonus_enabled": True,
        "entropy_coef": 0.03,
        "current_gradient_accumulation_steps": 3,
        "args.delta": 1.6,
    },
    "adaptive entropy": {
        "_entropy_bonus_enabled": True,
        "use_adaptive_entropy": True,
        "entropy_coef": 0.03,
        "_last_world_entropy": 0.1,
        "args.entropy_target": 2.0,
        "args.entropy_coef_delta": 0.01,
        "args.entropy_coef_max": 0.035,
        "_entropy_window_stats": None,
    },
    "sampler weights": {"use_vllm": True, "vllm_importance_sampling_correction": True, "beta": 0.0},
    "sequence sampler weights": {
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "importance_sampling_level": "sequence",
    },
}


def changed(trainer: Any, patch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    for name, value in options.items():
        owner, _, last = name.rpartition(".")
        patch.setattr(trainer.args if owner else trainer, last, value, raising=False)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_gradients_and_metrics_are_trl_s(
    loss_type: str, options: str, grpo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    high = 3.0 if loss_type == "cispo" else 0.3
    changed(grpo, monkeypatch, {"loss_type": loss_type, "epsilon_high": high, **OPTIONS[options]})
    compared(grpo, grpo_loss, batch("sequence sampler" in options))


def test_advantages_per_token_and_no_old_log_probs(grpo: Any) -> None:
    inputs = batch()
    inputs["advantages"] = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    compared(grpo, grpo_loss, inputs)
    del inputs["old_per_token_logps"], inputs["tool_mask"]
    compared(grpo, grpo_loss, inputs)


def test_evaluation_is_not_accumulated(grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.model, "training", False)
    for loss_type in ("grpo", "dapo"):
        changed(grpo, monkeypatch, {"current_gradient_accumulation_steps": 4, "loss_type": loss_type})
        compared(grpo, grpo_loss, batch())


def test_an_adaptive_coefficient_moves_as_trl_s(grpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over three steps, with the bounds met, and read once at the end."""
    changed(grpo, monkeypatch, {"loss_type": "grpo", "epsilon_high": 0.3, **OPTIONS["adaptive entropy"]})
    start, moved = {name: getattr(grpo, name) for name in STATE}, []
    for function in (trl.GRPOTrainer._compute_loss, grpo_loss):
        vars(grpo).update(start)
        grpo._metrics["train"].clear()
        for target in (9.0, 0.0, 9.0):
            monkeypatch.setattr(grpo.args, "entropy_target", target)
            function(grpo, grpo.model, batch())
        if function is grpo_loss:
            assert isinstance(grpo.entropy_coef, Tensor)
        read_logged(grpo)
        moved.append((*grpo._metrics["train"]["entropy_coef"], grpo.entropy_coef, grpo._last_world_entropy))
    assert moved[1] == pytest.approx(moved[0], rel=1e-6)
    assert isinstance(grpo.entropy_coef, float) and len({*moved[0][:3]}) > 1


def test_rloo_s_loss(tmp_path: Path) -> None:
    compared(trainer_of(tmp_path, "RLOO"), rloo_loss, batch())
