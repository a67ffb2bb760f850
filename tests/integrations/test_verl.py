"""verl's policy losses: trajkern's beside verl's own, loss, gradient and metrics, in every aggregation mode."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import trajkern as tk
from trajkern.integrations import verl as adapter

ROOT = Path(__file__).resolve().parents[2]
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
GLOBAL = {"dp_size": 3, "batch_num_tokens": 501, "global_batch_size": 77, "loss_scale_factor": 40}


def _config(**changes):
    actor = importlib.import_module("verl.workers.config.actor")
    policy = actor.PolicyLossConfig(**changes.pop("policy_loss", {}))
    options = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.3, "clip_ratio_c": 1.6} | changes
    return actor.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **options
    )


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    # verl adds 1e-8 to counts and to a variance, which float64 sees
    return {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}


def test_every_loss_of_verl_has_a_counterpart(core) -> None:
    theirs = {"trajkern_" + name for name in core.POLICY_LOSS_REGISTRY if not name.startswith("trajkern_")}
    estimators, losses = adapter.register()
    assert theirs < set(losses) and set(losses) == {n for n in core.POLICY_LOSS_REGISTRY if n.startswith("trajkern_")}
    assert set(estimators) == {n for n in core.ADV_ESTIMATOR_REGISTRY if n.startswith("trajkern_")}


def _losses(core, name: str, b: SimpleNamespace, mode: str, config, weights):
    out = []
    for prefix in ("", "trajkern_"):
        new = b.new.clone().requires_grad_()
        torch.manual_seed(0)
        loss, metrics = core.get_policy_loss_fn(prefix + name)(
            old_log_prob=b.old,
            log_prob=new,
            advantages=b.advantages,
            response_mask=b.mask,
            loss_agg_mode=mode,
            config=config,
            rollout_is_weights=weights,
        )
        value = loss.detach().clone()
        loss -= 0.5 * new[b.mask].sum() * 0  # verl's trainer adds the entropy in place
        (2 * loss).backward()
        out.append((value, new.grad, metrics))
    return out


def _compare(pair, mask, dtype) -> None:
    (theirs, their_grad, their_metrics), (ours, our_grad, our_metrics) = pair
    torch.testing.assert_close(ours, theirs, **_tolerance(dtype))
    torch.testing.assert_close(our_grad[mask], their_grad[mask], **_tolerance(dtype))
    assert not our_grad[~mask].any()
    assert our_metrics.keys() == their_metrics.keys()
    for name, value in their_metrics.items():
        assert float(our_metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name


COV = {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.1, "clip_cov_ub": 2.0, "kl_cov_ratio": 0.1, "ppo_kl_coef": 0.7}
LOSSES = {
    "vanilla": {},
    "dppo_tv": {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08, "clip_ratio_c": 1.2},
    "dppo_kl": {"clip_ratio_low": 0.002, "clip_ratio_high": 0.004, "clip_ratio_c": 1.2},
    "gspo": {"clip_ratio_low": 0.01},
    "sapo": {"tau_pos": 1.3, "tau_neg": 2.1},
    "gpg": {},
    "clip_cov": {"policy_loss": COV},
    "kl_cov": {"policy_loss": COV},
    "geo_mean": {},
    "dro": {"policy_loss": {"dro_beta": 0.3}},
    "cispo": {},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_policy_loss(core, padded_batch, name: str, mode: str) -> None:
    adapter.register()
    for dtype in (torch.float64, torch.float32):
        b = padded_batch(11, dtype)
        for info in ({}, GLOBAL):
            config = _config(**{**LOSSES[name], "global_batch_info": dict(info)})
            for weights in (None, b.weights):
                _compare(_losses(core, name, b, mode, config, weights), b.mask, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_zero_leave_the_metrics_alone(core, padded_batch, name: str, mode: str) -> None:
    """IcePop's, which are 0 outside of its band."""
    adapter.register()
    for dtype in (torch.float64, torch.float32):
        b = padded_batch(11, dtype)
        inside = (b.weights > 0.7) & (b.weights < 1.4)
        weights = torch.where(inside, b.weights, 0)
        assert 0 < inside[b.mask].sum() < b.mask.sum()
        config = _config(**LOSSES[name])
        _compare(_losses(core, name, b, mode, config, weights), b.mask, dtype)


def test_large_ratios(core, padded_batch) -> None:
    """Beyond a log-ratio of 20 vanilla has no gradient; gspo's mean is cut at 10; dppo truncates at clip_ratio_c."""
    b = padded_batch(3)
    b.old[0] -= 30
    b.old[1, ::2] += 25
    b.old[2] -= 12
    for name in ("vanilla", "gspo", "dppo_tv", "sapo", "cispo"):
        _compare(_losses(core, name, b, "token-mean", _config(), None), b.mask, torch.float64)


