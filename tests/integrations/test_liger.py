"""Liger's fused GRPO loss: trajkern's beside its own, every loss type, on ragged padded batches."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from trajkern.integrations import liger as adapter

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
CASES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo", "temperature": 0.8},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 31},
    "two_sided": {"delta": 1.4, "epsilon_low": 0.1},
    "no_kl": {"beta": 0.0, "use_ref_model": False},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.05},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.4},
    "vespo": {"loss_type": "vespo", "vespo_k_neg": 2.5},
    "corrected": {"use_bias_correction_kl": True, "beta": 0.3},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.01, "epsilon_high": 0.02},
    "gspo_corrected": {"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "delta": 1.5},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.0, "epsilon_low": 0.01},
    "unused_reference": {"use_ref_model": False},
}


def _inputs(dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    rows, length, width, vocabulary = 5, 9, 16, 83

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    hidden, weight, bias = normal(rows, length, width), 0.4 * normal(vocabulary, width), 0.3 * normal(vocabulary)
    targets = torch.randint(0, vocabulary, (rows, length), generator=g)
    mask = (torch.arange(length) < torch.tensor([9, 4, 0, 6, 1])[:, None]).long()
    mask[0, 3] = 0
    new = (hidden @ weight.t() + bias).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    tensors = {
        "_input": hidden.to(dtype),
        "lin_weight": weight.to(dtype),
        "selected_token_ids": targets,
        "attention_mask": mask,
        "advantages": normal(rows),
        "bias": bias.to(dtype),
        "ref_per_token_logps": new + 0.3 * normal(rows, length),
        "old_per_token_logps": new + 0.3 * normal(rows, length),
    }
    return tensors, (0.4 * normal(rows, length)).exp()


def _result(loss: torch.nn.Module, inputs: dict, **more):
    leaves = {k: inputs[k].clone().requires_grad_() for k in ("_input", "lin_weight", "bias") if inputs[k] is not None}
    value, metrics = loss(**inputs | leaves | more)
    (1.5 * value).backward()
    return [value.detach(), *(leaf.grad for leaf in leaves.values())], metrics


def _compare(options: dict, inputs: dict, **more) -> None:
    ours, our_metrics = _result(adapter.LigerFusedLinearGRPOLoss(**options), inputs, **more)
    theirs, their_metrics = _result(chunked_loss.LigerFusedLinearGRPOLoss(compiled=False, **options), inputs, **more)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=5e-5, atol=2e-6)
    assert len(our_metrics) == len(their_metrics)
    for x, y in zip(our_metrics, their_metrics, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_loss(name: str) -> None:
    inputs, ratio = _inputs()
    options = CASES[name]
    _compare(options, inputs)
    _compare(options, inputs | {"bias": None}, num_items_in_batch=torch.tensor(57))
    _compare(options, inputs | {"old_per_token_logps": None})
    if name != "vespo":
        _compare(options, inputs, vllm_is_ratio=ratio[:, :1], num_items_in_batch=40.0)
    if name not in ("vespo", "luspo"):
        _compare(options, inputs, vllm_is_ratio=ratio)


def test_reference_from_its_hidden_states() -> None:
    inputs, _ = _inputs()
    inputs["ref_per_token_logps"] = None
    g = torch.Generator().manual_seed(1)
    head = {"ref_input": torch.randn(5, 9, 16, generator=g), "ref_weight": torch.randn(83, 16, generator=g)}
    _compare({"temperature": 0.9}, inputs, **head)
    _compare({"beta": 0.5}, inputs, **head, ref_bias=torch.randn(83, generator=g))
    with pytest.raises(ValueError, match="ref_per_token_logps, or ref_input and ref_weight, must be given"):
        adapter.LigerFusedLinearGRPOLoss()(**inputs)


def test_mixed_dtypes_and_no_grad() -> None:
    """A float32 head under bfloat16 hidden states, as autocast leaves them, runs in bfloat16 as in Liger."""
    inputs, _ = _inputs(torch.bfloat16)
    inputs |= {k: inputs[k].float() for k in ("lin_weight", "bias")}
    ours, _ = _result(adapter.LigerFusedLinearGRPOLoss(), inputs)
    exact, _ = _result(
        adapter.LigerFusedLinearGRPOLoss(), {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    )
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    for x, y in zip(ours, exact, strict=True):
        assert (x.float() - y).norm() <= 0.02 * y.norm()
    with torch.no_grad():
        value, _ = adapter.LigerFusedLinearGRPOLoss()(**inputs)
    torch.testing.assert_close(value, ours[0])


def test_enable_and_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = chunked_loss.LigerFusedLinearGRPOLoss
    user = type(sys)("grpo_trainer")
    user.LigerFusedLinearGRPOLoss = theirs
    monkeypatch.setitem(sys.modules, adapter.HOLDERS[2], user)
    try:
        adapter.enable()
        with adapter.enable() as handle:
            for holder in adapter.HOLDERS:
                assert sys.modules[holder].LigerFusedLinearGRPOLoss is adapter.LigerFusedLinearGRPOLoss
            assert repr(handle).startswith("<Liger-Kernel: trajkern stands in for LigerFusedLinearGRPOLoss of liger_k")
        assert all(sys.modules[holder].LigerFusedLinearGRPOLoss is theirs for holder in adapter.HOLDERS)
    finally:
        adapter.disable()
    adapter.disable()
    assert all(sys.modules[holder].LigerFusedLinearGRPOLoss is theirs for holder in adapter.HOLDERS)
    monkeypatch.setattr("trajkern.integrations._adapter.version", lambda _: "1.0")
    with pytest.warns(UserWarning, match=r"tested with liger-kernel 0\.8\.5, not with 1\.0"):
        adapter.enable()
    adapter.disable()
    monkeypatch.setattr(theirs, "forward", lambda self, _input, lin_weight, labels: None)
    with pytest.raises(
        RuntimeError, match=r"LigerFusedLinearGRPOLoss.forward must take \(_input, lin_weight, selected"
    ):
        adapter.enable()


BAD = [
    ({"loss_type": "ppo"}, "loss_type must be one of"),
    ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "must be 'token' for loss_type 'sapo'"),
    ({"importance_sampling_level": "turn"}, "importance_sampling_level must be one of"),
    ({"loss_type": "luspo"}, "'luspo' must have importance_sampling_level 'sequence' and beta 0"),
    ({"loss_type": "dr_grpo"}, "max_completion_length must be given"),
    ({"loss_type": "cispo"}, "epsilon_high must be at least 1 for loss_type 'cispo'"),
    ({"delta": 1.1}, r"delta must be at least 1 \+ epsilon_high = 1.2, got 1.1"),
    ({"sapo_temperature_neg": 0.0}, "sapo_temperature_neg must be"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.LigerFusedLinearGRPOLoss(**options)


def test_bad_arguments() -> None:
    inputs, ratio = _inputs()
    for options, change, message in (
        ({}, {"_input": inputs["_input"].flatten(0, 1)}, r"_input must have shape \[5, 9, 'H'\], got \[45, 16\]"),
        ({}, {"old_per_token_logps": ratio[:, :4]}, "old_per_token_logps must have the mask's shape"),
        ({}, {"vllm_is_ratio": ratio[:, :4]}, r"vllm_is_ratio must have shape \(5, 1\) or \(5, 9\)"),
        ({}, {"advantages": ratio}, r"advantages must have 1 dimension; got float32\[5, 9\]"),
        (CASES["luspo"], {"vllm_is_ratio": ratio}, r"vllm_is_ratio must have shape \(5, 1\), got"),
        (CASES["vespo"], {"vllm_is_ratio": ratio}, "vllm_is_ratio must be None for loss_type 'vespo'"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.LigerFusedLinearGRPOLoss(**options)(**inputs | change)


def test_page() -> None:
    """The blocks of docs/liger.md run in order; both ways to the class give the loss of Liger's."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "liger.md").read_text()
    before, after, patched = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    exec(before, names)
    theirs, gradient = names["loss"].detach(), names["hidden"].grad.clone()
    names["hidden"].grad = None
    exec(after, names)
    torch.testing.assert_close(names["loss"].detach(), theirs)
    torch.testing.assert_close(names["hidden"].grad, gradient)
    del names["LigerFusedLinearGRPOLoss"]
    exec(patched, names)
    assert names["LigerFusedLinearGRPOLoss"] is adapter.LigerFusedLinearGRPOLoss
    assert chunked_loss.LigerFusedLinearGRPOLoss is not adapter.LigerFusedLinearGRPOLoss
