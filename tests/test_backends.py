"""use_backend and backends: unknown, missing and unsuitable backends, and what to install."""

from __future__ import annotations

import re

import pytest
import torch

import trajkern as tk
from trajkern import _backends, _ext

TOKENS, CU_SEQLENS = torch.zeros(4), torch.tensor([0, 4])
ARGUMENTS = {
    "token_logprobs": {"logits": torch.zeros(2, 5), "targets": torch.zeros(2, dtype=torch.int64)},
    "group_advantages": {"rewards": torch.ones(2), "group_ids": torch.zeros(2, dtype=torch.int64)},
    "gae": {"rewards": TOKENS, "values": TOKENS, "cu_seqlens": CU_SEQLENS},
    "policy_loss": {
        "logprobs": TOKENS,
        "old_logprobs": TOKENS,
        "advantages": torch.ones(1),
        "cu_seqlens": CU_SEQLENS,
        "config": tk.PolicyLoss(),
    },
}


@pytest.mark.parametrize("name", ["gpu", "", None, "Native"])
def test_unknown_name(name) -> None:
    expected = rf"name must be one of 'reference', 'native', 'triton', 'cuda'; got {name!r}"
    with pytest.raises(ValueError, match=expected), tk.use_backend(name):
        pass


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("native", r"pip install \.` with a C\+\+17 compiler"),
        ("cuda", r"install nvcc, then `TRAJKERN_CUDA=1 pip install \.`"),
    ],
)
def test_not_built(monkeypatch: pytest.MonkeyPatch, name: str, advice: str) -> None:
    monkeypatch.setattr(_ext, "problem", lambda module: f"No module named 'trajkern.{module}'")
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: .*No module named.*{advice}"):
        with tk.use_backend(name):
            pass
    assert re.search(advice, tk.backends()[name])


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend 'triton' is not available: .*`pip install triton`"):
        with tk.use_backend("triton"):
            pass


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_ext, "problem", lambda module: None)
    monkeypatch.setattr(_backends, "_has_triton", lambda: True)
    monkeypatch.setattr(_backends, "_interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available: no CUDA device"):
        with tk.use_backend(name):
            pass


@pytest.mark.parametrize(
    ("name", "function", "text"),
    [
        ("triton", "token_logprobs", r"backend 'triton' runs on cuda tensors, got cpu tensors"),
        ("cuda", "group_advantages", r"backend 'cuda' runs on cuda tensors, got cpu tensors"),
        ("cuda", "policy_loss", r"backend 'cuda' has no policy_loss kernels; it is one of .*'native', 'triton'"),
        ("triton", "gae", r"backend 'triton' has no advantage kernels; it is one of .*'cuda', 'native'"),
    ],
)
def test_wrong_for_the_tensors(monkeypatch: pytest.MonkeyPatch, name: str, function: str, text: str) -> None:
    monkeypatch.setattr(_backends, "_unavailable", lambda name: None)
    monkeypatch.setattr(_backends, "_interpreted", lambda: False)
    with tk.use_backend(name), pytest.raises(RuntimeError, match=text):
        getattr(tk, function)(**ARGUMENTS[function])


def test_the_choice_ends_with_the_block() -> None:
    before = _backends._asked
    with pytest.raises(KeyError), tk.use_backend("reference"):
        with tk.use_backend("reference"):
            pass
        assert _backends._asked == "reference"
        raise KeyError
    assert _backends._asked is before
