"""AReaL's actor loss: trajkern's beside AReaL 1.0.4's own, and beside its formulas sequence by sequence."""

from __future__ import annotations

import importlib
import math
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.conftest import _StandIn
from trajkern.integrations import _adapter
from trajkern.integrations import areal as adapter

REAL = {  # of AReaL, what the actor's loss needs; the rest distributes, generates and logs
    *("areal.trainer.ppo.actor", "areal.trainer.ppo.stats", "areal.utils.constants", "areal.utils.data"),
    *("areal.utils.functional", "areal.utils.functional.functional"),
}
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}


class _Finder:
    """AReaL's packages without their ``__init__``, and a stand-in for all that is not in ``REAL``."""

    def __init__(self, root: str) -> None:
        self.root, self.theirs = root, ("areal", "torchdata", "einops")

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        wanted = name.split(".")[0] in self.theirs and name not in REAL
        return ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _StandIn(spec.name)
        if spec.name.split(".")[0] == "areal":
            module.__path__ = [f"{self.root}/{spec.name.replace('.', '/')}"]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.fixture(scope="module")
def actor():
    """``areal.trainer.ppo.actor``, whose loss is its own and whose log goes nowhere."""
    found = find_spec("areal")
    if found is None or found.origin is None:
        pytest.skip("areal is not installed")
    before, finder = set(sys.modules), _Finder(found.origin.rsplit("/", 2)[0])
    sys.meta_path.insert(0, finder)
    try:
        yield importlib.import_module("areal.trainer.ppo.actor")
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.split(".")[0] in finder.theirs:
                del sys.modules[name]


def _rejection(level="token", action="mask", metric="ratio", agg="mean", upper=1.3, lower=None) -> SimpleNamespace:
    return SimpleNamespace(level=level, action=action, metric=metric, agg=agg, upper=upper, lower=lower)


