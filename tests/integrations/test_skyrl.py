"""SkyRL's estimators and registries: trajkern's beside formulas read from its source, and its own where installed."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations import skyrl_batches as host
from trajkern.integrations import _skyrl_advantages, _skyrl_credit, _skyrl_losses, skyrl


@pytest.fixture(scope="module")
def installed(stand_ins) -> ModuleType:
    return host.package(stand_ins)


def estimated(name: str, b: SimpleNamespace, **changed: Any) -> Any:
    """An estimator called as ``compute_advantages_and_returns`` calls it, without the check of who calls."""
    of_module = {"gae": _skyrl_advantages.gae, "reinforce++": _skyrl_advantages.reinforce_plus_plus}
    return of_module.get(name, skyrl.ESTIMATORS[name])(**arguments(b, **changed))


def arguments(b: SimpleNamespace, **changed: Any) -> dict[str, Any]:
    known = {"token_level_rewards": b.rewards.clone(), "response_mask": b.response_mask, "index": b.uids}
    known |= {"values": b.values, "grpo_norm_by_std": True, "gamma": 0.9, "lambd": 0.8, "config": host.options()}
    return known | changed


def by_hand(name: str, b: SimpleNamespace, by_std: bool = True) -> torch.Tensor:
    """SkyRL's advantages, a row and a column at a time."""
    mask, r = b.response_mask, b.rewards
    scores, found = r.sum(-1), torch.zeros_like(r)
    if name in ("grpo", "rloo", "maxrl"):
        for n, uid in enumerate(b.uids):
            group = scores[[uid == x for x in b.uids]]
            alone, mean = len(group) == 1, group.mean()
            if name == "grpo":
                value = scores[n] if alone else scores[n] - mean
                value = value / ((torch.ones(()) if alone else group.std()) + 1e-6) if by_std else value
            elif name == "rloo":
                value = torch.zeros(()) if alone else scores[n] - (group.sum() - scores[n]) / (len(group) - 1)
            else:
                value = scores[n] if alone else (scores[n] - mean) / (mean + 1e-6)
            found[n] = value * mask[n]
        return found
    running = torch.zeros(r.shape[0])
    after = torch.zeros(r.shape[0])
    for t in reversed(range(r.shape[1])):
        if name == "reinforce++":
            running = r[:, t] + 0.9 * running
            found[:, t] = running
            running = running * mask[:, t]
        else:
            running = r[:, t] + 0.9 * after - b.values[:, t] + 0.9 * 0.8 * running
            found[:, t], after = running, b.values[:, t]
    inside = found[mask > 0]
    return (found - inside.mean()) / (inside.var() + 1e-8).sqrt() * mask


