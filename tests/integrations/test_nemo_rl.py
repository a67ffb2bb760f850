"""NeMo-RL's clipped policy loss: trajkern's beside its formulas row by row (0.7.0; commit 7ea279a)."""

from __future__ import annotations

import enum
import importlib
import pickle
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.nemo_rl_formula import EXTREMES, ClippedPGLossConfig, ClippedPGLossFn, padded
from trajkern.integrations import _adapter
from trajkern.integrations import nemo_rl as adapter

TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}
COUNTS = {"global_valid_seqs": torch.tensor(9.0), "global_valid_toks": torch.tensor(61.0)}


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    SEQUENCES = "sequences"
    NONE = "none"


def _written_down() -> dict[str, ModuleType]:
    """NeMo-RL's modules as far as the adapter reads them."""
    names = ["nemo_rl", "nemo_rl.algorithms", *adapter.HOLDERS[:3], adapter.INTERFACES]
    modules = {name: ModuleType(name) for name in names}
    for name in adapter.HOLDERS[:3]:
        modules[name].ClippedPGLossFn, modules[name].ClippedPGLossConfig = ClippedPGLossFn, ClippedPGLossConfig
    for kind in (LossType, LossInputType, MetricNormalizer):
        setattr(modules[adapter.INTERFACES], kind.__name__, kind)
    return modules


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """NeMo-RL's losses where it is installed, else as they are written down above."""
    if find_spec("nemo_rl") is None:
        for name, module in _written_down().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(_adapter, "version", lambda package: "0.6.0+7ea279a")
    return importlib.import_module(adapter.FUNCTIONS)


def _batch(seed: int, rows: int = 5, length: int = 13, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Ragged rows, one of them left out and one without a token that takes part."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(rows, length, generator=g, dtype=torch.float64)  # noqa: E731
    old = -draw().abs() * 2
    token_mask = (torch.rand(rows, length, generator=g) < 0.7).long()
    token_mask[3, 1:] = 0
    sample_mask = torch.ones(rows, dtype=dtype)
    sample_mask[1] = 0
    batch = {
        "new": (old + 0.3 * draw())[:, 1:],
        "prev_logprobs": old,
        "generation_logprobs": old + 0.15 * draw(),
        "reference_policy_logprobs": old + 0.8 * draw(),
        "advantages": draw(),
    }
    batch = {name: x.to(dtype) for name, x in batch.items()}
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, -1.0])
    return batch | {"token_mask": token_mask, "sample_mask": sample_mask, "rewards": rewards}