def _batch(seed: int, lengths=(6, 1, 9, 4, 13), dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Packed sequences, one of them fully masked, with a prompt before each."""
    g = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    draw = lambda: torch.randn(total, generator=g, dtype=torch.float64)  # noqa: E731
    old = -draw().abs()
    mask = torch.rand(total, generator=g) < 0.75
    mask[16:20] = False
    return {
        "new": (old + 0.3 * draw()).to(dtype),
        "logprobs": old.to(dtype),
        "prox_logp": (old + 0.2 * draw()).to(dtype),
        "teacher_logp": (old + 0.5 * draw()).to(dtype),
        "advantages": draw().to(dtype),
        "loss_mask": mask,
        "versions": torch.randint(-1, 6, (total,), generator=g),
        "cu_seqlens": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
    }


def _m2po(squares: list[float], threshold: float) -> list[bool]:
    """Which stay: the largest go one at a time until the mean of the rest is below the threshold."""
    order = sorted(range(len(squares)), key=lambda i: -squares[i])
    while len(order) > 1 and sum(squares[i] for i in order) / len(order) >= threshold:
        order.pop(0)
    return [i in order for i in range(len(squares))]


def _weights(prox: Tensor, old: Tensor, o: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """Of a sequence's tokens that take part: which stay, and with what weight."""
    d = prox - old
    value = {"ratio": d, "kl_k1": d, "kl_k2": d**2 / 2, "kl_k3": (-d).exp() - 1 + d}[o.metric]
    w = d.exp()
    if o.level == "sequence":
        w = d.mean().exp().expand_as(d) if o.metric == "ratio" else w
        value = {"sum": value.sum(), "mean": value.mean(), "max": value.max()}[o.agg].expand_as(d)
    value = value.exp() if o.metric == "ratio" else value
    inside = (value <= o.upper) & (value >= (-math.inf if o.lower is None else o.lower))
    if o.action == "mask":
        return inside, w
    bounded = w.clamp(o.lower or 0.0, o.upper)
    return torch.ones_like(inside), torch.where(inside, w, bounded) if o.level == "sequence" else bounded


def _formula(new: Tensor, x: dict[str, Any], o: adapter.GRPOLoss) -> Tensor:
    """The loss sequence by sequence, on the tokens of the mask alone."""
    old, prox, mask = x["logprobs"], x.get("prox_logp"), x["loss_mask"].bool()
    if prox is None:
        behind = o.current_version - x["versions"].double()
        share = torch.where((behind > 0) & (x["versions"] >= 0), (behind - 1) / behind, 0.0).clamp(0, 1)
        prox = old + share * (new.detach() - old)
    if o.m2_threshold is not None:
        kept = _m2po((old - prox)[mask].square().tolist(), o.m2_threshold)
        mask = mask.clone().masked_scatter(mask, torch.tensor(kept))
    count, total = max(int(mask.sum()), 1), new.new_zeros(())
    for start, end in zip(x["cu_seqlens"][:-1].tolist(), x["cu_seqlens"][1:].tolist(), strict=True):
        here = mask[start:end]
        tokens = (y[start:end][here] for y in (new, old, prox, x["advantages"]))
        n, q, p, a = tokens
        if not len(n):
            continue
        w = torch.ones_like(n)
        if o.rejection_sampling is not None:
            stay, w = _weights(p, q, o.rejection_sampling)
            n, q, p, a, w = (y[stay] for y in (n, q, p, a, w))
            if not len(n):
                continue
        d = n - (q if o.use_sapo_loss else p)
        if o.importance_sampling_level == "sequence":
            d, a = d.mean().expand_as(d), a.mean().expand_as(a)
        if o.use_sapo_loss:
            tau = torch.where(a > 0, a.new_tensor(o.sapo_tau_pos), a.new_tensor(o.sapo_tau_neg))
            total = total - (a * torch.sigmoid(tau * (d.exp() - 1)) * 4 / tau).sum()
            continue
        high = o.eps_clip if o.eps_clip_higher is None else o.eps_clip_higher
        loss = torch.maximum(-a * d.exp(), -a * d.exp().clamp(1 - o.eps_clip, 1 + high))
        if o.c_clip is not None:
            loss = torch.where(a < 0, torch.minimum(loss, -o.c_clip * a), loss)
        total = total + (w * loss).sum()
    loss, teacher = total / count, x.get("teacher_logp")
    if teacher is None:
        return loss
    apart = (new - teacher)[mask]
    if x["rl_loss_weight"] == 0:
        return x["distill_loss_weight"] * ((new - old)[mask].exp() * apart.detach()).sum() / count
    return x["rl_loss_weight"] * loss + x["distill_loss_weight"] * apart.sum() / count


REJECTIONS = [
    _rejection(lower=0.8),
    _rejection(action="clamp", lower=0.8),
    _rejection(action="clamp"),
    _rejection(metric="kl_k1", upper=0.1),
    _rejection(metric="kl_k2", upper=0.02, action="clamp"),
    _rejection(metric="kl_k3", upper=0.02),
    _rejection("sequence", upper=1.05),
    _rejection("sequence", "clamp", agg="sum", lower=0.95, upper=1.05),
    _rejection("sequence", agg="max", upper=1.4),
    _rejection("sequence", metric="kl_k3", agg="sum", upper=0.1),
    _rejection("sequence", "clamp", metric="kl_k2", agg="max", upper=0.1),
    _rejection("sequence", metric="kl_k1", agg="max", lower=0.0, upper=0.5),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"eps_clip": 0.1, "eps_clip_higher": 0.25, "c_clip": 1.2},
    {"importance_sampling_level": "sequence", "eps_clip": 0.02, "c_clip": 1.05},
    {"m2_threshold": 0.02},
    {"m2_threshold": 1e-9, "prox_logp_method": "metrics"},
    {"current_version": 4, "prox_logp_method": "loglinear"},
    {"use_sapo_loss": True, "sapo_tau_pos": 1.3},
    {"use_sapo_loss": True, "importance_sampling_level": "sequence"},
    *({"rejection_sampling": o, "c_clip": 3.0} for o in REJECTIONS),
    {"rejection_sampling": REJECTIONS[0], "importance_sampling_level": "sequence"},
    {"rejection_sampling": REJECTIONS[7], "importance_sampling_level": "sequence", "m2_threshold": 0.05},
]
JOINT, PURE = {"rl_loss_weight": 0.7, "distill_loss_weight": 0.3}, {"rl_loss_weight": 0, "distill_loss_weight": 0.3}
CASES = [
    *((o, {}) for o in OPTIONS),
    *((o, teacher) for teacher in (JOINT, PURE) for o in ({}, {"m2_threshold": 0.02}, {"use_sapo_loss": True})),
    ({"rejection_sampling": REJECTIONS[6], "importance_sampling_level": "sequence"}, JOINT),
]


