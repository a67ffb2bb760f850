"""TRL with adapters on the embedding: enabled, and trained as TRL alone trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from tests.integrations.trl_trainers import tiny, trainer_of  # noqa: E402
from trajkern.integrations import trl as adapter  # noqa: E402

ADAPTERS: dict[str, dict[str, Any]] = {
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2, 3]},
    "LoRA on the embedding": {"target_modules": ["embed_tokens"]},
    "a saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapted_embedding_trains_as_in_trl_alone(name: str, tmp_path: Path) -> None:
    trained = []
    for ours in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny(), peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[name]))
        before = {k: x.detach().clone() for k, x in model.named_parameters() if x.requires_grad}
        trainer = trainer_of(tmp_path, model=model, max_steps=1)
        if ours:
            adapter.enable(trainer)
        trainer.train()
        adapter.disable(trainer)
        trained.append({k: x.detach() - before[k] for k, x in trainer.model.named_parameters() if k in before})
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-5)
    assert any(x.abs().max() > 1e-4 for x in trained[1].values())


def test_a_tokenizer_larger_than_an_adapted_embedding_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(tiny(), peft.LoraConfig(task_type="CAUSAL_LM", **ADAPTERS["trained tokens"]))
    trainer = trainer_of(tmp_path, model=model)
    trainer.processing_class.add_tokens([f"new{i}" for i in range(9)])
    with pytest.raises(ValueError, match="processing_class must have tokens that the model has"):
        adapter.enable(trainer)