def _outcome(loss_fn, batch: dict[str, Any], **counts: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    new = batch["new"].clone().requires_grad_()
    data = {name: x for name, x in batch.items() if name != "new"}
    loss, metrics = loss_fn(next_token_logprobs=new, data=data, **(COUNTS | counts))
    (3 * loss).backward()
    return loss.detach(), new.grad, metrics


SEQUENCES = {"token_level_loss": False, "sequence_level_importance_ratios": True}
WEIGHED = {"use_importance_sampling_correction": True}


def _truncated(kind: str, high: float, low: float | None = None) -> dict[str, Any]:
    names = ("type", "ratio", "ratio_min")
    return WEIGHED | {f"truncated_importance_sampling_{x}": y for x, y in zip(names, (kind, high, low), strict=True)}


CASES: list[dict[str, Any]] = [
    {},
    {"ratio_clip_min": 0.1, "ratio_clip_max": 0.28, "ratio_clip_c": 1.3, "reference_policy_kl_penalty": 0.0},
    {"token_level_loss": False, "positive_example_nll_weight": 0.4},
    SEQUENCES | {"ratio_clip_min": 0.01, "ratio_clip_max": 0.02, "ratio_clip_c": 1.05} | WEIGHED,
    SEQUENCES | _truncated("tis", 1.2, 0.9),
    SEQUENCES | _truncated("icepop", 1.5, 0.6),
    {"use_cispo": True, "ratio_clip_min": 0.1, "use_kl_in_reward": True},
    {"disable_ppo_ratio": True, "ratio_clip_c": 3.0},
    {"force_on_policy_ratio": True, "ratio_clip_c": 3.0, "token_level_loss": False} | WEIGHED,
    WEIGHED | {"reference_policy_kl_type": "k1"},
    _truncated("tis", 1.1) | {"reference_policy_kl_type": "k2", "kl_input_clamp_value": 0.5},
    _truncated("icepop", 1.2, 0.85) | {"disable_ppo_ratio": True, "kl_output_clamp_value": 0.2},
    _truncated("seq-mask-tis", 1.02, 0.98) | {"token_level_loss": False},
    {"use_on_policy_kl_approximation": True, "kl_input_clamp_value": None, "kl_output_clamp_value": None},
    {"use_on_policy_kl_approximation": True, "kl_input_clamp_value": 0.6, "kl_output_clamp_value": 0.3},
]


def _close(ours: dict[str, float], theirs: dict[str, float], rel: float = 2e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert ours[name] == pytest.approx(x, rel=rel, abs=2e-6), name


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(f"{k}={x}" for k, x in o.items())[-70:] or "plain")
def test_the_loss_is_nemo_rls(host, options: dict[str, Any]) -> None:
    batch = _batch(3)
    cfg = host.ClippedPGLossConfig(**options)
    ours = _outcome(adapter.ClippedPGLossFn(cfg), batch)
    mine = _outcome(ClippedPGLossFn(ClippedPGLossConfig(**options)), batch)
    theirs = _outcome(host.ClippedPGLossFn(cfg), batch)
    if "sequence_level_importance_ratios" in options and host.ClippedPGLossFn is not ClippedPGLossFn:
        name = "sampling_importance_ratio"  # of the row that is left out too, and times the valid rows
        theirs[2][name] = mine[2][name]
    for expected in (mine, theirs):
        torch.testing.assert_close(ours[:2], expected[:2], **TOLERANCE)
        _close(ours[2], expected[2])
    assert float(ours[0]) != 0


def test_the_rows_mean_of_sampling_weights(host) -> None:
    cfg, batch = host.ClippedPGLossConfig(**(SEQUENCES | WEIGHED)), _batch(4)
    found = _outcome(adapter.ClippedPGLossFn(cfg), batch)[2]["sampling_importance_ratio"]
    mask = batch["token_mask"][:, 1:]
    apart = (batch["prev_logprobs"] - batch["generation_logprobs"])[:, 1:]
    assert found == pytest.approx(float(((apart * mask).sum(-1).exp() * batch["sample_mask"]).sum()) / 9)


@pytest.mark.parametrize("options", [{}, SEQUENCES | WEIGHED, _truncated("seq-mask-tis", 1.02, 0.98)], ids=str)
def test_packed_rows_one_by_one_are_the_padded_batch(host, options: dict[str, Any]) -> None:
    """As NeMo-RL's wrapper of packed sequences calls it: a row at a time, without its padding, summed."""
    batch, loss_fn = _batch(5), adapter.ClippedPGLossFn(host.ClippedPGLossConfig(**options))
    lengths = torch.tensor([13, 7, 2, 5, 11])
    batch["token_mask"] = batch["token_mask"] * (torch.arange(13) < lengths[:, None])
    whole = _outcome(loss_fn, batch)
    new = batch["new"].clone().requires_grad_()
    loss, told = 0, dict.fromkeys(whole[2], 0.0)
    for b, n in enumerate(lengths.tolist()):
        row = {k: x[b : b + 1, :n] if padded(x) else x[b : b + 1] for k, x in batch.items() if k != "new"}
        part, metrics = loss_fn(new[b : b + 1, : n - 1], row, *COUNTS.values())
        loss = loss + part
        told = {name: x + metrics[name] for name, x in told.items()}
    (3 * loss).backward()
    torch.testing.assert_close((loss.detach(), new.grad), whole[:2], **TOLERANCE)
    for name in told.keys() - set(EXTREMES):
        assert told[name] == pytest.approx(whole[2][name], rel=1e-6), name


def test_local_counts_and_no_token(host) -> None:
    for options, (rows, tokens) in (({}, (4, None)), ({"token_level_loss": False}, (None, 3))):
        batch, loss_fn = _batch(6), adapter.ClippedPGLossFn(host.ClippedPGLossConfig(**options))
        mask = batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]
        counted = {"global_valid_seqs": rows or batch["sample_mask"].sum(), "global_valid_toks": tokens or mask.sum()}
        local = _outcome(loss_fn, batch, global_valid_seqs=rows, global_valid_toks=tokens)
        torch.testing.assert_close(local, _outcome(loss_fn, batch, **counted), **TOLERANCE)
        batch["sample_mask"] = torch.zeros(5)
        loss, grad, metrics = _outcome(loss_fn, batch, global_valid_seqs=0, global_valid_toks=0)
        assert float(loss) == 0 and not grad.any()
        assert metrics["probs_ratio_min"] == torch.inf and metrics["probs_ratio_max"] == -torch.inf


