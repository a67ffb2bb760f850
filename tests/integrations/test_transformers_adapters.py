"""Every adapter of peft on the head and on the embedding: the model's own numbers and gradients, or refused by name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.test_transformers_heads import SMALL, own_log_probs, packed
from trajkern.integrations._adapted_head import embedding_count
from trajkern.integrations.transformers import causal_model, head_arguments, log_probs

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
V = 64  # some adapters want a size that divides
RIGHT, PROMPT = "right", "no learned prompt"


def tiny(tied: bool = False, bias: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": V}, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    if bias:
        model.lm_head = torch.nn.Linear(32, V)
    for x in model.parameters():
        x.data.mul_(3)
    return model.eval().to(dtype)


def stirred(model: Any) -> Any:
    """With every trained parameter away from where it began, where most adapters do nothing."""
    g = torch.Generator().manual_seed(5)
    for x in model.parameters():
        if x.requires_grad:
            x.data.add_(0.1 * torch.randn(x.shape, generator=g).to(x))
    return model.eval()


def with_adapter(config: Any, **options: Any) -> Any:
    return stirred(peft.get_peft_model(tiny(**options), config))


def check_own(model: Any, close: float = 1e-6) -> None:
    batch = packed()
    actual, expected = log_probs(model, batch), own_log_probs(model, batch)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=close, atol=close)
    trained = [x for x in model.parameters() if x.requires_grad]
    if not expected.requires_grad:
        return
    g = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(2)).to(expected)
    ours, theirs = (torch.autograd.grad((x * g).sum(), trained, allow_unused=True) for x in (actual, expected))
    largest = max(float(x.abs().max()) for x in theirs if x is not None)
    for a, b in zip(ours, theirs, strict=True):
        a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        torch.testing.assert_close(*torch.broadcast_tensors(a.double(), b.double()), rtol=0, atol=10 * close * largest)


# peft's name of a tuner -> its options, and what becomes of it on the head
TUNERS: dict[str, tuple[dict[str, Any], str]] = {
    "ADALORA": ({"total_step": 10}, RIGHT),
    "ADAMSS": ({}, RIGHT),
    "ADAPTION_PROMPT": ({"adapter_len": 2, "adapter_layers": 1, "target_modules": "self_attn"}, RIGHT),
    "BEFT": ({}, RIGHT),
    "BOFT": ({"boft_block_size": 4}, RIGHT),
    "C3A": ({"block_size": 1}, RIGHT),
    "CARTRIDGE": ({"num_virtual_tokens": 2}, PROMPT),
    "CPT": ({}, PROMPT),
    "DEFT": ({}, RIGHT),
    "DELORA": ({}, RIGHT),
    "FOURIERFT": ({"n_frequency": 20}, RIGHT),
    "FROD": ({}, RIGHT),
    "GLORA": ({}, RIGHT),
    "GRALORA": ({}, RIGHT),
    "HIRA": ({}, RIGHT),
    "HRA": ({}, RIGHT),
    "IA3": ({"feedforward_modules": []}, RIGHT),
    "LILY": ({}, "peft.tuners.lily.layer.Linear"),
    "LN_TUNING": ({}, RIGHT),
    "LOHA": ({}, RIGHT),
    "LOKR": ({}, RIGHT),
    "LORA": ({}, RIGHT),
    "MISS": ({"r": 4}, RIGHT),
    "MULTITASK_PROMPT_TUNING": ({"num_virtual_tokens": 2}, PROMPT),
    "OFT": ({"oft_block_size": 4}, RIGHT),
    "OSF": ({}, RIGHT),
    "P_TUNING": ({"num_virtual_tokens": 2}, PROMPT),
    "PEANUT": ({}, RIGHT),
    "POLY": ({}, "got POLY"),
    "PREFIX_TUNING": ({"num_virtual_tokens": 2}, PROMPT),
    "PROMPT_TUNING": ({"num_virtual_tokens": 2}, PROMPT),
    "PSOFT": ({}, RIGHT),
    "PVERA": ({}, RIGHT),
    "RANDLORA": ({"r": 4}, RIGHT),
    "ROAD": ({}, RIGHT),
    "SHADOW": ({}, "got SHADOW"),
    "SHIRA": ({"r": 2}, RIGHT),
    "SUPERTUNING": ({}, RIGHT),
    "TINYLORA": ({}, RIGHT),
    "TRAINABLE_TOKENS": ({"token_indices": [5, 9, 20]}, RIGHT),
    "UNILORA": ({}, RIGHT),
    "VBLORA": ({"vector_length": 4, "num_vectors": 8, "topk": 2}, RIGHT),
    "VERA": ({}, RIGHT),
    "WAVEFT": ({"n_frequency": 20}, RIGHT),
    "XLORA": ({}, "got XLORA"),
}


def config_of(name: str, options: dict[str, Any], target: str) -> Any:
    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name]
    takes = inspect.signature(kind).parameters
    own = {"target_modules": [target], "task_type": "CAUSAL_LM"}
    return kind(**{k: v for k, v in own.items() if k in takes} | options)


def test_every_tuner_is_listed() -> None:
    assert {str(x.value) for x in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING} == set(TUNERS)
    page = (Path(__file__).resolve().parents[2] / "docs" / "transformers.md").read_text()
    listed = {name: line for line in page.splitlines() for name in re.findall(r"`([A-Z0-9_]+)`", line)}
    assert {name for name, line in listed.items() if line.startswith("| right")} == {
        name for name, (_, on_head) in TUNERS.items() if on_head == RIGHT
    }
    assert set(listed) == set(TUNERS)


@pytest.mark.slow
@pytest.mark.parametrize("target, tied", [("lm_head", False), ("embed_tokens", False), ("embed_tokens", True)])
@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_in_every_state(name: str, target: str, tied: bool) -> None:
    options, on_head = TUNERS[name]
    try:
        model = with_adapter(config_of(name, options, target), tied=tied, dtype=torch.float32)
        model = model if name == "ADAMSS" else model.double()  # which has tensors that do not follow its model's dtype
        own_log_probs(model, packed())
    except Exception as error:  # peft has no such adapter, or it wants more than tokens
        if target == "lm_head" and on_head == RIGHT and not isinstance(error, ImportError):
            raise
        if on_head != RIGHT and "model" in locals():
            with pytest.raises(ValueError, match=on_head):
                log_probs(model, packed())
        return
    close = 1e-4 if name == "ADAMSS" else 1e-6
    right = on_head == RIGHT or (name == "LILY" and target != "lm_head")
    for training in (False, True):
        model.train(training)
        if right and not (training and name == "PVERA"):  # which draws its weight while it trains
            check_own(model, close)
        else:
            with pytest.raises(ValueError, match="affine" if right else on_head):
                log_probs(model, packed())
    model.eval()
    can_disable = name != "OSF"
    if can_disable:
        with model.disable_adapter():
            check_own(model, close)
    try:
        model.base_model.merge_adapter()
    except (AttributeError, NotImplementedError, ValueError):
        return
    check_own(model, close)
    if can_disable:
        with model.disable_adapter():
            check_own(model, close)


LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "with a bias": {"lora_bias": True},
    "DoRA, on both": {"use_dora": True, "target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "on the embedding": {"target_modules": ["embed_tokens"]},
    "PiSSA": {"init_lora_weights": "pissa"},
    "MiCA": {"init_lora_weights": "mica"},
    "KaSA": {"kasa_config": peft.KasaConfig()},
    "BD-LoRA": {"use_bdlora": peft.BdLoraConfig(target_modules_bd_a=["lm_head"], nblocks=2)},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LORAS)
def test_lora(name: str, bias: bool) -> None:
    if name == "with a bias" and not bias:
        pytest.skip("peft's lora_bias needs a base with a bias")
    options = {"target_modules": ["lm_head"], "init_lora_weights": False, "r": 4} | LORAS[name]
    config = peft.LoraConfig(**options)
    model = with_adapter(config, bias=bias, dtype=torch.float32).double()  # some begin with a decomposition
    check_own(model)
    check_own(model.train())
    with model.eval().disable_adapter():
        check_own(model)
    model.merge_adapter()
    check_own(model)
    if name != "BD-LoRA":
        model.unmerge_adapter()
        check_own(model)


SAMPLED = {
    "MonteCLoRA": {"monteclora_config": peft.MontecloraConfig()},
    "VeLoRA": {"velora_config": peft.VeloraConfig(num_groups=8)},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_a_lora_that_is_no_matrix_while_it_trains_is_refused(name: str) -> None:
    """It draws its weight, or forms a gradient that is not its product's."""
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, r=4, **SAMPLED[name])
    model = with_adapter(config, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(log_probs(model, packed()), own_log_probs(model, packed()), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="peft.tuners.lora.layer.Linear"):
        log_probs(model.train(), packed())


def test_several_and_switched_adapters() -> None:
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(), config)
    model.add_adapter("dora", peft.LoraConfig(target_modules=["lm_head"], use_dora=True, init_lora_weights=False))
    model.add_adapter("elsewhere", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    for name in ("default", "dora", "elsewhere", "default"):
        model.set_adapter(name)
        check_own(stirred(model))
    model.base_model.set_adapter(["default", "dora"])
    check_own(model)
    model.set_adapter("default")
    model.merge_adapter(["dora"])  # what is merged acts alone
    check_own(model)


@pytest.mark.parametrize("tied", [False, True])
def test_modules_to_save(tied: bool) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    model = with_adapter(config, tied=tied)
    check_own(model)
    with model.disable_adapter():
        check_own(model)
    model.add_adapter("other", config)
    model.set_adapter("other")
    check_own(stirred(model))
    assert embedding_count(model) == V


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("where", [[3, 7, 40], {"lm_head": [3, 9]}, {"embed_tokens": [3, 9]}])
def test_trainable_tokens(tied: bool, where: Any) -> None:
    model = with_adapter(peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=where), tied=tied)
    check_own(model)
    with model.disable_adapter():
        check_own(model)
    model.merge_adapter()
    check_own(model)
    assert embedding_count(model) == V


