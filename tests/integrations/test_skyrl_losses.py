"""SkyRL's policy losses: trajkern's beside formulas read from its source, and its own where it is installed."""

from __future__ import annotations

import pickle
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations import skyrl_batches as host
from trajkern.integrations import _skyrl_losses

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in _skyrl_losses.LOSSES},
    "dppo, kl": (
        "dppo",
        {"dppo": SimpleNamespace(dppo_type="binary_kl", delta_low=0.001, delta_high=0.002)},
    ),
    "token tis": ("regular", {"correction": {"tis_ratio_type": "token"}}),
    "sequence tis": ("dual_clip", {"correction": {"tis_ratio_type": "sequence"}}),
    "geometric": ("gspo", {"correction": {"sequence_mask_metric": "geometric", "geo_mask_low": 0.98}}),
    "product": ("sapo", {"correction": {"sequence_mask_metric": "product"}}),
    "outliers": ("cispo", {"correction": {"outlier_token_is_threshold_high": 1.15}}),
    "token mask": (
        "rollout_is",
        {"correction": {"token_mask_is_threshold_low": 0.95, "token_mask_is_threshold_high": 1.05}},
    ),
    "all": (
        "dppo",
        {
            "correction": {
                "tis_ratio_type": "token",
                "sequence_mask_metric": "product",
                "outlier_token_is_threshold_low": 0.75,
            }
        },
    ),
}


@pytest.fixture(scope="module")
def installed(stand_ins) -> ModuleType:
    return host.package(stand_ins)