def test_nothing_under_the_masks_is_read(host) -> None:
    for options in CASES:
        loss_fn, batch = adapter.ClippedPGLossFn(host.ClippedPGLossConfig(**options)), _batch(7)
        expected = _outcome(loss_fn, batch)
        kept = (batch["token_mask"] * batch["sample_mask"][:, None]) != 0
        for name in ("prev_logprobs", "generation_logprobs", "reference_policy_logprobs", "advantages"):
            batch[name] = torch.where(kept, batch[name], torch.nan)
        torch.testing.assert_close(_outcome(loss_fn, batch), expected, rtol=0, atol=0)


def test_unfiltered_log_probs_are_the_kls(host) -> None:
    """Where sampling is filtered, the KL term and its gradient are of the log-probs that are not."""
    batch = _batch(8)
    loss_fn = adapter.ClippedPGLossFn(host.ClippedPGLossConfig(reference_policy_kl_penalty=0.5))
    without = adapter.ClippedPGLossFn(host.ClippedPGLossConfig(reference_policy_kl_penalty=0.0))
    unfiltered = (batch["new"] - 0.4).requires_grad_()
    ours = _outcome(loss_fn, batch | {"curr_logprobs_unfiltered": unfiltered})
    moved = _outcome(loss_fn, batch | {"new": unfiltered.detach()})
    plain, moved_plain = _outcome(without, batch), _outcome(without, batch | {"new": unfiltered.detach()})
    torch.testing.assert_close(ours[0] - plain[0], moved[0] - moved_plain[0], **TOLERANCE)
    torch.testing.assert_close(unfiltered.grad, moved[1] - moved_plain[1], **TOLERANCE)


def test_what_nemo_rl_reads_of_a_loss(host) -> None:
    interfaces = sys.modules[adapter.INTERFACES]
    for options in CASES:
        cfg = host.ClippedPGLossConfig(**options)
        loss_fn = pickle.loads(pickle.dumps(adapter.ClippedPGLossFn(cfg, use_fused_linear_logprobs=True)))
        level = "TOKEN_LEVEL" if cfg.token_level_loss else "SEQUENCE_LEVEL"
        assert loss_fn.loss_type is getattr(interfaces.LossType, level)
        assert loss_fn.input_type is interfaces.LossInputType.LOGPROB and loss_fn.use_fused_linear_logprobs
        assert loss_fn.reference_policy_kl_penalty == (0 if cfg.use_kl_in_reward else cfg.reference_policy_kl_penalty)
        assert loss_fn.metric_normalizations.keys() == _outcome(loss_fn, _batch(0))[2].keys()
        if host.ClippedPGLossFn is not ClippedPGLossFn:
            assert loss_fn.metric_normalizations == host.ClippedPGLossFn(cfg).metric_normalizations


def test_each_metric_scales_with_its_count(host) -> None:
    for options in CASES:
        loss_fn = adapter.ClippedPGLossFn(host.ClippedPGLossConfig(**options))
        batch = _batch(9)
        once = _outcome(loss_fn, batch)[2]
        for kind, name in (("TOKENS", "global_valid_toks"), ("SEQUENCES", "global_valid_seqs")):
            twice = _outcome(loss_fn, batch, **{name: 2 * COUNTS[name]})[2]
            for metric, of in loss_fn.metric_normalizations.items():
                if metric == "loss" and options.get("positive_example_nll_weight"):
                    continue  # a part of it has a count of its own
                assert twice[metric] == pytest.approx(once[metric] / (2 if of.name == kind else 1)), metric