@pytest.mark.parametrize("name", skyrl.ESTIMATORS)
def test_estimators(name: str) -> None:
    b = host.make_batch(5)
    b.response_mask = b.response_mask * (
        torch.rand(b.response_mask.shape, generator=torch.Generator().manual_seed(0)) > 0.1
    )
    advantages, returns = estimated(name, b)
    torch.testing.assert_close(advantages, by_hand(name, b), rtol=1e-4, atol=1e-5)
    assert returns.shape == advantages.shape and bool(advantages.any())
    if name == "grpo":
        plain = estimated(name, b, grpo_norm_by_std=False)[0]
        torch.testing.assert_close(plain, by_hand(name, b, by_std=False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", skyrl.ESTIMATORS)
def test_estimators_of_the_package(installed: ModuleType, name: str) -> None:
    b = host.make_batch(5)
    theirs = installed.AdvantageEstimatorRegistry._functions[name](**arguments(b))
    ours = estimated(name, b)
    torch.testing.assert_close(ours[0], theirs[0] * b.response_mask, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A process in which SkyRL of the tested version is installed, by its signatures."""
    module = host.core_module(skyrl.CORE)
    host.put(module, monkeypatch.setitem)
    monkeypatch.setattr("trajkern.integrations._adapter.version", lambda _: "0.3.0")
    yield module
    skyrl.unregister()


def test_register(core: Any) -> None:
    registries = core.AdvantageEstimatorRegistry, core.PolicyLossRegistry
    before = [dict(x._functions) for x in registries]
    skyrl.register()
    names = skyrl.register()
    assert names[0] == [f"trajkern_{x}" for x in ("grpo", "gae", "rloo", "reinforce++", "maxrl")]
    assert names[1] == [f"trajkern_{x}" for x in _skyrl_losses.LOSSES] and len(names[1]) == 9
    for registry, own, new in zip(registries, before, names, strict=True):
        assert registry._functions.keys() == own.keys() | set(new)
        assert all(registry._functions[x] is own[x] for x in own)
    names.disable()
    skyrl.unregister()
    assert [x._functions for x in registries] == before


def test_register_refuses_another_signature(core: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core.PolicyLossRegistry._functions["cispo"] = lambda log_probs, behaviour: None
    with pytest.raises(RuntimeError, match=r"SkyRL's cispo must take \(log_probs, old_log_probs, advantages, config"):
        skyrl.register()
    del core.PolicyLossRegistry
    with pytest.raises(RuntimeError, match="must have PolicyLossRegistry"):
        skyrl.register()
    monkeypatch.setattr("trajkern.integrations._adapter.version", lambda _: "0.9.9")
    with pytest.warns(UserWarning, match=r"tested with skyrl 0\.3\.0, not with 0\.9\.9"), pytest.raises(RuntimeError):
        skyrl.register()


def test_register_with_the_package(installed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trajkern.integrations._adapter.version", lambda _: "0.3.0")
    try:
        estimators, losses = skyrl.register()
        assert installed.PolicyLossRegistry.get(losses[0]) is _skyrl_losses.regular
        b, config = host.make_batch(6), host.options()
        found = installed.compute_advantages_and_returns(
            b.rewards, b.response_mask, b.uids, estimators[0], config, grpo_norm_by_std=False
        )
        torch.testing.assert_close(found[0], by_hand("grpo", b, by_std=False), rtol=1e-4, atol=1e-5)
    finally:
        skyrl.unregister()
    assert not [x for x in installed.PolicyLossRegistry._functions if x.startswith("trajkern")]


def test_bad_estimates() -> None:
    b = host.make_batch(0)
    with pytest.raises(ValueError, match="values must be given to gae: trainer.critic.model.path"):
        estimated("gae", b, values=None)
    with pytest.raises(ValueError, match="index must hold 9 uids"):
        estimated("maxrl", b, index=["a"])
    for name in ("gae", "reinforce++"):
        with pytest.raises(RuntimeError, match="trajkern.integrations.skyrl.register.. must also run in the process"):
            skyrl.ESTIMATORS[name](**arguments(b))
    stepwise = SimpleNamespace(cfg=SimpleNamespace(generator=SimpleNamespace(step_wise_trajectories=True)))
    token = _skyrl_credit.current.set(_skyrl_credit.Running(stepwise, None))
    try:
        with pytest.raises(ValueError, match="generator.step_wise_trajectories must be False for trajkern_gae"):
            skyrl.ESTIMATORS["gae"](**arguments(b))
    finally:
        _skyrl_credit.current.reset(token)


def test_page(core: ModuleType) -> None:
    """docs/skyrl.md: its scripts are Python, its names those that are registered, its command's among them."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "skyrl.md").read_text()
    scripts = re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
    assert len(scripts) == 2 and all(compile(script, "page", "exec") for script in scripts)
    exec(scripts[1], {})
    names = skyrl.register(credit="tests.integrations.test_skyrl_credit:named")
    for row, registered in zip(("estimators", "losses"), names, strict=True):
        (listed,) = re.findall(rf"^\| {row} \| (.*) \|$", page, re.M)
        assert {f"trajkern_{x}" for x in re.findall(r"`(\S+)`", listed)} == set(registered) - {"trajkern_credit"}
    assert set(re.findall(r"=(trajkern_\w+)", page)) <= {*names[0], *names[1]}


def test_workers_find_the_estimators_by_name() -> None:
    for estimator in (*skyrl.ESTIMATORS.values(), skyrl.by_credit):
        assert pickle.loads(pickle.dumps(estimator)) is estimator
