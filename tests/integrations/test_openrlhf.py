"""OpenRLHF's log-probs and policy loss: trajkern's beside its own, on ragged padded batches."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import trajkern as tk
from tests.credit.conftest import rollouts_of
from trajkern import credit
from trajkern.integrations import openrlhf as adapter

ROOT = Path(__file__).resolve().parents[2]
NEEDS = (
    "deepspeed",
    "flash_attn",
    "flash_attn.bert_padding",
    "flash_attn.utils",
    "flash_attn.utils.distributed",
    "pylatexenc",
)
CORRECTIONS = [
    {},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": (0.8, 1.3)},
    {"is_correction_level": "token", "is_correction_mode": "clip", "is_correction_threshold": [0.0, 1.1]},
    {"is_correction_level": "token", "is_correction_mode": "mask", "is_correction_threshold": (0.8, 1.3)},
    {"is_correction_level": "token", "is_correction_gating": "binary_kl", "is_correction_threshold": (0, 0.01)},
    {"is_correction_level": "token", "is_correction_gating": "tv", "is_correction_threshold": (0, 0.05)},
    {"is_correction_level": "seq", "is_correction_threshold": (0.95, 1.05)},
    {"is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": (0, 0.02)},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0, 0.05)},
]


@pytest.fixture(scope="module")
def models(stand_ins):
    """``openrlhf.models``, without what distributes and packs."""
    if find_spec("openrlhf") is None:
        pytest.skip("openrlhf is not installed")
    with stand_ins(*NEEDS):
        return importlib.import_module("openrlhf.models")


@pytest.mark.parametrize("shape", [(3, 7, 101), (11, 65)])
def test_log_probs(models, shape: tuple[int, ...]) -> None:
    utils = sys.modules["openrlhf.models.utils"]
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*shape, generator=g)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=g)
    for temperature in (1.0, 0.6):
        outcomes = []
        for function in (utils.log_probs_from_logits, adapter.log_probs_from_logits):
            x = logits.clone().requires_grad_()
            out = function(x * 1.0, labels, temperature=temperature)
            out.cos().sum().backward()
            outcomes.append((out.detach(), x.grad))
        for theirs, ours in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    half = adapter.log_probs_from_logits(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half, utils.log_probs_from_logits(logits.bfloat16(), labels).float(), rtol=0.02, atol=0.02
    )


def _results(loss, b, dtype, **info):
    new = b.new.clone().requires_grad_()
    rollout = b.old + 0.3 * b.values.tanh()
    out = loss(new, b.old, b.advantages, action_mask=b.mask, rollout_log_probs=rollout.clamp(max=-1e-3), **info)
    (3 * out[0]).backward()
    return [x if x is None else x.detach() for x in out], new.grad


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(str(x) for x in c.values()) or "off")
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_loss(models, padded_batch, kind: str, correction: dict, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    theirs_of, b = models.loss.PolicyLoss, padded_batch(4, dtype)
    b.old[0, ::3] -= 22 if kind == "ppo" else 0
    for token_level in (True, False):
        for dual in (None, 1.5):
            options = {
                "clip_eps_low": 0.1,
                "clip_eps_high": 0.25,
                "dual_clip": dual,
                "token_level_loss": token_level,
                "policy_loss_type": kind,
            } | correction
            for info in ({}, {"dp_size": 4, "batch_num_tokens": 333.0, "global_batch_size": 50.0}, {"dp_size": 2}):
                theirs, their_grad = _results(theirs_of(**options), b, dtype, **info)
                ours, our_grad = _results(adapter.PolicyLoss(**options), b, dtype, **info)
                for x, y in zip(ours, theirs, strict=True):
                    assert (x is None) == (y is None)
                    if y is not None:
                        torch.testing.assert_close(x.double(), y.double(), **tolerance)
                torch.testing.assert_close(our_grad[b.mask], their_grad[b.mask], **tolerance)
                assert not our_grad[~b.mask].any()


def test_without_a_mask_and_without_a_token(models, padded_batch) -> None:
    b = padded_batch(1, torch.float32)
    ours, theirs = (loss()(b.new, b.old, b.advantages)[:3] for loss in (adapter.PolicyLoss, models.loss.PolicyLoss))
    torch.testing.assert_close(ours, theirs)
    empty = adapter.PolicyLoss()(b.new, b.old, b.advantages, torch.zeros_like(b.mask))
    assert [float(x) for x in empty[:3]] == [0, 0, 0] and empty[3:] == (None, None)


@pytest.mark.parametrize("token_level", [True, False])
def test_a_credit_in_a_loop_of_ones_own(token_level: bool) -> None:
    """Its advantages padded, its mask as the actions: the loss of ``loss_inputs``."""
    x = rollouts_of(0)
    found = (credit.outcome() + credit.spans("call")).gate("ok")(x)
    new, old = 0.3 * x.teacher_logprobs - 0.5, x.batch.sampler_logprobs
    kind = tk.PolicyLoss("grpo", aggregate="token_mean" if token_level else "seq_mean_token_mean")
    expected, _ = tk.policy_loss(new, old, cu_seqlens=x.batch.cu_seqlens, config=kind, **found.loss_inputs())
    padded = [x.batch.to_padded(y) for y in (new, old, found.advantages, found.mask)]
    loss = adapter.PolicyLoss(token_level_loss=token_level)(*padded[:3], action_mask=padded[3])[0]
    torch.testing.assert_close(loss, expected)
    assert float(expected) != 0 and not bool(found.keep.all())


def test_enable_and_disable(models, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {
        (holder, name): vars(sys.modules[holder])[name]
        for name, holders in adapter.HOLDERS.items()
        for holder in holders[:2]
    }
    trainer = type(sys)("ppo_actor")
    monkeypatch.setitem(sys.modules, adapter.HOLDERS["PolicyLoss"][2], trainer)
    trainer.PolicyLoss = models.PolicyLoss
    try:
        adapter.enable()
        with adapter.enable() as handle:
            for holder, name in held:
                assert vars(sys.modules[holder])[name] is getattr(adapter, name)
            assert trainer.PolicyLoss is adapter.PolicyLoss and "stands in for log_probs_from_logits of" in repr(handle)
        assert trainer.PolicyLoss is models.PolicyLoss
    finally:
        adapter.disable()
    adapter.disable()
    assert {key: vars(sys.modules[key[0]])[key[1]] for key in held} == held
    assert trainer.PolicyLoss is models.PolicyLoss
    monkeypatch.setattr("trajkern.integrations._adapter.version", lambda _: "0.12.0")
    with pytest.warns(UserWarning, match=r"tested with openrlhf 0\.11\.2, not with 0\.12\.0"):
        adapter.enable()
    adapter.disable()
    monkeypatch.setattr(models.loss.PolicyLoss, "__init__", lambda self, clip_eps_low, loss_kind: None)
    with pytest.raises(RuntimeError, match=r"openrlhf's PolicyLoss must take \(clip_eps_low, clip_eps_high"):
        adapter.enable()


BAD = [
    ({"policy_loss_type": "reinforce"}, "policy_loss_type must be one of"),
    ({"is_correction_level": "row"}, "is_correction_level must be one of"),
    ({"is_correction_mode": "drop"}, "is_correction_mode must be one of"),
    ({"is_correction_gating": "kl"}, "is_correction_gating must be one of"),
    ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "'clip' needs is_correction_level 'token'"),
    ({"is_correction_level": "token", "is_correction_gating": "tv"}, "must begin with 0 for 'tv'"),
    ({"is_correction_threshold": (1.0,)}, r"must be \(low, high\)"),
    ({"dual_clip": 0.9}, "dual_clip must be"),
]


@pytest.mark.parametrize("options, message", BAD)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.PolicyLoss(**options)


def test_bad_arguments(padded_batch) -> None:
    b = padded_batch(0)
    with pytest.raises(ValueError, match="rollout_log_probs must be given where is_correction_level is 'token'"):
        adapter.PolicyLoss(is_correction_level="token")(b.new, b.old, b.advantages, b.mask)
    with pytest.raises(ValueError, match="advantages must have the mask's shape"):
        adapter.PolicyLoss()(b.new, b.old, b.advantages[:, 0], b.mask)
    with pytest.raises(ValueError, match="action_mask must hold 0 and 1 alone, which choose tokens; got 0.5"):
        adapter.PolicyLoss()(b.new, b.old, b.advantages, b.mask * 0.5)


def test_page(models, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/openrlhf.md: its script starts Ray with a hook that enables the adapter, then runs OpenRLHF's program."""
    page = (ROOT / "docs" / "openrlhf.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.S | re.M)
    (script,) = (text for language, text in blocks if language == "python")
    before, after = (shlex.split(text) for language, text in blocks if not language)
    started: list = []

    def init(runtime_env: dict) -> None:
        module, name = runtime_env["worker_process_setup_hook"].rsplit(".", 1)
        getattr(importlib.import_module(module), name)()

    ray = type(sys)("ray")
    ray.init = init
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr("runpy.run_module", lambda name, run_name: started.append((name, run_name)))
    try:
        exec(script, {})
        assert models.PolicyLoss is adapter.PolicyLoss
    finally:
        adapter.disable()
    assert started == [(before[2], "__main__")] and find_spec("openrlhf.cli") is not None
    program = Path(find_spec("openrlhf").origin or "").parent / "cli" / "train_ppo_ray.py"
    assert f'"{before[3]}"' in program.read_text() and "if not ray.is_initialized()" in program.read_text()
    assert before[3:] == after[2:]
