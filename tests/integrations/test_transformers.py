"""Causal language models of transformers on packed batches and trees, beside their own forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern.integrations.transformers import causal_model, head_arguments, hidden_states, log_probs, token_stats

transformers = pytest.importorskip("transformers")
V = 61
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
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "Gemma3Text": {"final_logit_softcapping": 2.0, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "Mistral": {"sliding_window": 5},
    "Qwen3Moe": EXPERTS,
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
}


def tiny(name: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.split()[0]}Config")(**{**SMALL, **MODELS[name]})
    attention = "eager" if name == "Gemma2" else attention  # it caps the attention's logits, too
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for x in model.parameters():
        x.data.mul_(3)  # so that no softmax is nearly flat
    return model.eval()


def packed(lengths: tuple[int, ...] = (9, 1, 0, 14, 5)) -> tk.PackedBatch:
    g = torch.Generator().manual_seed(1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.rand(int(bounds[-1]), generator=g) < 0.7
    mask[bounds[:-1][bounds.diff() > 0]] = False
    return tk.PackedBatch(
        torch.randint(V, (int(bounds[-1]),), generator=g), bounds, mask, torch.zeros(len(lengths), dtype=torch.long)
    )


def forest() -> tuple[tk.Tree, Tensor]:
    """Two roots; a node without tokens, a chain longer than the sliding windows."""
    tree = tk.Tree(torch.tensor([-1, 0, 0, 1, 1, -1, 5]), torch.tensor([4, 3, 2, 0, 6, 2, 7]))
    return tree, torch.randint(V, (tree.num_tokens,), generator=torch.Generator().manual_seed(2))


def alone(model: Any, tokens: Tensor) -> Tensor:
    """log p of every token but the first, by the model's own logits of one sequence."""
    logits = model(tokens[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


def of_batch(model: Any, batch: tk.PackedBatch) -> Tensor:
    bounds = batch.cu_seqlens.tolist()
    parts = [batch.tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
    every = torch.cat([torch.cat((torch.zeros(1), alone(model, x))) for x in parts])
    return torch.where(batch.loss_mask, every, 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_has_each_trajectory_s_own_log_probs_and_gradients(name: str) -> None:
    model, batch = tiny(name), packed()
    g = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(3))
    actual, expected = log_probs(model, batch), of_batch(model, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((actual * g).sum(), parameters, allow_unused=True),
        torch.autograd.grad((expected * g).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_tree_has_each_rollout_s_own_log_probs(name: str, attention: str) -> None:
    model, (tree, tokens) = tiny(name, attention), forest()
    logprobs = log_probs(model, tree, tokens)
    bounds = tree.flat_cu_seqlens.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        path = tree.flat_index[a:b]
        torch.testing.assert_close(logprobs[path][1:], alone(model, tokens[path]), rtol=1e-4, atol=1e-5)
    assert logprobs[tree.rows < 0].eq(0).all()


def test_a_tree_s_mask_chooses_its_tokens() -> None:
    model, (tree, tokens) = tiny("Llama"), forest()
    mask = (torch.arange(tree.num_tokens) % 3 == 1) & (tree.rows >= 0)
    logprobs = log_probs(model, tree, tokens, mask)
    torch.testing.assert_close(logprobs, torch.where(mask, log_probs(model, tree, tokens), 0))


def test_entropy_and_temperature() -> None:
    model, batch = tiny("Gemma2"), packed((6,))
    stats = token_stats(model, batch, temperature=0.7)
    p = (model(batch.tokens[None]).logits[0, :-1] / 0.7).log_softmax(-1)
    assert stats.entropy is not None
    torch.testing.assert_close(stats.entropy[1:][batch.loss_mask[1:]], -(p.exp() * p).sum(1)[batch.loss_mask[1:]])
    assert stats.entropy[~batch.loss_mask].eq(0).all()


def test_the_halves_make_the_policy_loss() -> None:
    model, batch = tiny("Llama"), packed()
    rows, targets, tokens, cu_seqlens = batch.head_inputs()
    old = log_probs(model, batch).detach()
    loss, _ = tk.linear_policy_loss(
        hidden_states(model, batch),
        targets=targets,
        rows=rows,
        old_logprobs=old[tokens],
        cu_seqlens=cu_seqlens,
        advantages=torch.ones(5),
        config=tk.PolicyLoss("grpo"),
        **head_arguments(model),
    )
    torch.testing.assert_close(loss, torch.tensor(-1.0), rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed = tiny("Llama").train(), tiny("Llama").train()
    checkpointed.gradient_checkpointing_enable()
    grads = []
    for model in (plain, checkpointed):
        log_probs(model, packed()).sum().backward()
        grads.append([x.grad for x in model.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_autocast_is_the_model_s_own() -> None:
    model, batch = tiny("Llama"), packed()
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = log_probs(model, batch), of_batch(model, batch)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs(model, batch).sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in model.parameters())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_lora(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("Llama"), peft.LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    batch = packed()
    actual, expected = log_probs(model, batch), of_batch(model, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    trained = [x for x in model.parameters() if x.requires_grad]
    ours, theirs = (torch.autograd.grad(x.sum(), trained) for x in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(log_probs(model, batch), of_batch(model, batch), rtol=1e-4, atol=1e-5)


def test_wrappers_are_looked_through() -> None:
    model = tiny("Llama")
    assert causal_model(torch.nn.DataParallel(model)) is model


def test_an_attention_over_boundaries_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention needs a GPU: here its arguments are seen, and the pack runs by a mask."""
    model, batch = tiny("Llama"), packed()
    seen: dict[str, Any] = {}

    def forward(self: Any, input_ids: Tensor, position_ids: Tensor, **options: Any) -> Any:
        seen.update(options, positions=position_ids)
        raise InterruptedError

    monkeypatch.setattr(type(model.model), "forward", forward)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InterruptedError):
        log_probs(model, batch, check=False)
    assert seen["cu_seq_lens_q"].tolist() == seen["cu_seq_lens_k"].tolist() == [0, 9, 10, 10, 24, 29]
    assert seen["max_length_q"] == seen["max_length_k"] == 14
    assert seen["positions"][0, 9:12].tolist() == [0, 0, 1]


def test_nothing_to_score() -> None:
    model, empty = tiny("Llama"), packed((0, 0))
    assert log_probs(model, empty).shape == (0,) and hidden_states(model, empty).shape == (0, 32)
    assert log_probs(model, packed((1, 1))).tolist() == [0, 0]


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda m: log_probs(m, forest()[0]), ValueError, "tokens must be given for a Tree"),
        (lambda m: log_probs(m, packed(), torch.ones(29).long()), ValueError, "must be None for a PackedBatch"),
        (lambda m: log_probs(m, torch.ones(3)), TypeError, "layout must be a PackedBatch or a Tree, got Tensor"),
        (lambda m: log_probs(torch.nn.Linear(2, 2), packed()), TypeError, "causal language model of transformers"),
        (lambda m: log_probs(m.model, packed()), TypeError, "LlamaModel has none"),
        (
            lambda m: log_probs(m, forest()[0], forest()[1] + V),
            ValueError,
            r"tokens must lie in \[0, 61\), the model's vocabulary; token 0 is .*this model's tokenizer",
        ),
        (lambda m: log_probs(m, forest()[0], forest()[1][:3]), ValueError, r"tokens must have shape \[24\]"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(tiny("Llama"))


def test_a_tree_needs_an_attention_with_a_mask_or_over_boundaries() -> None:
    model = tiny("Llama")
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match="eager, sdpa, flex_attention, or flash attention, .* got 'paged|eager'"):
        log_probs(model, *forest())


ROPE: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 16,
    },
}


def of_lengths(*lengths: int) -> tk.PackedBatch:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(5, V, (int(bounds[-1]),), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(len(tokens), dtype=torch.bool).index_fill(0, bounds[:-1], False)
    return tk.PackedBatch(tokens, bounds, mask, torch.zeros(len(lengths), dtype=torch.long))


@pytest.mark.parametrize(("attention", "dtype"), [("eager", torch.float32), ("sdpa", torch.float64), ("eager", None)])
def test_padding_beyond_a_window_is_no_nan(attention: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SMALL, sliding_window=5, attn_implementation=attention)
    model = transformers.MistralForCausalLM(config).to(dtype or torch.float64)
    if dtype is None:
        with pytest.raises(ValueError, match="layout must have .*ends at sliding_window=5.*from 2 to 7: .*'sdpa'"):
            log_probs(model, of_lengths(7, 2))
    for lengths in [(7, 7)] + ([(7, 3)] if dtype is None else [(7, 2), (20, 1, 9)]):
        together, parts = log_probs(model, of_lengths(*lengths)), of_lengths(*lengths).tokens.split(list(lengths))
        alone = [model(x[None]).logits[0, :-1].double().log_softmax(-1).gather(1, x[1:, None])[:, 0] for x in parts]
        of_all = torch.cat([x for part in alone for x in (part.new_zeros(1), part)])
        torch.testing.assert_close(together.double(), of_all, rtol=1e-5, atol=1e-5)
        model.zero_grad()
        together.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ROPE)
def test_sequences_whose_frequencies_the_longest_would_set_are_refused(kind: str) -> None:
    config = {**SMALL, "max_position_embeddings": 16 if kind == "dynamic" else 64}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **config, rope_parameters={"rope_theta": 1e4, **ROPE[kind]}, attn_implementation="eager"
        )
    ).double()
    allowed = [(8, 0, 16), (40, 40), (20, 40)][: 2 if kind == "dynamic" else 3]
    with torch.no_grad():
        for lengths in allowed:
            batch = of_lengths(*lengths)
            rows = [x for x in batch.tokens.split(list(lengths)) if len(x)]
            own = [model(x[None]).logits[0, :-1].log_softmax(-1).gather(1, x[1:, None])[:, 0] for x in rows]
            alone = torch.cat([x for part in own for x in (part.new_zeros(1), part)])
            torch.testing.assert_close(log_probs(model, batch), alone, rtol=1e-6, atol=1e-6)
        for lengths in [(8, 40), *([(20, 40)] if kind == "dynamic" else [])]:
            batch = of_lengths(*lengths)
            tree = tk.Tree.from_trajectories(batch)
            for call in (
                lambda batch=batch: log_probs(model, batch),
                lambda batch=batch, tree=tree: log_probs(model, tree, batch.tokens[tree.source]),
            ):
                with pytest.raises(ValueError, match=f"layout must have .*rope_type '{kind}'.*from {lengths[0]} to 40"):
                    call()