def test_a_mixed_model_and_adapters_of_transformers() -> None:
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    mixed = peft.get_peft_model(tiny(), config, mixed=True)
    mixed.add_adapter("hada", peft.LoHaConfig(target_modules=["lm_head", "q_proj"]))
    mixed.set_adapter(["default", "hada"])
    check_own(stirred(mixed))
    native = tiny()
    native.add_adapter(config)
    assert causal_model(native) is native
    check_own(stirred(native))


def test_dropout_on_the_head_is_refused_in_training_only() -> None:
    for options in ({}, {"use_dora": True}):
        config = peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.5, init_lora_weights=False, **options)
        model = with_adapter(config)
        check_own(model)
        with pytest.raises(ValueError, match="affine head, in training without dropout; peft.tuners.lora"):
            log_probs(model.train(), packed())
        check_own(model.eval())


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(target_modules=["lm_head"], init_weights=False, r=4, module_dropout=0.1),
        peft.LoKrConfig(target_modules=["lm_head"], init_weights=False, r=4, rank_dropout=0.01),
        peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.01),
    ],
    ids=["module_dropout", "rank_dropout", "lora_dropout"],
)
def test_a_draw_that_seldom_shows_is_refused_all_the_same(config: Any) -> None:
    for seed in range(4):
        model = with_adapter(config)
        check_own(model.eval())
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match=r"model must have an affine head.*draws random numbers in each call"):
            log_probs(model.train(), packed())


