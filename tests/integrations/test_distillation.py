"""One model of transformers distilled into another: the divergence and its gradients from their own logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

import trajkern as tk
from trajkern.integrations.transformers import head_arguments, hidden_states

transformers = pytest.importorskip("transformers")
KNOWN = 53  # ids of the tokenizer that both have; each weight is padded to a size of its own
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "Gemma2": {"vocab_size": 61, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "head_dim": 8},
    "Cohere": {"vocab_size": 59, "logit_scale": 0.25, "hidden_size": 24},
    "Granite": {"vocab_size": 64, "logits_scaling": 4.0},
    "Phi": {"vocab_size": 55},  # its head has a bias
}


def _model(name: str) -> Any:
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MODELS[name]})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    for x in model.parameters():
        x.data.mul_(4).add_(0.1 * torch.randn_like(x))  # no softmax nearly flat, no bias of 0
    return model.eval()


def _batch() -> tk.PackedBatch:
    tokens = torch.randint(KNOWN, (12,), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0, 1], dtype=torch.bool)
    return tk.PackedBatch(tokens, torch.tensor([0, 5, 12]), mask, torch.zeros(2, dtype=torch.int64))


def _own_logits(model: Any, batch: tk.PackedBatch) -> Tensor:  # [P, KNOWN]
    logits = torch.cat([model(x[None]).logits[0] for x in batch.tokens.split(batch.lengths.tolist())])
    return logits[batch.head_inputs().rows, :KNOWN]


def _gkd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """TRL's ``generalized_jsd_loss`` of each row of logits."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    if beta in (0, 1):
        pair = (student, teacher) if beta == 0 else (teacher, student)
        return kl_div(*pair, reduction="none", log_target=True).sum(-1)
    mixture = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
    parts = (kl_div(mixture, x, reduction="none", log_target=True).sum(-1) for x in (teacher, student))
    return sum(w * x for w, x in zip((beta, 1 - beta), parts, strict=True))


@pytest.mark.parametrize(
    ("student_name", "teacher_name", "beta"),
    [("Gemma2", "Cohere", 0.0), ("Cohere", "Granite", 1.0), ("Granite", "Phi", 0.25), ("Phi", "Gemma2", 0.5)],
)
def test_from_their_own_logits(student_name: str, teacher_name: str, beta: float) -> None:
    student, teacher, batch = _model(student_name), _model(teacher_name), _batch()
    rows = batch.head_inputs().rows
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, batch)[rows]
    actual = tk.linear_divergence(
        hidden_states(student, batch)[rows],
        teacher_hidden=teacher_hidden,
        **head_arguments(student),
        **{f"teacher_{name}": value for name, value in head_arguments(teacher).items()},
        vocabulary=KNOWN,
        temperature=0.9,
        beta=beta,
    )
    expected = _gkd(_own_logits(student, batch) / 0.9, _own_logits(teacher, batch).detach() / 0.9, beta)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    upstream = torch.linspace(-1, 1, len(actual), dtype=torch.float64)
    found, right = (torch.autograd.grad((x * upstream).sum(), [*student.parameters()]) for x in (actual, expected))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # the models' norms are in float32
    assert all(x.grad is None for x in teacher.parameters())