def _outcome(function, x: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    new = x["new"].clone().requires_grad_()
    given = {name: y.clone() if isinstance(y, Tensor) else y for name, y in x.items() if name != "new"}
    loss = function(new, torch.zeros_like(new), given, **options)
    (3 * loss).backward()
    return loss.detach(), new.grad


def _given(options: dict[str, Any], teacher: dict[str, float], seed: int = 1) -> dict[str, Any]:
    x = _batch(seed)
    if options.get("prox_logp_method") == "loglinear":
        del x["prox_logp"]
    if not teacher:
        del x["teacher_logp"]
    return x | teacher


@pytest.mark.parametrize(("options", "teacher"), CASES, ids=str)
def test_the_loss_is_the_formulas(options: dict[str, Any], teacher: dict[str, float]) -> None:
    loss = adapter.GRPOLoss(**options)
    x = _given(options, teacher)
    ours = _outcome(loss, x)
    new = x["new"].clone().requires_grad_()
    expected = _formula(new, x, loss)
    (3 * expected).backward()
    torch.testing.assert_close(ours, (expected.detach(), new.grad), **TOLERANCE)
    assert float(ours[0]) != 0 and not ours[1][~x["loss_mask"]].any()


@pytest.mark.parametrize(("options", "teacher"), CASES, ids=str)
def test_the_loss_is_areals(actor, options: dict[str, Any], teacher: dict[str, float]) -> None:
    x = _given(options, teacher, seed=2)
    theirs = _outcome(actor.grpo_loss_fn, x, **({"eps_clip": 0.2, "eps_clip_higher": None, "c_clip": None} | options))
    torch.testing.assert_close(_outcome(adapter.GRPOLoss(**options), x), theirs, **TOLERANCE)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "rejection", [None, *REJECTIONS], ids=lambda o: "-".join(map(str, vars(o).values())) if o else ""
)
def test_the_stand_ins_are_areals(actor, rejection, level: str, padded: bool) -> None:
    """Loss, gradient and every statistic where the mask is True."""
    x = _batch(3, (8,) * 4, torch.float32)
    names = ("prox_logp", "logprobs", "advantages")
    shape = (4, 8) if padded else (32,)
    new, mask, bounds = x["new"], x["loss_mask"].view(shape), None if padded else x["cu_seqlens"]
    prox, old, a = (x[name].view(shape) for name in names)
    of_level = {"importance_sampling_level": level, "cu_seqlens": bounds, "loss_mask": mask}
    ppo = (prox, old, a), {"eps_clip": 0.05, "c_clip": 1.1, "rejection_sampling": rejection}
    sapo = (old, a, 1.0, 1.05), {}
    calls = {"ppo_actor_loss_fn": ppo, **({"sapo_loss_fn": sapo} if rejection is None else {})}
    for name, (arguments, options) in calls.items():
        outcomes = []
        for function in (getattr(adapter, name), getattr(actor, name)):
            leaf = new.clone().requires_grad_()
            loss, stat = function(leaf.view(shape), *arguments, **options, **of_level)
            loss.backward()
            outcomes.append((loss.detach(), leaf.grad, stat))
        ours, theirs = outcomes
        torch.testing.assert_close(ours[:2], theirs[:2], rtol=2e-5, atol=2e-6)
        assert ours[2].keys() == theirs[2].keys()
        of_loss = mask if rejection is None else ours[2]["importance_weight"] != 0
        for key, y in theirs[2].items():
            mine, kept = ours[2][key], mask if key != "behave_imp_weight" else of_loss
            if isinstance(y, Tensor):
                assert mine.dtype == y.dtype and mine.shape == y.shape, key
                torch.testing.assert_close(mine[kept], y[kept], rtol=2e-5, atol=2e-6)
            else:
                assert float(mine) == pytest.approx(y)


def test_enable_and_disable(actor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_adapter, "version", lambda package: "1.0.4")
    theirs = actor.ppo_actor_loss_fn, actor.sapo_loss_fn
    x, options = _given({}, {}), {"eps_clip": 0.2, "eps_clip_higher": None, "c_clip": None}
    expected = _outcome(actor.grpo_loss_fn, x, **options)
    try:
        first = adapter.enable()
        handle = adapter.enable()
        assert handle.active and not first.active and "AReaL: trajkern stands in for ppo_actor_loss_fn" in repr(handle)
        for name in adapter.HOLDERS:
            holder = sys.modules[name]
            assert (holder.ppo_actor_loss_fn, holder.sapo_loss_fn) == (adapter.ppo_actor_loss_fn, adapter.sapo_loss_fn)
        torch.testing.assert_close(_outcome(actor.grpo_loss_fn, x, **options), expected, **TOLERANCE)
    finally:
        handle.disable()
    assert (actor.ppo_actor_loss_fn, actor.sapo_loss_fn) == theirs


