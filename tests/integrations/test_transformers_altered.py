"""Models as users change them: hooks, patched forwards, heads whose weight is formed, models that are not causal."""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from tests.integrations.test_transformers_heads import SMALL, V, model_of, own_log_probs, packed
from trajkern.integrations._model_run import attention_of
from trajkern.integrations._own_forward import Parts, _tangents_ahead, some_tokens, undisturbed
from trajkern.integrations.transformers import head_arguments, hidden_states, log_probs

transformers = pytest.importorskip("transformers")


def check_own(model: Any) -> None:
    """Values and gradients; here first, as the model's own call may set something right."""
    actual, expected = log_probs(model, packed()), own_log_probs(model, packed())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    g = torch.randn(len(actual), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parameters = [x for x in model.parameters() if x.requires_grad]
    ours, theirs = (torch.autograd.grad((x * g).sum(), parameters) for x in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7 * max(float(x.abs().max()) for x in theirs))


FORMED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.3),
    "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", FORMED)
def test_a_weight_that_the_head_forms_in_its_call_is_formed_anew(name: str) -> None:
    model = model_of("Llama")
    FORMED[name](model.lm_head)
    check_own(model)
    for x in model.lm_head.parameters():
        x.data.mul_(1.5).add_(0.01)
    check_own(model)


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.1 * torch.randn_like(weight) if self.training else weight


class Shrinking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += self.training
        return weight / (1 + self.calls)


UNSTEADY = {
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized spectral_norm": nn.utils.parametrizations.spectral_norm,
    "noise": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Noisy()),
    "a count": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Shrinking()),
}


@pytest.mark.parametrize("name", UNSTEADY)
def test_a_head_whose_weight_moves_at_each_reading_is_refused_in_training(name: str) -> None:
    model = model_of("Llama")
    UNSTEADY[name](model.lm_head)
    check_own(model)
    model.train()
    before = {k: x.clone() for k, x in model.lm_head.named_buffers()}
    for _ in range(2):
        with pytest.raises(ValueError, match="model must have a head whose weight is the same each time that it is re"):
            log_probs(model, packed())
    assert all(torch.equal(x, before[k]) for k, x in model.lm_head.named_buffers())
    model.lm_head.eval()
    check_own(model)


@pytest.mark.parametrize("name", ["spectral_norm", "parametrized spectral_norm", "noise"])
def test_an_embedding_whose_weight_moves_takes_one_step_a_call(name: str) -> None:
    model = model_of("Llama").train()
    UNSTEADY[name](model.model.embed_tokens)
    batch, tokens = packed()[:1], packed().tokens[:6]
    for seed in range(3):
        state = {k: x.clone() for k, x in model.state_dict().items()}
        torch.manual_seed(seed)
        actual = log_probs(model, batch)
        moved = {k: x.clone() for k, x in model.state_dict().items()}
        model.load_state_dict(state)
        torch.manual_seed(seed)
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(actual[1:], expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dict(model.state_dict()), moved)


