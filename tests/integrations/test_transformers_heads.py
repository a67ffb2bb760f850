"""Heads that are measured, not named: models beside their own forwards in float64, and models that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trajkern as tk
from trajkern.integrations.transformers import head_arguments, hidden_states, log_probs

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
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
# class -> its config, softcap and logit_scale
MODELS: dict[str, tuple[str, dict[str, Any], float | None, float]] = {
    "Llama": ("Llama", {}, None, 1.0),
    "Llama with a stray multiplier": ("Llama", {"lm_head_multiplier": 0.25, "logit_scale": 3.0}, None, 1.0),
    "Llama 4 text": ("Llama4Text", EXPERTS, None, 1.0),
    "Gemma 2": ("Gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}, 3.0, 1.0),
    "Cohere": ("Cohere", {"logit_scale": 0.3}, None, 0.3),
    "Granite": ("Granite", {"logits_scaling": 3.0}, None, 1 / 3.0),
    "HyperCLOVA X": ("HyperCLOVAX", {"logits_scaling": 3.0}, None, 3.0),
    "Falcon-H1": ("FalconH1", {**MAMBA, "lm_head_multiplier": 0.3}, None, 0.3),
    "RecurrentGemma": ("RecurrentGemma", {"logits_soft_cap": 2.0, "lru_width": 32}, 2.0, 1.0),
    "xLSTM": (
        "xLSTM",
        {"num_heads": 2, "output_logit_soft_cap": 2.0, "chunkwise_kernel": "chunkwise--native_autograd"},
        2.0,
        1.0,
    ),
    "BERT": ("Bert", {"is_decoder": True}, None, 1.0),
    "RoBERTa": ("Roberta", {"is_decoder": True, "pad_token_id": 1}, None, 1.0),
    "OPT, projected": ("OPT", {"word_embed_proj_dim": 16, "ffn_dim": 48}, None, 1.0),
    "ModernBERT decoder": ("ModernBertDecoder", {}, None, 1.0),
}


def model_of(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    kind, options, _, _ = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for x in model.parameters():
        x.data.mul_(3 if x.ndim > 1 else 1).add_(0.1 * torch.randn_like(x) if x.ndim == 1 else 0)
    return model.eval().to(dtype)


@pytest.mark.parametrize("name", ["hidden", "rows", "targets"])
def test_what_the_layout_says_is_not_taken(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must not be given: the model and the layout say which they are"):
        log_probs(model_of("Llama"), packed(), **{name: torch.zeros(12, dtype=torch.long)})


def packed() -> tk.PackedBatch:
    bounds = torch.tensor([0, 6, 6, 15])
    tokens = torch.randint(5, V, (15,), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(15, dtype=torch.bool).index_fill(0, torch.tensor([0, 6, 9]), False)
    return tk.PackedBatch(tokens, bounds, mask, torch.zeros(3, dtype=torch.long))


def own_log_probs(model: Any, batch: tk.PackedBatch) -> Tensor:
    parts = []
    for tokens in batch.tokens.split([6, 9]):
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        scored = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        parts += [scored.new_zeros(1), scored]
    return torch.where(batch.loss_mask, torch.cat(parts), 0)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_its_own_log_probs_and_gradients(name: str) -> None:
    model, batch = model_of(name), packed()
    actual, expected = log_probs(model, batch), own_log_probs(model, batch)
    # some compute a part of themselves in float32
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-6)
    g = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(2))
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad((x * g).sum(), parameters, allow_unused=True) for x in (actual, expected))
    assert [x is None for x in ours] == [x is None for x in theirs]
    largest = max(float(x.abs().max()) for x in theirs if x is not None)
    for a, b in zip(ours, theirs, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7 * largest)
    _, _, softcap, scale = MODELS[name]
    head = head_arguments(model)
    assert head["softcap"] == softcap and head["logit_scale"] == scale


class Altered(transformers.LlamaForCausalLM):
    """A Llama that does more to what stands before its head, or behind it, than any name says."""

    before: Any = staticmethod(lambda h: h)
    behind: Any = staticmethod(lambda z: z)

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        h = self.model(input_ids=input_ids, **options).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.behind(self.lm_head(self.before(h))))


def altered(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = Altered(transformers.LlamaConfig(**SMALL)).eval().to(dtype)
    for x in model.parameters():
        x.data.mul_(3)
    for name, change in changes.items():
        setattr(model, name, change)
    return model


class NormHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


RIGHT: dict[str, dict[str, Any]] = {
    "a number behind": {"behind": lambda z: z * 0.37},
    "a number and a cap": {"behind": lambda z: 1.7 * torch.tanh(z * 0.37 / 1.7)},
    "a negative number": {"behind": lambda z: -z / 3},
    "fewer logits": {"behind": lambda z: z[..., : V - 7]},
    "in single precision": {"behind": lambda z: z.float() / 7},
    "a number before": {"before": lambda h: h / 3},
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_no_name_says_is_measured(name: str) -> None:
    model, batch = altered(**RIGHT[name]).double(), packed()
    batch = replace(batch, tokens=batch.tokens.clamp(max=V - 8))
    actual, expected = log_probs(model, batch), own_log_probs(model, batch)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(x.sum(), parameters) for x in (actual, expected))
    largest = max(float(x.abs().max()) for x in theirs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7 * largest)


def test_a_scale_that_is_1_now_is_still_a_parameter() -> None:
    scale = nn.Parameter(torch.ones(1, dtype=torch.float64))
    model = altered(before=lambda h: h * scale)
    (actual,) = torch.autograd.grad(log_probs(model, packed()).sum(), scale)
    (expected,) = torch.autograd.grad(own_log_probs(model, packed()).sum(), scale)
    torch.testing.assert_close(actual, expected)
    scale.data.fill_(0.5)
    torch.testing.assert_close(log_probs(model, packed()), own_log_probs(model, packed()))


LEARNT = nn.Parameter(torch.ones(1))
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a bias behind": ({"behind": lambda z: z + torch.arange(V) / 9}, "makes 0.11111. of 1e-06 for token 1"),
    "a mask": ({"behind": lambda z: z.index_fill(-1, torch.tensor([5]), -1e9)}, "for token 5"),
    "a nonlinear function": ({"behind": nn.functional.gelu}, "model must have logits softcap"),
    "log-probs": ({"behind": lambda z: z.log_softmax(-1)}, "model must have logits softcap"),
    "a learnt temperature": (
        {"behind": lambda z: z * LEARNT},
        "no trained parameters behind its head",
    ),
    "two heads": ({"before": None}, "apply its head once; Altered applies it 2 times"),
    "the last token alone": ({"before": lambda h: h[:, -1:]}, "logits of shape"),
    "what is not finite": ({"before": lambda h: h * torch.nan}, "finite logits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_of_another_form_is_refused(name: str) -> None:
    changes, says = REFUSED[name]
    model = altered(**changes)
    if name == "two heads":
        model.before = lambda h: h + 0 * model.lm_head(h).sum()
    for call in (
        lambda: log_probs(model, packed()),
        lambda: head_arguments(model),
        lambda: hidden_states(model, packed()),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_a_head_layer_of_its_own_is_refused() -> None:
    """Its weight is not what multiplies, even where it is now; a config's names stand in the message."""
    model = altered()
    model.lm_head = NormHead(32, V, bias=False).double()
    model.config.logit_scale = 0.1
    with pytest.raises(ValueError, match=r"Altered gives token \d+ .*, rebuilt .*its config has logit_scale=0.1"):
        head_arguments(model)
    model.lm_head.weight.data = nn.functional.normalize(model.lm_head.weight.data)
    with pytest.raises(ValueError, match="gradients are its own; .*NormHead has at weight"):
        head_arguments(model)