def test_enable_and_disable(host, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = host.ClippedPGLossFn
    try:
        adapter.enable(any_version=True)
        handle = adapter.enable(any_version=True)
        assert "NeMo-RL: trajkern stands in for ClippedPGLossFn of" in repr(handle)
        holders = [sys.modules[x] for x in adapter.HOLDERS if x in sys.modules]
        assert holders and all(x.ClippedPGLossFn is adapter.ClippedPGLossFn for x in holders)
    finally:
        handle.disable()
    assert all(x.ClippedPGLossFn is theirs for x in holders)


def test_a_version_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = _written_down()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(_adapter, "version", lambda package: "0.9.0+abc")
    losses = modules[adapter.FUNCTIONS]
    with pytest.warns(UserWarning, match=r"not with 0.9.0\+abc"):
        adapter.enable()
    adapter.disable()

    class Config:
        model_fields = ClippedPGLossConfig.model_fields | {"entropy_coef": None}

    class Loss(ClippedPGLossFn):
        def __call__(self, next_token_logprobs, data, temperature):
            return None

    for name, value, wanted in (
        ("ClippedPGLossConfig", Config, "entropy_coef are only on one side"),
        ("ClippedPGLossFn", Loss, "ClippedPGLossFn.__call__ must take"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(losses, name, value)
            with pytest.raises(RuntimeError, match=wanted):
                adapter.enable(any_version=True)


REFUSED = [
    ({"entropy_coef": 0.1}, "options that trajkern's loss does not know: entropy_coef"),
    ({"reference_policy_kl_type": "k4"}, "reference_policy_kl_type must be one of"),
    ({"ratio_clip_c": 1.0}, "ratio_clip_c must be greater than 1, got 1.0"),
    ({"sequence_level_importance_ratios": True}, "token_level_loss must be False"),
    ({"use_cispo": True, "disable_ppo_ratio": True}, "disable_ppo_ratio must not be given where use_cispo"),
    ({"use_cispo": True, "token_level_loss": False}, "token_level_loss must be True where use_cispo"),
    ({"truncated_importance_sampling_ratio": 2.0}, "truncated_importance_sampling_type must be given"),
    (_truncated("tis", 2.0) | {"use_importance_sampling_correction": False}, "correction must be True for"),
    (_truncated("clip", 2.0), "truncated_importance_sampling_type must be one of"),
    (_truncated("tis", 0.0), "truncated_importance_sampling_ratio must be positive"),
    (_truncated("icepop", 2.0), "truncated_importance_sampling_ratio_min must be given"),
    (_truncated("icepop", 2.0, 3.0), "ratio_min must be at most truncated_importance_sampling_ratio = 2.0, got 3.0"),
    (_truncated("seq-mask-tis", 2.0, 0.5) | SEQUENCES, "sequence_level_importance_ratios must be False for"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_options_that_are_refused(host, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter.ClippedPGLossFn(options)
    declared = SimpleNamespace(**options)
    with pytest.raises(ValueError, match=message):
        adapter.ClippedPGLossFn(declared)


def test_what_nemo_rl_never_gives(host) -> None:
    loss_fn = adapter.ClippedPGLossFn({"positive_example_nll_weight": 0.1})

    def refused(message: str, error=ValueError, without: str | None = None, **changed: Any) -> None:
        batch = _batch(0) | changed
        batch.pop(without, None)
        with pytest.raises(error, match=message):
            loss_fn(batch.pop("new"), batch, *COUNTS.values())

    refused(r"next_token_logprobs must have shape \[B, S-1\], got \[12\]", new=torch.zeros(12))
    refused(r"data\['token_mask'\] must have shape \[B, S\] = \[5, 13\], got \[5, 12\]", token_mask=torch.ones(5, 12))
    refused(r"data\['sample_mask'\] must have shape \[B\] = \[5\], got \[5, 1\]", sample_mask=torch.ones(5, 1))
    refused("must hold 0 and 1 alone", sample_mask=torch.full((5,), 0.5))
    refused("data must have 'prev_logprobs'", without="prev_logprobs")
    refused("data must have 'reference_policy_logprobs'", without="reference_policy_logprobs")
    refused(r"data\['advantages'\] must have shape \[B, S\] = \[5, 13\], got \[5\]", advantages=torch.ones(5))
    refused(r"data\['advantages'\] must be a tensor, got 1.0 .float", TypeError, advantages=1.0)
    refused(r"data\['rewards'\] must have shape \[B\] = \[5\], got \[4\]", rewards=torch.ones(4))
    refused(r"data\['curr_logprobs_unfiltered'\] must have shape", curr_logprobs_unfiltered=torch.ones(5, 13))