@pytest.mark.parametrize(
    "correction",
    [
        {"loss_type": "ppo_clip", "rollout_is": "token", "bypass_mode": True},
        {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 1.3},
        {"loss_type": "reinforce", "rollout_is": None, "rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.9_1.1"},
    ],
    ids=["clip", "weights", "rejection"],
)
def test_bypass_mode(core, padded_batch, correction: dict) -> None:
    b = padded_batch(2)
    algorithm = importlib.import_module("verl.trainer.config.algorithm")
    config = _config(policy_loss={"rollout_correction": algorithm.RolloutCorrectionConfig(**correction)})
    pair = _losses(core, "bypass_mode", b, "seq-mean-token-mean", config, None)
    assert "actor/ppo_kl" in pair[0][2]
    _compare(pair, b.mask, torch.float64)


def test_losses_that_verl_lacks(core, padded_batch) -> None:
    b = padded_batch(8)
    a = b.advantages[:, :1].expand(b.advantages.shape)
    packed, cu = b.mask, torch.cat([torch.zeros(1, dtype=torch.long), b.mask.sum(1).cumsum(0)])
    for kind, aggregate in (("luspo", "seq_mean_token_sum"), ("vespo", "token_mean")):
        got, _ = core.get_policy_loss_fn("trajkern_" + kind)(b.old, b.new, a, b.mask, config=_config())
        spec = tk.PolicyLoss(kind, clip_low=0.15, clip_high=0.3, aggregate=aggregate)
        expected, _ = tk.policy_loss(b.new[packed], b.old[packed], a[packed], cu, config=spec, per_token=True)
        torch.testing.assert_close(got, expected)


def test_tokens_drawn_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there should be, candidates only, each as often as another."""
    losses = importlib.import_module("trajkern.integrations._verl_losses")
    torch.manual_seed(0)
    candidates = torch.arange(12) % 3 > 0
    for count in (1.0, 3.0, 8.0, 20.0):
        drawn = losses._drawn(candidates, torch.tensor(count, dtype=torch.float64))
        assert drawn.sum() == min(count, 8) and not (drawn & ~candidates).any()
    share = sum(losses._drawn(candidates, torch.tensor(2.0)).double() for _ in range(2000)) / 2000
    torch.testing.assert_close(share[candidates], torch.full((8,), 0.25).double(), rtol=0, atol=0.05)


def test_metrics_stay_where_they_are_but_for_distillation(core, padded_batch) -> None:
    """verl reads its actor's metrics itself, and averages those of a distillation loss as numbers."""
    b, function = padded_batch(0), core.get_policy_loss_fn("trajkern_vanilla")
    _, metrics = function(b.old, b.new, b.advantages, b.mask, config=_config())
    assert {type(x) for x in metrics.values()} == {torch.Tensor} and not any(x.requires_grad for x in metrics.values())
    options = vars(_config()) | {"policy_loss_mode": "vanilla", "get": lambda name, default: default}
    _, numbers = function(b.old, b.new, b.advantages, b.mask, config=SimpleNamespace(**options))
    assert numbers.keys() == metrics.keys() and {type(x) for x in numbers.values()} == {float}


def test_empty_batch_is_zero(core, padded_batch) -> None:
    b = padded_batch(0)
    b.mask[:] = False
    new = b.new.requires_grad_()
    loss, metrics = core.get_policy_loss_fn("trajkern_vanilla")(b.old, new, b.advantages, b.mask, config=_config())
    loss.backward()
    assert loss == 0 and not new.grad.any() and {float(x) for x in metrics.values()} == {0.0}