def test_what_acts_between_the_call_and_the_model_is_refused() -> None:
    alora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[9])
    with pytest.raises(ValueError, match="model must have no alora_invocation_tokens"):
        log_probs(with_adapter(alora), packed())
    shadow = stirred(peft.get_peft_model(tiny(dtype=torch.float32), peft.ShadowConfig(task_type="CAUSAL_LM")))
    with pytest.raises(ValueError, match="got SHADOW"):
        log_probs(shadow, packed())
    with shadow.disable_adapter():
        check_own(shadow, 1e-4)
    prompt = with_adapter(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="no learned prompt"):
        log_probs(prompt, packed())
    with prompt.disable_adapter():
        check_own(prompt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_beside_a_large_bias(dtype: torch.dtype) -> None:
    """The weight that the identity gives is not lost in the bias that comes with it."""
    config = peft.LoraConfig(target_modules=["lm_head"], use_dora=True, init_lora_weights=False)
    exact = tiny(bias=True)
    exact.lm_head.bias.data.add_(3)
    model = stirred(peft.get_peft_model(exact.to(dtype), config))
    head = head_arguments(model)
    wide = stirred(peft.get_peft_model(tiny(bias=True), config)).double()
    wide.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    right = head_arguments(wide)
    torch.testing.assert_close(head["weight"].double(), right["weight"], rtol=0.02, atol=2e-3)
    torch.testing.assert_close(head["bias"].double(), right["bias"], rtol=0.01, atol=0)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_autocast_with_a_bias(options: dict[str, Any]) -> None:
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False, **options)
    model = with_adapter(config, bias=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = log_probs(model, packed()), own_log_probs(model, packed())
        torch.testing.assert_close(actual, expected.float(), rtol=0.05, atol=0.1)
        actual.sum().backward()
    assert all(x.grad is not None for x in model.parameters() if x.requires_grad)