def halved(layer: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output / 2
    output.logits = output.logits / 2
    return output


@contextlib.contextmanager
def patched(module: Any):
    forward = module.forward
    module.forward = lambda *args, **options: halved(module, args, forward(*args, **options))
    yield
    del module.forward


@contextlib.contextmanager
def hooked(handle: Any):
    yield
    handle.remove()


CHANGES: dict[str, Any] = {
    "the model's hook": (lambda m: hooked(m.register_forward_hook(halved)), None),
    "the model's forward": (patched, None),
    "what stands before the head": (
        lambda m: hooked(m.lm_head.register_forward_pre_hook(lambda layer, x: (2 * x[0],))),
        None,
    ),
    "the backbone's hook": (
        lambda m: hooked(
            m.model.register_forward_hook(lambda layer, x, y: (setattr(y, "last_hidden_state", y[0] / 2), y)[1])
        ),
        None,
    ),
    "a gradient's hook": (lambda m: hooked(m.lm_head.weight.register_hook(lambda g: 2 * g)), None),
    "the head's hook": (lambda m: hooked(m.lm_head.register_forward_hook(halved)), "gives token"),
    "the head's forward": (lambda m: patched(m.lm_head), "gives token"),
    "the head's backward": (
        lambda m: hooked(m.lm_head.register_full_backward_hook(lambda layer, x, y: (2 * x[0],))),
        "no backward hooks around its head.*Linear has",
    ),
    "the model's backward": (
        lambda m: hooked(m.register_full_backward_pre_hook(lambda layer, g: g)),
        "no backward hooks around its head.*LlamaForCausalLM has",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_after_it_was_measured_is_measured_again(name: str) -> None:
    change, refused = CHANGES[name]
    model = model_of("Llama")
    check_own(model)
    with change(model):
        if refused is None:
            check_own(model)
        else:
            with pytest.raises(ValueError, match=f"model must have .*{refused}"):
                log_probs(model, packed())
    check_own(model)


@pytest.mark.parametrize("name", ["as it is", *(x for x, (_, refused) in CHANGES.items() if refused is None)])
def test_a_model_that_nobody_wants_is_kept_by_nobody(name: str) -> None:
    """What was measured of it goes with it, also where it was changed in between."""
    model = model_of("Llama")
    log_probs(model, packed()).sum().backward()
    if name in CHANGES:
        with CHANGES[name][0](model):
            log_probs(model, packed()).sum().backward()
    alive = [weakref.ref(x) for x in (model, *model.parameters())]
    del model
    gc.collect()
    assert not [x for x in alive if x() is not None]


def test_what_a_class_was_given_after_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = model_of("Llama"), transformers.LlamaForCausalLM.forward
    check_own(model)
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "forward", lambda self, *a, **k: halved(self, a, forward(self, *a, **k))
    )
    check_own(model)
    model = model_of("Cohere")
    for scale in (2, 3, 0.5):
        model.logit_scale = scale
        assert head_arguments(model)["logit_scale"] == scale


class Divided(transformers.LlamaForCausalLM):
    """A model that divides its logits by something of its own."""

    def divisor(self) -> Any:
        raise NotImplementedError

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits / self.divisor()
        return output


OWN = {
    "an integer": (lambda m: m.by, lambda m, x: setattr(m, "by", x)),
    "a number of numpy's": (lambda m: m.by, lambda m, x: setattr(m, "by", np.float32(x))),
    "a tensor": (lambda m: m.by, lambda m, x: setattr(m, "by", torch.tensor(float(x)))),
    "a tensor in place": (lambda m: m.by, lambda m, x: m.by.fill_(x) if hasattr(m, "by") else _put(m, x)),
    "an entry": (lambda m: m.model.how["by"], lambda m, x: setattr(m.model, "how", {"by": x})),
    "another module's": (lambda m: m.after.by, lambda m, x: setattr(m.after, "by", x)),
    "the config's": (lambda m: m.config.by, lambda m, x: setattr(m.config, "by", x)),
    "a mode": (lambda m: 1 + m.training, lambda m, x: m.train(x == 2)),
}


def _put(model: Any, x: float) -> None:
    model.by = torch.tensor(float(x))


@pytest.mark.parametrize("name", OWN)
def test_what_a_model_divides_by_is_read_again_where_it_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    divisor, change = OWN[name]
    model = model_of("Llama")
    model.__class__, model.after = Divided, nn.Identity()
    monkeypatch.setattr(Divided, "divisor", divisor)
    for x in (1, 2, 3, 2):
        change(model, x)
        check_own(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_that_a_model_enters_by_itself(dtype: torch.dtype) -> None:
    """As that which accelerate puts around a forward."""
    model = model_of("Llama").float()
    forward = model.forward

    def cast(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype):
            output = forward(*args, **options)
        output.logits = output.logits.float()
        return output

    model.forward = cast
    actual, expected = log_probs(model, packed()), own_log_probs(model, packed())
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)
    exact = own_log_probs(model_of("Llama").float(), packed())
    assert 1e-6 < float((actual - exact).abs().max())
    head = head_arguments(model)["weight"]
    assert head.dtype == hidden_states(model, packed()).dtype == dtype
    actual.sum().backward()
    assert model.lm_head.weight.grad.dtype == torch.float32 and model.lm_head.weight.grad.any()


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=V,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    return transformers.BartForConditionalGeneration(config)


SEEING = {
    "BertForMaskedLM": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "BertLMHeadModel": lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=False)),
    "XLNetLMHeadModel": lambda: transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=V, d_model=32, n_layer=2, n_head=4, d_inner=48)
    ),
    "BartForConditionalGeneration": bart,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_reads_what_it_predicts_is_refused(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = SEEING[name]().eval().to(dtype)
    for call in (lambda: log_probs(model, packed()), lambda: head_arguments(model)):
        with pytest.raises(ValueError, match=f"model must be causal; {name} gives token"):
            call()


@pytest.fixture(scope="module")
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, fully_shard])
@pytest.mark.parametrize("name", SEEING)
def test_what_16_bits_hide_behind_a_wrapper_is_seen(name: str, wrap: Any, one_rank: None) -> None:
    torch.manual_seed(0)
    model = wrap(SEEING[name]().eval().to(torch.bfloat16))
    with pytest.raises(ValueError, match=f"model must be causal; (FSDP)?{name} gives token"):
        log_probs(model, packed())


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mamba"])
def test_a_causal_model_s_logits_have_no_tangents_of_later_tokens(name: str) -> None:
    """Whether or not its values tell: this decides where rounding moves them."""
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SMALL))
    parts = Parts(model, model, model)
    with undisturbed(model):
        assert not _tangents_ahead(parts, some_tokens(parts, 4), 2)
    seeing = SEEING["BertForMaskedLM"]()
    with undisturbed(seeing):
        assert _tangents_ahead(Parts(seeing, seeing, seeing), some_tokens(parts, 4), 2)