def test_sixteen_bits() -> None:
    """The numbers are measured in float64 where the model lets them through, and else are the config's."""
    for behind in (lambda z: z / 3, lambda z: (z / 3).bfloat16()):
        model = altered(torch.bfloat16, behind=behind)
        model.config.logits_scaling = 3
        assert head_arguments(model)["logit_scale"] == 1 / 3
        torch.testing.assert_close(
            log_probs(model, packed()), own_log_probs(model, packed()).float(), rtol=0.05, atol=0.05
        )


def test_measuring_leaves_nothing_behind() -> None:
    model = altered(behind=lambda z: z / 3).train()
    model.model.layers[0].eval()
    modes = [x.training for x in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    head_arguments(model)
    hidden_states(model, packed())
    assert torch.equal(torch.rand(3), expected)
    assert [x.training for x in model.modules()] == modes
    assert all(x.grad is None for x in model.parameters())
    assert not model._forward_hooks and not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
    with torch.autocast("cpu", torch.bfloat16):  # whose cache must not keep a cast that was made without gradients
        model = altered(torch.float32)
        log_probs(model, packed()).sum().backward()
    assert all(x.grad is not None for x in model.parameters())


def test_a_state_is_measured_once() -> None:
    model, calls = altered(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        log_probs(model, packed())
    once = len(calls)
    log_probs(model.float(), packed())
    again = len(calls)
    model.behind = lambda z: z / 3
    log_probs(model, packed(), check=False)
    assert 0 < once < again == len(calls)
    model.lm_head = nn.Linear(32, V, bias=False)
    assert head_arguments(model)["logit_scale"] == 1 / 3 and len(calls) > again


def test_unchecked_names_are_believed() -> None:
    model = model_of("Llama with a stray multiplier")
    assert head_arguments(model, check=False)["logit_scale"] == 0.75
    assert head_arguments(model)["logit_scale"] == 1.0


def test_a_recurrent_model_has_no_tree() -> None:
    tree = tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([3, 2, 2]))
    tokens = torch.randint(5, V, (7,), generator=torch.Generator().manual_seed(1))
    for name, says in {
        "RecurrentGemma": "linear_attention",
        "xLSTM": "xLSTMForCausalLM is recurrent",
        "RoBERTa": "as part of a Tree",
    }.items():
        with pytest.raises(ValueError, match=says):
            log_probs(model_of(name), tree, tokens)