def test_through_verls_trainer(core, padded_batch) -> None:
    """verl's own ``ppo_loss`` with a KL and an entropy term: the same loss, gradient and metrics by either name."""
    losses = importlib.import_module("verl.workers.utils.losses")
    tensordict, b = importlib.import_module("tensordict"), padded_batch(6, torch.float32)
    lengths = b.mask.shape[1] - b.mask.flip(1).long().argmax(1)
    lengths[4] = 1  # no row may be empty there; it stays masked

    def jagged(x: torch.Tensor, extra: int = 0) -> torch.Tensor:
        rows = [torch.cat([x.new_zeros(extra), row[:n]]) for row, n in zip(x, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    prompts = torch.nested.as_nested_tensor([torch.zeros(2).long()] * len(lengths), layout=torch.jagged)
    fields = {
        "responses": b.mask.long(),
        "response_mask": b.mask.long(),
        "old_log_probs": b.old,
        "advantages": b.advantages,
        "ref_log_prob": b.old * 1.1,
    }
    jagged_fields = {"prompts": prompts} | {name: jagged(x) for name, x in fields.items()}
    data = tensordict.TensorDict(jagged_fields, batch_size=[len(lengths)])
    for key, value in {"dp_size": 2, "batch_num_tokens": 400, "global_batch_size": 50}.items():
        importlib.import_module("verl.utils.tensordict_utils").assign_non_tensor(data, **{key: value})
    outcomes = []
    for name in ("vanilla", "trajkern_vanilla"):
        config = _config(policy_loss={"loss_mode": name}, use_kl_loss=True, entropy_coeff=0.01)
        leaves = [jagged(x, 2).values().roll(-1).requires_grad_() for x in (b.new, b.values)]
        loss, metrics = losses.ppo_loss(config, {"log_probs": leaves[0], "entropy": leaves[1]}, data)
        loss.backward()
        outcomes.append((loss, *(x.grad for x in leaves), metrics))
    (*theirs, their_metrics), (*ours, our_metrics) = outcomes
    torch.testing.assert_close(ours, theirs)
    assert {k: v.aggregate() for k, v in our_metrics.items() if k != "kl_coef"} == pytest.approx(
        {k: v.aggregate() for k, v in their_metrics.items() if k != "kl_coef"}, rel=1e-5, abs=1e-6
    )
    assert float(theirs[1].abs().sum()) > 0


def test_register_replace_and_undo(core, padded_batch) -> None:
    adapter.unregister()
    registries = core.ADV_ESTIMATOR_REGISTRY, core.POLICY_LOSS_REGISTRY
    before, function = [dict(r) for r in registries], core.compute_gae_advantage_return
    adapter.register(replace=True)
    adapter.register(replace=True)
    assert core.compute_gae_advantage_return is not function
    b = padded_batch(4)
    replaced = _losses(core, "vanilla", b, "token-mean", _config(), None)
    assert torch.equal(replaced[0][1], replaced[1][1])
    for name, old in before[0].items():
        assert registries[0][name] is not old
    assert all(registries[1][name] is not old for name, old in before[1].items())
    with adapter.register() as (estimators, losses):  # without replace: verl's own names are verl's again
        assert core.compute_gae_advantage_return is function and registries[0]["gae"] is before[0]["gae"]
        assert {*estimators} == registries[0].keys() - before[0].keys() and len(losses) > 1
    assert [dict(r) for r in registries] == before
    adapter.unregister()
    assert [dict(r) for r in registries] == before


@pytest.mark.filterwarnings("error")
def test_another_version_is_warned_of_once(core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trajkern.integrations._adapter.version", lambda _: "9.9.9")
    monkeypatch.setattr("trajkern.integrations._adapter._warned", set())
    adapter.register(any_version=True)
    with pytest.warns(UserWarning, match=r"tested with verl 0\.9\.1, not with 9\.9\.9.*any_version=True"):
        adapter.register()
    adapter.enable_head()
    adapter.disable_head()


def test_a_host_that_does_not_fit_is_refused(core, monkeypatch: pytest.MonkeyPatch) -> None:
    head = importlib.import_module(adapter.HEAD)

    def moved(hidden, weight, labels, reduction="none", temperature=1.0): ...

    with monkeypatch.context() as patch:
        patch.setattr(head, "linear_cross_entropy", moved)
        with pytest.raises(RuntimeError, match=r"verl's linear_cross_entropy must take .*takes \(hidden, weight, lab"):
            adapter.enable_head()
    with monkeypatch.context() as patch:
        patch.delattr(head, "linear_cross_entropy")
        with pytest.raises(RuntimeError, match="kernel.linear_cross_entropy must have linear_cross_entropy, which"):
            adapter.enable_head()
    adapter.unregister()
    for registry, name, added in (
        (core.POLICY_LOSS_REGISTRY, "gspo", "trust_region"),
        (core.ADV_ESTIMATOR_REGISTRY, "rloo", "discount"),
    ):
        theirs = registry[name]
        wider = eval(f"lambda {', '.join([*inspect.signature(theirs).parameters][:4])}, {added}: None")
        monkeypatch.setitem(registry, name, wider)
        with pytest.raises(RuntimeError, match=f"verl's {name} must take .*this version takes .*{added}"):
            adapter.register()
        monkeypatch.setitem(registry, name, theirs)


BAD = {
    "config must be the actor's": {"config": None},
    "loss_agg_mode must be one of": {"loss_agg_mode": "mean"},
    r"response_mask must have shape \[B, L\]": {"response_mask": torch.ones(3)},
    "advantages must have the mask's shape": {"advantages": torch.ones(23)},
    "rollout_is_weights must be a tensor": {"rollout_is_weights": 1.0},
    "rollout_is_weights must be at least 0, got -2": {"rollout_is_weights": torch.full((23, 19), -2.0)},
    "response_mask must hold 0 and 1 alone, .*got 0.25": {"response_mask": torch.full((23, 19), 0.25)},
    "response_mask must hold 0 and 1 alone, .*got nan": {"response_mask": torch.full((23, 19), torch.nan)},
    "response_mask must hold 0 and 1 alone, .*got 2": {"response_mask": torch.full((23, 19), 2)},
    "must give the global count for token-mean where dp_size is 2": {"info": {"dp_size": 2}},
    r"not supported: \['extra'\]": {"info": {"extra": 2}},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_loss_arguments(core, padded_batch, message: str) -> None:
    b, change = padded_batch(0), dict(BAD[message])
    arguments = {
        "old_log_prob": b.old,
        "log_prob": b.new,
        "advantages": b.advantages,
        "response_mask": b.mask,
        "config": _config(global_batch_info=change.pop("info", {})),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        core.get_policy_loss_fn("trajkern_vanilla")(**arguments | change)


def test_unsupported_options_say_so(core, padded_batch) -> None:
    b = padded_batch(0)
    rest = (b.old, b.new, b.advantages, b.mask, "token-mean")
    for name, config, message in (
        ("dro", _config(), "dro_beta must be positive"),
        ("dppo_tv", _config(clip_ratio_c=40.0), r"clip_ratio_c must lie in \[1, 20\]"),
        ("vanilla", _config(clip_ratio_low=-0.5), "clip_ratio_low must be at least 0"),
        ("vanilla", _config(clip_ratio_low=None, clip_ratio=-0.5), "clip_ratio must be at least 0"),
        ("vanilla", _config(clip_ratio_c=0.5), "clip_ratio_c must be greater than 1"),
        ("sapo", _config(tau_pos=-1.0), "tau_pos must be"),
        ("vanilla", _config(global_batch_info={"batch_num_tokens": 0}), "config.global_batch_info must be greater"),
        ("bypass_mode", SimpleNamespace(policy_loss={}), "rollout_correction must be given"),
        ("bypass_mode", SimpleNamespace(policy_loss={"rollout_correction": {"loss_type": "x"}}), "loss_type must be"),
    ):
        with pytest.raises(ValueError, match=message):
            core.get_policy_loss_fn("trajkern_" + name)(*rest, config)


IN_ANOTHER_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from conftest import stand_in_modules, VERL_NEEDS
with stand_in_modules(*VERL_NEEDS):
    import verl
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
from hydra import compose, initialize_config_dir
with initialize_config_dir(verl.version_folder + "/trainer/config", version_base=None):
    config = compose("ppo_trainer", sys.argv[1:])
actor = config.actor_rollout_ref
assert actor.model.use_fused_kernels
environment = config.ray_kwargs.ray_init.runtime_env.get("env_vars", {{}})
assert not environment or environment.VERL_USE_EXTERNAL_MODULES == "setup_trajkern", environment
functions = get_adv_estimator_fn(config.algorithm.adv_estimator), get_policy_loss_fn(actor.actor.policy_loss.loss_mode)
print(*(f.__module__ for f in (*functions, FusedLinearForPPO)))
"""


@pytest.mark.slow  # two processes that import verl
def test_page(imported_verl, tmp_path) -> None:
    """docs/verl.md: both commands' options are composed by verl's own configuration and lead to the right functions."""
    page = (ROOT / "docs" / "verl.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.S | re.M)
    module = next(text for language, text in blocks if language == "python")
    commands = [shlex.split(text.replace("\\\n", " ")) for language, text in blocks if not language][:2]
    commands[1] += re.findall(r"`(\+ray_kwargs\S+)`", page)
    (tmp_path / "setup_trajkern.py").write_text(module)
    code = IN_ANOTHER_PROCESS.format(tests=str(Path(__file__).parent))
    runs = []
    for words in commands:
        at = words.index("python")
        assert words[at : at + 3] == ["python", "-m", "verl.trainer.main_ppo"]
        environment = os.environ | dict(word.split("=", 1) for word in words[:at])
        environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
        command = [sys.executable, "-c", code, *words[at + 3 :]]
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    theirs, ours = (run.communicate(timeout=120)[0].split() for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    assert len(theirs) == len(ours) == 3
    assert all(name.startswith("verl.") for name in theirs) and all(name.startswith("trajkern.") for name in ours)


def test_page_lists_every_name(core) -> None:
    page = (ROOT / "docs" / "verl.md").read_text()
    estimators, losses = adapter.register()
    for kind, names in (("estimators", estimators), ("losses", losses)):
        (row,) = re.findall(rf"^\| {kind} \| (.*) \|$", page, re.M)
        assert set(re.findall(r"`(\w+)`", row)) == {name.removeprefix("trajkern_") for name in names}