def test_tokens_that_stand_for_an_image_are_refused() -> None:
    small_models = pytest.importorskip("tests.integrations.small_models", exc_type=ImportError)
    model, batch = small_models.build_other("LlavaForConditionalGeneration"), packed()
    batch = replace(batch, tokens=batch.tokens.clamp(5, small_models.V - 1))
    assert log_probs(model, batch).isfinite().all()
    image = model.config.image_token_index
    seen = replace(batch, tokens=batch.tokens.index_fill(0, torch.tensor([7]), image))
    with pytest.raises(ValueError, match=f"tokens must stand for text alone.*token 7 is {image}, the image_token_i"):
        log_probs(model, seen)


def test_an_attention_of_the_text_alone_is_the_one_that_counts() -> None:
    small_models = pytest.importorskip("tests.integrations.small_models", exc_type=ImportError)
    model = small_models.build_other("LlavaForConditionalGeneration")
    assert attention_of(model) == "eager"
    model.config.text_config._attn_implementation = "sdpa"
    assert attention_of(model) == "sdpa"


def offloaded(part: str) -> Any:
    accelerate = pytest.importorskip("accelerate")
    model = model_of("Llama")
    accelerate.cpu_offload(model.get_submodule(part), execution_device="cpu")
    return model


NOWHERE = {
    "all offloaded": (lambda: offloaded(""), "offloaded by accelerate: load it without"),
    "the body offloaded": (lambda: offloaded("model"), "offloaded by accelerate: load it without"),
    "the head offloaded": (lambda: offloaded("lm_head"), r"lm_head\.weight .*offloaded by accelerate: load it without"),
    "not loaded": (lambda: model_of("Llama").to("meta"), "holds no values: load its weights first"),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("name", NOWHERE)
def test_a_model_whose_parameters_lie_elsewhere_is_refused(name: str, check: bool) -> None:
    model, says = NOWHERE[name][0](), NOWHERE[name][1]
    for call in (lambda: log_probs(model, packed(), check=check), lambda: head_arguments(model, check=check)):
        with pytest.raises(ValueError, match=f"model must have its parameters in memory; .*{says}"):
            call()