@pytest.fixture(autouse=True)
def correction(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyRL's corrections by their signatures, where a test does not ask for the package."""
    if "installed" not in request.fixturenames:
        host.put(host.correction_module(_skyrl_losses.CORRECTION), monkeypatch.setitem)


def results(loss: Any, b: SimpleNamespace, config: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    new = b.new.clone().requires_grad_()
    value, metrics = loss(new, b.old, b.advantages, config=config, loss_mask=b.loss_mask, rollout_logprobs=b.rollout)
    (3 * value).backward()
    assert all(type(x) is float for x in metrics.values())
    return value.detach(), new.grad, metrics


def compare(ours: tuple, theirs: tuple, mask: torch.Tensor) -> None:
    for x, y in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert bool(theirs[1].any()) and not ours[1][mask == 0].any()
    assert ours[2].keys() >= theirs[2].keys()
    for name, x in theirs[2].items():
        assert ours[2][name] == pytest.approx(x, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("case", CASES)
def test_losses(case: str) -> None:
    name, changed = CASES[case]
    b, config = host.make_batch(1), host.options(**changed)
    ours = results(_skyrl_losses.LOSSES[name], b, config)

    def theirs(new, *_: Any, **__: Any):
        return host.expected(name, b, config, new)

    compare(ours, results(theirs, b, config), b.loss_mask)


@pytest.mark.parametrize("case", CASES)
def test_losses_of_the_package(installed: ModuleType, case: str) -> None:
    name, changed = CASES[case]
    b, config = host.make_batch(1), host.options(policy_loss_type=name, **changed)
    if name == "cispo":
        config.cispo.cispo_anchor = "old"  # later versions read it
    theirs = results(installed.PolicyLossRegistry._functions[name], b, config)
    compare(results(_skyrl_losses.LOSSES[name], b, config), theirs, b.loss_mask)


def test_its_configuration_has_what_is_read(installed: ModuleType) -> None:
    """Every option of the losses stands in the package's own ``AlgorithmConfig``."""
    config = installed.AlgorithmConfig()
    known = host.options()
    for name, value in vars(known).items():
        assert hasattr(config, name), name
        for inner in vars(value) if isinstance(value, SimpleNamespace) else ():
            assert hasattr(getattr(config, name), inner), f"{name}.{inner}"


@pytest.mark.parametrize("anchor", ["old", "rollout"])
def test_cispo_by_its_anchor(anchor: str) -> None:
    b, config = host.make_batch(2), host.options(cispo={"cispo_anchor": anchor})
    ours = results(_skyrl_losses.cispo, b, config)
    compare(ours, results(lambda new, *_, **__: host.expected("cispo", b, config, new), b, config), b.loss_mask)


def test_the_cases_clip_and_correct() -> None:
    b = host.make_batch(1)
    for name, changed in CASES.values():
        config = host.options(**changed)
        if name not in ("sapo", "kl_cov", "importance_sampling"):
            assert 0 < host.expected(name, b, config, b.new)[1]["clip_ratio"] < 1, name
        if "correction" in changed:
            factor, mask = host.correct(b, config.off_policy_correction)
            assert bool((mask != b.loss_mask).any() or (factor != 1).any()) and bool(mask.any()), changed


@pytest.mark.parametrize("name", _skyrl_losses.LOSSES)
def test_empty_masks_and_what_they_hide(name: str) -> None:
    """Nothing under the mask is read; a batch without a token has loss 0 and metrics that are numbers."""
    b, config = host.make_batch(3), host.options()
    expected = results(_skyrl_losses.LOSSES[name], b, config)
    for field in ("new", "old", "rollout", "advantages"):
        setattr(b, field, torch.where(b.loss_mask > 0, getattr(b, field), torch.nan))
    hidden = results(_skyrl_losses.LOSSES[name], b, config)
    torch.testing.assert_close(hidden[:2], expected[:2])
    assert hidden[2] == pytest.approx(expected[2])
    b.loss_mask = torch.zeros_like(b.loss_mask)
    value, grad, metrics = results(_skyrl_losses.LOSSES[name], b, config)
    assert float(value) == 0 and not grad.any() and all(x == x for x in metrics.values())


@pytest.mark.parametrize("name", ["regular", "gspo", "importance_sampling"])
def test_a_mask_of_weights(name: str) -> None:
    """SkyRL multiplies with what stands in the mask, and so does this."""
    b, config = host.make_batch(4), host.options()
    b.loss_mask = b.loss_mask * torch.linspace(0.5, 2, b.loss_mask.numel()).view_as(b.loss_mask)
    ours = results(_skyrl_losses.LOSSES[name], b, config)
    compare(ours, results(lambda new, *_, **__: host.expected(name, b, config, new), b, config), b.loss_mask)
    with pytest.raises(ValueError, match="loss_mask must be 0 or 1 for kl_cov"):
        results(_skyrl_losses.kl_cov, b, config)
    b.loss_mask = -b.loss_mask
    with pytest.raises(ValueError, match="loss_mask must be at least 0, got -"):
        results(_skyrl_losses.LOSSES[name], b, config)


def test_workers_find_the_losses_by_name() -> None:
    """Ray's pickle takes a function by its module and name where that leads to it."""
    for name, loss in _skyrl_losses.LOSSES.items():
        assert pickle.loads(pickle.dumps(loss)) is loss and loss.__name__ == name and loss.__doc__


BAD: list[tuple[str, dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ("regular", {"loss_mask": torch.ones(3)}, {}, ValueError, r"loss_mask must have shape \[B, L\]"),
    ("regular", {"old": None}, {}, TypeError, "old_log_probs must be a tensor, got None"),
    ("regular", {"advantages": torch.ones(9)}, {}, ValueError, "advantages must have the mask's shape"),
    ("rollout_is", {"rollout": None}, {}, ValueError, "rollout_logprobs must be given for rollout_is"),
    ("cispo", {}, {"cispo": {"cispo_anchor": "ref"}}, ValueError, "cispo.cispo_anchor must be one of 'old', 'rollout'"),
    ("cispo", {"rollout": None}, {"cispo": {"cispo_anchor": "rollout"}}, ValueError, "rollout_logprobs must be given"),
    (
        "cispo",
        {},
        {"cispo": {"cispo_anchor": "rollout"}, "correction": {"tis_ratio_type": "token"}},
        ValueError,
        "off_policy_correction.tis_ratio_type must be None with cispo_anchor='rollout'",
    ),
    ("dppo", {}, {"dppo": SimpleNamespace(dppo_type="topk")}, ValueError, "dppo.dppo_type must be one of 'binary_tv'"),
    ("dual_clip", {}, {"clip_ratio_c": 0.5}, ValueError, "clip_ratio_c must be"),
]


@pytest.mark.parametrize("name, fields, changed, error, message", BAD)
def test_bad_arguments(name: str, fields: dict, changed: dict, error: type[Exception], message: str) -> None:
    b = host.make_batch(0)
    for field, value in fields.items():
        setattr(b, field, value)
    with pytest.raises(error, match=message):
        results(_skyrl_losses.LOSSES[name], b, host.options(**changed))
    with pytest.raises(ValueError, match="config must be the algorithm's configuration, got None"):
        results(_skyrl_losses.LOSSES[name], b, None)