def _module_of(**functions: Any) -> dict[str, ModuleType]:
    names = ("areal", "areal.utils", "areal.utils.functional", adapter.FUNCTIONS)
    modules = {name: ModuleType(name) for name in names}
    vars(modules[adapter.FUNCTIONS]).update(functions)
    return modules


def test_a_version_that_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"ppo_actor_loss_fn": adapter.ppo_actor_loss_fn}
    monkeypatch.setattr(_adapter, "version", lambda package: "1.1.0")

    def enable(message: str, **functions: Any) -> None:
        for name, module in _module_of(**functions).items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(RuntimeError, match=message):
            adapter.enable(any_version=True)

    enable("must have sapo_loss_fn", **ours)
    enable("AReaL's sapo_loss_fn must take", **ours, sapo_loss_fn=lambda logprobs, temperature: None)


def test_a_record_takes_the_statistics() -> None:
    stats: list[dict[str, Tensor]] = []
    x = _given({}, {})
    adapter.GRPOLoss(record=stats.append, rejection_sampling=REJECTIONS[0])(x["new"], None, x)
    (stat,) = stats
    assert {"loss", "clip_mask", "behave_imp_weight", "filtered_fraction"} <= stat.keys()
    assert 0 < float(stat["filtered_fraction"]) < 1


def test_no_token_takes_part() -> None:
    x = _given({}, JOINT)
    x["loss_mask"] = torch.zeros_like(x["loss_mask"])
    for options in ({}, {"m2_threshold": 0.1}, {"importance_sampling_level": "sequence"}):
        loss, grad = _outcome(adapter.GRPOLoss(**options), x)
        assert float(loss) == 0 and not grad.any()


def test_nothing_under_the_mask_is_read() -> None:
    for options in OPTIONS:
        x = _given(options, {})
        expected = _outcome(adapter.GRPOLoss(**options), x)
        for name in ("logprobs", "prox_logp", "advantages"):
            if name in x:
                x[name] = torch.where(x["loss_mask"], x[name], torch.nan)
        torch.testing.assert_close(_outcome(adapter.GRPOLoss(**options), x), expected, rtol=0, atol=0)


def test_what_areal_never_gives() -> None:
    def refused(message: str, error=ValueError, options: dict[str, Any] | None = None, **changed: Any) -> None:
        x = _given({}, {}) | changed
        with pytest.raises(error, match=message):
            adapter.GRPOLoss(**(options or {}))(x["new"], None, x)

    sequence = {"importance_sampling_level": "sequence"}
    split = _batch(0)["cu_seqlens"] * 2
    refused(
        "cu_seqlens must end at the 33 tokens, got 66; a sequence that is split", options=sequence, cu_seqlens=split
    )
    refused("cu_seqlens must be a tensor", options=sequence, cu_seqlens=None)
    refused("input_data must have 'advantages'", advantages=None)
    refused("input_data must have 'prox_logp'", prox_logp=None)
    loglinear = {"prox_logp_method": "loglinear"}
    refused("'loglinear' needs versions", options=loglinear, prox_logp=None)
    refused("prox_logp must be finite", prox_logp=torch.full((33,), -torch.inf))
    refused(r"advantages must have the log-probs' shape \[33\], got \[3\]", advantages=torch.ones(3))
    refused("advantages must be a tensor, got 1.0", TypeError, advantages=1.0)
    refused("loss_mask must have the log-probs' shape", loss_mask=torch.ones(2))
    refused(r"logprobs must have shape \[T\] .* got \[1, 1, 33\]", new=torch.zeros(1, 1, 33))
    refused("c_clip must be greater than 1, got 0.9", options={"c_clip": 0.9})
    refused("importance_sampling_level must be one of", options={"importance_sampling_level": "group"})
    refused("tau_pos must be positive", options={"use_sapo_loss": True, "sapo_tau_pos": 0.0})
    refused("prox_logp_method must be one of", options={"prox_logp_method": "linear"})
    refused("use_decoupled_loss must be False", options={"use_sapo_loss": True, "use_decoupled_loss": True})
    refused("rejection_sampling.metric must be one of", options={"rejection_sampling": _rejection(metric="tv")})
