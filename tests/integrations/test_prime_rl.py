"""prime-rl's packed loss: trajkern's beside the loop over sequences that prime-rl's is (0.8.0, commit 559b447)."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from tests.integrations.prime_rl_formula import (
    DEFAULT,
    IPO,
    compute_loss,
    loss_config_of,
    sequence_loss,
    setup_rl_loss_fn,
    written_down,
)
from trajkern.integrations import _adapter
from trajkern.integrations import prime_rl as adapter

STREAMS = ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages", "loss_mask")
WEIGHTS = ("rl_weights", "ce_weights", "ref_kl_weights")
SCALES = {"rl_scale": 37, "ce_scale": 11, "ref_kl_scale": 5}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """prime-rl's loss module where it is installed, else as it is written down."""
    if find_spec("prime_rl") is None:
        for name, module in written_down().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(_adapter, "version", lambda package: "0.8.0")
    return importlib.import_module(adapter.LOSS)


def _batch(seed: int, lengths=(7, 1, 0, 12, 5, 9), dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Sequences of which one is empty and one fully masked, with tokens that moved far."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    draw = lambda: torch.randn(total, generator=g, dtype=torch.float64)  # noqa: E731
    old = (-draw().abs()).to(dtype)
    mask = torch.rand(total, generator=g) < 0.7
    mask[-9:] = False
    mask[:7] = True
    new = (old + 0.4 * draw()).clamp(max=-1e-3).to(dtype)
    streams = {
        "trainer_logprobs": new,
        "inference_logprobs": old,
        "ref_logprobs": (new + 0.2 * draw()).to(dtype),
        "advantages": torch.where(torch.rand(total, generator=g) < 0.2, 0, draw()).to(dtype),
        "loss_mask": mask,
        "rl_weights": (torch.rand(total, generator=g) < 0.6) * (draw() / 2).exp().to(dtype),
        "ce_weights": (torch.rand(total, generator=g) < 0.5) * draw().to(dtype),
        "ref_kl_weights": (torch.rand(total, generator=g) < 0.5) * draw().exp().to(dtype),
    }
    for name in WEIGHTS:
        streams[name][7:8] = 0  # the sequence of one token belongs to no component that has weights
    return {name: list(x.split(lengths)) for name, x in streams.items()}


def _outcome(function, batch, rl_loss_fn) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaf = torch.cat(batch["trainer_logprobs"]).requires_grad_()
    lengths = [len(x) for x in batch["trainer_logprobs"]]
    loss, metrics = function(**(batch | {"trainer_logprobs": leaf.split(lengths)}), rl_loss_fn=rl_loss_fn, **SCALES)
    (3 * loss).backward()
    return loss.detach(), leaf.grad, metrics


def _without(batch: dict[str, Any], *names: str) -> dict[str, Any]:
    return batch | dict.fromkeys(names)


CASES = [
    WEIGHTS,
    ("ce_weights", "ref_kl_weights"),
    ("rl_weights", "ref_kl_weights", "ref_logprobs"),
    ("ref_kl_weights",),
    (),
]


@pytest.mark.parametrize("left_out", CASES, ids=lambda x: "-".join(y.split("_")[0] for y in x) or "all")
@pytest.mark.parametrize("kind", ["default", "ipo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_packed_loss_is_the_loops(host, kind: str, left_out: tuple[str, ...], dtype: torch.dtype) -> None:
    batch = _without(_batch(3, dtype=dtype), *left_out)
    options = {"default": DEFAULT, "ipo": IPO}[kind]
    config = {"default": host.DefaultLossConfig, "ipo": host.IPOLossConfig}[kind](**options)
    loss_fn = host.setup_rl_loss_fn(config)
    ours = _outcome(adapter.compute_loss, batch, loss_fn)
    tolerance = TOLERANCE if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-8}
    mine = _outcome(compute_loss, batch, setup_rl_loss_fn(loss_config_of(kind, **options)))
    for theirs in (mine, _outcome(host.compute_loss, batch, loss_fn)):
        torch.testing.assert_close(ours[:2], theirs[:2], **tolerance)
        assert ours[2].keys() == theirs[2].keys()
        for name, x in theirs[2].items():
            torch.testing.assert_close(ours[2][name].double(), x.double(), **TOLERANCE)
    assert float(ours[0]) != 0 and not bool(ours[1].isnan().any())


def test_nothing_under_the_mask_is_read(host) -> None:
    batch = _without(_batch(0), *WEIGHTS)
    loss_fn = host.setup_rl_loss_fn(host.DefaultLossConfig())
    expected = _outcome(adapter.compute_loss, batch, loss_fn)
    for name in ("inference_logprobs", "advantages", "ref_logprobs"):
        batch[name] = [torch.where(m, x, torch.nan) for x, m in zip(batch[name], batch["loss_mask"], strict=True)]
    ours = _outcome(adapter.compute_loss, batch, loss_fn)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_a_batch_of_which_nothing_learns_has_a_backward(host) -> None:
    batch = _batch(1)
    for name in WEIGHTS:
        batch[name] = [0 * x for x in batch[name]]
    loss, grad, metrics = _outcome(adapter.compute_loss, batch, host.setup_rl_loss_fn(host.DefaultLossConfig()))
    assert float(loss) == 0 and not grad.any() and metrics == {}
    no_reference = _outcome(
        adapter.compute_loss, _without(batch, "ref_logprobs"), host.setup_rl_loss_fn(host.IPOLossConfig())
    )
    assert float(no_reference[0]) == 0 and not no_reference[1].any()


KINDS = [
    {"kind": "dapo", "clip_high": 0.28, "clip_dual": 3.0},
    {"kind": "gspo", "clip_low": 3e-2, "clip_high": 4e-2, "aggregate": "token_sum"},
    {"kind": "cispo"},
    {"kind": "vespo"},
    {"kind": "dapo", "kl": "k3", "kl_coef": 0.1},
    {"kind": "default", **DEFAULT},
]


@pytest.mark.parametrize("options", KINDS, ids=lambda o: "-".join(str(x) for x in o.values()))
def test_a_custom_loss_packed_and_sequence_by_sequence(host, options: dict[str, Any]) -> None:
    """prime-rl's loop over the function is the packed call, and that is the op's sum."""
    batch = _without(_batch(5), "ce_weights", "ref_kl_weights", *(["rl_weights"] if "kl" in options else []))
    config = host.CustomLossConfig(import_path="trajkern.integrations.prime_rl.policy_loss", kwargs=options)
    loss_fn = host.setup_rl_loss_fn(config)
    looped = _outcome(host.compute_loss, batch, loss_fn)
    packed = _outcome(adapter.compute_loss, batch, loss_fn)
    torch.testing.assert_close(packed[:2], looped[:2], **TOLERANCE)
    if options["kind"] == "default":
        return
    new, old, ref, a, mask = (torch.cat(batch[name]) for name in STREAMS)
    w = torch.ones_like(a) if batch["rl_weights"] is None else torch.cat(batch["rl_weights"])
    bounds = torch.tensor([0, *(len(x) for x in batch["advantages"])]).cumsum(0)
    op = tk.PolicyLoss(**(options | {"aggregate": "token_sum"}))
    expected, _ = tk.policy_loss(new, old, w * a, bounds, config=op, mask=mask & (w != 0), ref_logprobs=ref)
    torch.testing.assert_close(packed[0], expected / SCALES["rl_scale"], **TOLERANCE)


def my_loss(inputs, factor: float = 1.0):
    return SimpleNamespace(loss=factor * inputs.trainer_logprobs[inputs.loss_mask].sum(), metrics={})


def test_enable_and_disable(host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    theirs = sys.modules["__main__"].compute_loss = host.compute_loss
    batch = _without(_batch(2), *WEIGHTS)
    mine = host.CustomLossConfig(import_path=f"{__name__}.my_loss", kwargs={"factor": 2.0})
    with pytest.raises(TypeError, match="rl_loss_fn must come from prime-rl's setup_rl_loss_fn"):
        _outcome(adapter.compute_loss, batch, host.setup_rl_loss_fn(mine))
    try:
        adapter.enable()
        handle = adapter.enable()
        assert "prime-rl: trajkern stands in for compute_loss of" in repr(handle)
        holders = [sys.modules[x] for x in adapter.HOLDERS if x in sys.modules]
        assert len(holders) > 1 and all(x.compute_loss is adapter.compute_loss for x in holders)
        own = _outcome(host.compute_loss, batch, host.setup_rl_loss_fn(mine))  # left to prime-rl's own
        kept = torch.cat(batch["loss_mask"])
        torch.testing.assert_close(own[1][kept], torch.full((int(kept.sum()),), 3 * 2 / SCALES["rl_scale"]))
    finally:
        handle.disable()
    adapter.disable()
    assert all(x.compute_loss is theirs for x in holders)


def _twice(loss_config):
    def rl_fn(inputs):
        out = sequence_loss(inputs, loss_config.type, vars(loss_config))
        return SimpleNamespace(loss=2 * out.loss, metrics=out.metrics)

    return rl_fn


def _of_wrapped(custom_fn, kwargs):
    @functools.wraps(custom_fn)
    def wrapper(inputs, **options):
        out = custom_fn(inputs, **options)
        return out._replace(loss=2 * out.loss)

    return (lambda custom_fn: lambda inputs: custom_fn(inputs, **kwargs))(wrapper)


OWN = [
    lambda: _twice(loss_config_of("default", **DEFAULT)),
    lambda: _of_wrapped(adapter.policy_loss, {"kind": "default", **DEFAULT}),
    lambda: (lambda custom_fn, kwargs: lambda inputs: my_loss(inputs) if kwargs else custom_fn(inputs))(
        adapter.policy_loss, {"kind": "ipo", **IPO}
    ),
]


@pytest.mark.parametrize("make", OWN, ids=["loss_config", "wrapped", "custom_fn"])
def test_a_loss_that_only_looks_like_prime_rls_is_left_to_it(host, make) -> None:
    batch = _without(_batch(2), *WEIGHTS)
    with pytest.raises(TypeError, match="rl_loss_fn must come from"):
        _outcome(adapter.compute_loss, batch, make())
    wanted = _outcome(host.compute_loss, batch, make())
    try:
        adapter.enable()
        torch.testing.assert_close(_outcome(host.compute_loss, batch, make())[:2], wanted[:2])
    finally:
        adapter.disable()


def test_options_may_change_between_calls(host) -> None:
    batch, config = _without(_batch(2), *WEIGHTS), loss_config_of("default", **DEFAULT)
    loss_fn = setup_rl_loss_fn(config)
    for low in (0.15, 0.0):
        config.dppo_mask_low = low
        ours, theirs = (_outcome(function, batch, loss_fn) for function in (adapter.compute_loss, compute_loss))
        torch.testing.assert_close(ours[:2], theirs[:2], **TOLERANCE)


def test_a_version_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = written_down()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_adapter, "version", lambda package: "0.9.0")
    loss = modules[adapter.LOSS]
    try:
        with pytest.warns(UserWarning, match="prime-rl 0.8.0, not with 0.9.0"):
            adapter.enable()
        adapter.disable()
        changes = {
            "compute_loss": lambda trainer_logprobs, temperature: None,
            "DefaultLossConfig": lambda: loss_config_of("default", **DEFAULT, entropy_tau=0.0),
            "setup_rl_loss_fn": lambda config: print,
            "setup_rl_loss_fn ": _twice,
        }
        told = ("must take", "entropy_tau", "closes over", "kind 'default' must be that of 0.8.0")
        for name, wanted in zip(changes, told, strict=True):
            with monkeypatch.context() as changed:
                changed.setattr(loss, name.strip(), changes[name])
                with pytest.raises(RuntimeError, match=wanted):
                    adapter.enable(any_version=True)
        monkeypatch.delattr(loss, "setup_rl_loss_fn")
        with pytest.raises(RuntimeError, match="must have setup_rl_loss_fn"):
            adapter.enable(any_version=True)
    finally:
        adapter.disable()


BAD_OPTIONS = [
    ({"kind": "none"}, ValueError, "kind must be one of"),
    ({"kind": "default", "clip_low": 0.1}, TypeError, "kind 'default' has the options .* got clip_low"),
    ({"kind": "ipo", "kl_tau": -1}, ValueError, "kl_tau must be at least 0, got -1"),
    ({"kind": "kl_cov"}, ValueError, "kind must not be 'kl_cov': it ranks"),
    ({"kind": "gmpo"}, ValueError, "kind must not be 'gmpo'"),
    ({"kind": "dapo", "aggregate": "token_mean"}, ValueError, "aggregate must be 'token_sum'"),
    ({"kind": "dapo", "entropy_coef": 0.1}, ValueError, "entropy_coef must be 0"),
    ({"kind": "dapo", "sampler_correction": "tis"}, ValueError, "sampler_correction must be 'none'"),
    ({"kind": "dapo", "kl_coef": 0.1}, ValueError, "kl_coef must be 0 where there are weights"),
    ({"kind": "dapo", "epsilon": 0.1}, TypeError, "epsilon"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=lambda x: str(x)[:30])
def test_options_that_are_refused(host, options, error, message: str) -> None:
    config = host.CustomLossConfig(import_path="trajkern.integrations.prime_rl.policy_loss", kwargs=options)
    with pytest.raises(error, match=message):
        _outcome(adapter.compute_loss, _batch(0), host.setup_rl_loss_fn(config))


def test_what_prime_rl_never_gives(host) -> None:
    loss_fn, batch = host.setup_rl_loss_fn(host.DefaultLossConfig()), _batch(0)

    def refused(message: str, error=ValueError, **changed) -> None:
        with pytest.raises(error, match=message):
            adapter.compute_loss(**(batch | SCALES | {"rl_loss_fn": loss_fn} | changed))

    refused("trainer_logprobs must hold at least one sequence", trainer_logprobs=[])
    refused("advantages must hold 6 sequences, as trainer_logprobs does; got 5", advantages=batch["advantages"][:5])
    refused("advantages must hold 6 sequences.* got None", advantages=None)
    refused(
        r"ce_weights\[0\] must have shape \[L\] = \[7\], got \[1\]",
        ce_weights=batch["ce_weights"][1:] + batch["ce_weights"][:1],
    )
    refused(r"loss_mask\[0\] must be bool, got torch.float32", TypeError, loss_mask=batch["advantages"])
    refused(r"advantages\[0\] must be a tensor, got 0.5", TypeError, advantages=[0.5] * 6)
    refused("ref_logprobs must be given where ref_kl_weights are not all 0", ref_logprobs=None)
    refused("ce_scale must be greater than 0, got 0", ce_scale=0)
    kinds = host.CustomLossConfig(import_path="trajkern.integrations.prime_rl.policy_loss", kwargs={"kind": "dapo"})
    negative = [-x for x in batch["rl_weights"]]
    refused("weights of tokens must not be negative", rl_weights=negative, rl_loss_fn=host.setup_rl_loss_fn(kinds))
