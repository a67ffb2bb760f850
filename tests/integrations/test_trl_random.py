"""A sample of the random cases of TRL's losses, and those that once were otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integrations.trl_random import Case, drawn, fault, trainers
from tests.integrations.trl_trainers import batch
from trajkern.integrations import trl as adapter


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return dict(trainers())


@pytest.mark.parametrize("kind, first", [*(("GRPO", n) for n in range(0, 100, 20)), ("RLOO", 0)])
def test_random_options_and_batches(kind: str, first: int, made: dict[str, Any]) -> None:
    found = [(case, fault(made[kind], case)) for case in (drawn(kind, n) for n in range(first, first + 20))]
    assert not [f"{fault}: {case}" for case, fault in found if fault]
    assert sum(x is None for _, x in found) >= 10


def one_token(mask: list[int]) -> dict[str, Any]:
    rows = len(mask)
    return {
        "prompt_ids": torch.full((rows, 2), 5),
        "prompt_mask": torch.ones(rows, 2, dtype=torch.long),
        "completion_ids": torch.full((rows, 1), 7),
        "completion_mask": torch.tensor(mask)[:, None],
        "advantages": torch.linspace(-1, 1, rows),
        "old_logps": torch.full((rows,), -3.3),
        "old_per_token_logps": torch.full((rows, 1), -3.3),
        "num_items_in_batch": torch.tensor(2.0),
    }


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("mask", [[1, 0, 0, 0], [1, 1], [0, 0]])
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_completions_of_one_token(kind: str, mask: list[int], later: bool, made: dict[str, Any]) -> None:
    """RLOOTrainer's means are of tokens all the same; GRPOTrainer's then are of completions."""
    assert fault(made[kind], Case(kind, {"epsilon_low": 0.1, "beta": 0.0}, one_token(mask), True, later)) is None


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo"])
def test_what_is_logged_of_a_ratio_bounded_where_the_band_ends(
    loss_type: str, level: str, made: dict[str, Any]
) -> None:
    options = {"loss_type": loss_type, "importance_sampling_level": level, "args.delta": 1.2, "epsilon_high": 0.2}
    inputs = batch() | {"old_per_token_logps": torch.full((5, 7), -5.0)}
    assert fault(made["GRPO"], Case("GRPO", options, inputs, True, False)) is None


@pytest.mark.parametrize("outside", [1.0, 0.9, 0.0])
def test_vespo_s_weight_where_its_bounds_are_met(outside: float, made: dict[str, Any]) -> None:
    """Bounds of the sampler's ratio that 1 does not keep make it another outside of the mask as well."""
    options = {"loss_type": "vespo", "args.vespo_k_pos": 0.5, "args.vespo_k_neg": 0.5}
    for shift in (-9.0, 0.0, 9.0):
        inputs = batch()
        mask = inputs["completion_mask"] * inputs["tool_mask"] > 0
        inputs["importance_sampling_ratio"] = torch.where(mask, inputs["importance_sampling_ratio"], outside)
        inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + shift
        assert fault(made["GRPO"], Case("GRPO", options, inputs, True, False)) is None, shift


@pytest.mark.parametrize(
    "kind, name, value",
    [
        ("GRPO", "loss_type", "gspo"),
        ("GRPO", "importance_sampling_level", None),
        ("GRPO", "epsilon_low", None),
        ("GRPO", "epsilon_high", "0.2"),
        ("GRPO", "args.delta", "2"),
        ("GRPO", "max_completion_length", None),
        ("RLOO", "epsilon_high", -0.1),
        ("RLOO", "epsilon_low", None),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_options_that_are_none(kind: str, name: str, value: Any, later: bool, made: dict[str, Any]) -> None:
    """At the next step where they are set behind ``enable``."""
    trainer = made[kind]
    owner, last = (trainer.args, name[5:]) if name.startswith("args.") else (trainer, name)
    kept, loss_type = getattr(owner, last), getattr(trainer, "loss_type", None)
    try:
        if last == "max_completion_length":
            trainer.loss_type = "dr_grpo"
        if later:
            adapter.enable(trainer)
        setattr(owner, last, value)
        with pytest.raises((ValueError, TypeError), match=f"^{last} must "):
            if not later:
                adapter.enable(trainer)
            trainer._compute_loss(trainer.model, batch())
    finally:
        setattr(owner, last, kept)
        trainer.loss_type = loss_type
        adapter.disable(trainer)
