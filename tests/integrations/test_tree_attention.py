"""Trees through transformers' flash attention, whose kernel is a plain function of the same signature here."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from tests.integrations.flash_reference import of_lengths, of_rows
from trajkern.integrations.transformers import log_probs

transformers = pytest.importorskip("transformers")
V = 37
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
}


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = transformers.modeling_flash_attention_utils
    loaded = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": of_rows,
        "_flash_varlen_fn": of_lengths,
        "_pad_fn": utils._pad_input,
        "_unpad_fn": utils._unpad_input,
        "_process_flash_kwargs_fn": utils._lazy_define_process_function(of_lengths),
    }
    for name, value in loaded.items():
        monkeypatch.setattr(utils, name, value, raising=False)


def pair(name: str) -> tuple[Any, Any]:
    """The same weights in float64 by flash attention, and eager."""
    models = []
    for attention in ("flash_attention_2", "eager"):
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for x in model.parameters():
            x.data.mul_(3)
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):  # the host's own is in float32 whatever the model is in
                module.forward = functools.partial(_norm, module, float(name == "Gemma2"))
        model.config._attn_implementation = attention
        models.append(model.double().eval())
    return models[0], models[1]


def _norm(module: Any, plus: float, x: Tensor) -> Tensor:
    epsilon = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (module.weight + plus)


def forest() -> tuple[tk.Tree, Tensor]:
    """Two roots; a node without tokens, a chain longer than the sliding windows."""
    tree = tk.Tree(torch.tensor([-1, 0, 0, 1, 1, -1, 5]), torch.tensor([4, 3, 2, 0, 6, 2, 7]))
    return tree, torch.randint(1, V, (tree.num_tokens,), generator=torch.Generator().manual_seed(2))


def alone(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_a_tree_has_each_rollout_s_own_log_probs_and_gradients(name: str, flash: None) -> None:
    (model, eager), (tree, tokens) = pair(name), forest()
    logprobs = log_probs(model, tree, tokens)
    bounds = tree.flat_cu_seqlens.tolist()
    paths = [tree.flat_index[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
    ours = torch.cat([logprobs[path][1:] for path in paths])
    g = torch.randn(len(ours), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = torch.autograd.grad((ours * g).sum(), list(model.parameters()))
    for other, close in ((model, 1e-9), (eager, 2e-5)):  # eager attention takes its softmax in float32
        theirs = torch.cat([alone(other, tokens[path]) for path in paths])
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close / 10)
        own = torch.autograd.grad((theirs * g).sum(), list(other.parameters()))
        torch.testing.assert_close(gradients, own, rtol=10 * close, atol=10 * close)


def test_one_call_a_layer_over_the_segments_paths(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a pack runs over its own boundaries, and the model itself, as if nothing had been registered."""
    model, (tree, tokens) = pair("Llama")[0], forest()
    seen: list[tuple[int, ...]] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Tensor:
        seen.append((len(q), len(k), options["max_seqlen_q"], options["max_seqlen_k"], len(cu_seqlens_q)))
        return of_lengths(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)

    monkeypatch.setattr(transformers.modeling_flash_attention_utils, "_flash_varlen_fn", noted)
    log_probs(model, tree, tokens, check=False)
    assert seen == [(24, 4 + 7 + 6 + 13 + 2 + 9, 7, 13, 7)] * 2
    seen.clear()
    batch = tk.PackedBatch(
        tokens, torch.tensor([0, 9, 24]), torch.arange(24).remainder(9) > 0, torch.zeros(2, dtype=torch.long)
    )
    packed = log_probs(model, batch, check=False)
    assert seen == [(24, 24, 15, 15, 3)] * 2
    torch.testing.assert_close(packed[1:9], alone(model, tokens[:9]), rtol=1e-9, atol=1e-10)


def test_checkpointing_computes_the_same_again(flash: None) -> None:
    gradients = []
    for checkpointed in (False, True):
        model, (tree, tokens) = pair("Llama")[0].train(), forest()
        if checkpointed:
            model.gradient_checkpointing_enable()
        log_probs(model, tree, tokens).sum().backward()
        gradients.append([x.grad for x in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.slow
def test_layers_compile_whole(flash: None) -> None:
    model, (tree, tokens) = pair("Mistral")[0], forest()
    expected = log_probs(model, tree, tokens)
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    actual = log_probs(model, tree, tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    actual.sum().backward()


def test_kernels_of_the_hub_are_flash_attention_too(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    host = transformers.integrations.flash_attention.flash_attention_forward
    interface = transformers.modeling_utils.AttentionInterface
    name, utils = "somebody/flash-attn9", transformers.modeling_flash_attention_utils
    model, (tree, tokens) = pair("Llama")[0], forest()
    expected = log_probs(model, tree, tokens, check=False)
    monkeypatch.setitem(interface._global_mapping, name, host)
    monkeypatch.setattr(utils, "_loaded_implementation", name, raising=False)
    model.config._attn_implementation = name
    torch.testing.assert_close(log_probs(model, tree, tokens, check=False), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda m: setattr(m.config, "layer_types", ["full_attention", "linear_attention"]),
            "'linear_att.*would carry",
        ),
        (lambda m: setattr(m.config, "layers_block_type", ["mamba", "attention"]), r"it has \['mamba'\] layers, which"),
        (lambda m: setattr(m, "_is_stateful", True), "LlamaForCausalLM is recurrent, which would carry"),
        (lambda m: setattr(m.config, "attention_chunk_size", 8), "its config has attention_chunk_size=8"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_what_no_tree_can_run_is_refused_by_name(
    change: Callable[[Any], None], message: str, check: bool, flash: None
) -> None:
    model = pair("Llama")[0]
    change(model)
    with pytest.raises(ValueError, match=f"to run a Tree; .*{message}"):
        log_probs(model, *forest(), check=check)


def test_a_model_with_calls_of_its_own_is_refused(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair("Llama")[0]
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with pytest.raises(
        ValueError, match="AttentionInterface to run a Tree by flash attention; LlamaForCausalLM does not"
    ):
        log_probs(model, *forest(), check=False)


def test_an_old_flash_attention_is_refused(flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = transformers.modeling_flash_attention_utils
    monkeypatch.setattr(utils, "flash_attn_supports_top_left_mask", lambda: True)
    with pytest.raises(ValueError, match="flash-attn must be at least 2.1 to run a Tree"):
        log_probs(pair("Llama")[0], *forest())
