"""Batches as SkyRL hands them to its losses and estimators, and what its own functions compute of them, in plain torch.

The formulas were read from skyrl/backends/skyrl_train/utils/ppo_utils.py and off_policy_correction_utils.py of SkyRL's
release 0.3.0 (PyPI) and, for ``cispo_anchor``, of commit a9564572eb8e91076be43c1bd5e4615e3de17265, and are written
anew.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

NEEDS = ("jaxtyping", "loguru", "omegaconf", "skyrl_gym", "skyrl_gym.envs.search.env", "skyrl_gym.envs.sql.env")
RAY = ("ray", "ray.util", "ray.util.placement_group", "ray.util.scheduling_strategies")
CORE = "skyrl.backends.skyrl_train.utils.ppo_utils"
SIGNATURES = {  # the parameters of SkyRL's own functions
    "losses": ["log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs"],
    "grpo": ["token_level_rewards", "response_mask", "index", "epsilon", "grpo_norm_by_std"],
    "rloo": ["token_level_rewards", "response_mask", "index"],
    "maxrl": ["token_level_rewards", "response_mask", "index", "epsilon"],
    "reinforce++": ["token_level_rewards", "response_mask", "gamma"],
    "gae": ["token_level_rewards", "values", "response_mask", "gamma", "lambd"],
}
NO_CORRECTION = {
    "tis_ratio_type": None,
    "token_tis_ratio_clip_high": 1.1,
    "sequence_tis_ratio_clip_high": 1.3,
    "sequence_mask_metric": None,
    "geo_mask_high": 1.1,
    "geo_mask_low": 0.9,
    "product_mask_high": 1.5,
    "product_mask_low": 0.6,
    "outlier_token_is_threshold_low": None,
    "outlier_token_is_threshold_high": None,
    "token_mask_is_threshold_low": None,
    "token_mask_is_threshold_high": None,
}


def options(**changed: Any) -> SimpleNamespace:
    """``AlgorithmConfig``, as far as the losses read it."""
    cispo = {"cispo_eps_clip_low": 0.1, "cispo_eps_clip_high": 0.15} | changed.pop("cispo", {})
    correction = NO_CORRECTION | changed.pop("correction", {})
    known: dict[str, Any] = {
        "policy_loss_type": "regular",
        "eps_clip_low": 0.1,
        "eps_clip_high": 0.2,
        "clip_ratio_c": 1.3,
        "loss_reduction": "sequence_mean",
        "sapo": SimpleNamespace(tau_pos=1.0, tau_neg=1.05),
        "kl_cov": SimpleNamespace(kl_cov_frac=0.2, ppo_kl_coef=0.7),
        "dppo": SimpleNamespace(dppo_type="binary_tv", delta_low=0.03, delta_high=0.02),
        "cispo": SimpleNamespace(**cispo),
        "off_policy_correction": SimpleNamespace(**correction),
    }
    return SimpleNamespace(**(known | changed))


def make_batch(seed: int, rows: int = 9, length: int = 13) -> SimpleNamespace:
    """Right-aligned responses of which some tokens are observations, one row empty and one of a single token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows,), generator=g)
    lengths[2], lengths[5] = 0, 1
    response = torch.arange(length) >= length - lengths[:, None]
    mask = response & (torch.rand(rows, length, generator=g) > 0.25)
    old = -2 * torch.rand(rows, length, generator=g) - 0.05
    noise = [0.2 * torch.randn(rows, length, generator=g) for _ in range(2)]
    return SimpleNamespace(
        new=(old + noise[0]).clamp(max=-1e-3),
        old=old,
        rollout=(old + 0.5 * noise[1]).clamp(max=-1e-3),
        advantages=torch.randn(rows, length, generator=g) / rows,
        loss_mask=mask.float(),
        response_mask=response.long(),
        rewards=torch.randn(rows, length, generator=g) * response,
        values=torch.randn(rows, length, generator=g),
        uids=["a", "b", "a", "c", "b", "a", "d", "b", "d"][:rows],
    )


def mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    return (x * mask).sum(dim) / mask.sum(dim).clamp(min=1)


def expected(name: str, b: SimpleNamespace, c: SimpleNamespace, new: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of SkyRL's loss of that name."""
    a, mask, old = b.advantages, b.loss_mask, b.old
    low, high, metrics = 1 - c.eps_clip_low, 1 + c.eps_clip_high, {}
    ratio = (new - old).exp()
    if name in ("regular", "dual_clip", "gspo"):
        if name == "gspo":
            of_row = mean(new - old, mask, -1)[:, None].detach()
            ratio = (of_row + new - new.detach()).exp()
        plain, bounded = -ratio * a, -ratio.clamp(low, high) * a
        loss, clip = torch.maximum(plain, bounded), bounded > plain
        if name == "dual_clip":
            loss = torch.where(a < 0, torch.minimum(-c.clip_ratio_c * a, loss), loss)
    elif name == "sapo":
        tau = torch.where(a > 0, c.sapo.tau_pos, c.sapo.tau_neg)
        loss, clip = -a * (4 / tau) * torch.sigmoid(tau * (ratio - 1)), torch.zeros_like(a)
    elif name == "cispo":
        if getattr(c.cispo, "cispo_anchor", None) == "rollout":
            ratio = (new - b.rollout).exp()
        low, high = 1 - c.cispo.cispo_eps_clip_low, 1 + c.cispo.cispo_eps_clip_high
        bounded, clip = ratio.clamp(low, high).detach(), (ratio < low) | (ratio > high)
        loss = -a * bounded * new
        if hasattr(c.cispo, "cispo_anchor"):
            inside = ratio[mask > 0]
            metrics = {"ratio_mean": mean(ratio, mask), "ratio_clamped_mean": mean(bounded, mask)}
            metrics |= {"ratio_max": inside.max(), "ratio_min": inside.min()}
            metrics = {f"cispo/{key}": float(x.detach()) for key, x in metrics.items()}
    elif name == "rollout_is":
        ratio = (new - b.rollout).exp().detach()
        clip = ~((ratio > low) & (ratio < high))
        loss = -(ratio * ~clip) * a * new
    elif name == "dppo":
        ratio, p, q = (new - b.rollout).exp(), new.exp(), b.rollout.exp()
        apart = (p - q).abs()
        if c.dppo.dppo_type == "binary_kl":
            apart = q * (b.rollout - new) + (1 - q) * ((1 - q) / (1 - p)).log()
        clip = ((a > 0) & (p > q) & (apart > c.dppo.delta_high)) | ((a < 0) & (p < q) & (apart > c.dppo.delta_low))
        loss = -ratio * a * ~clip
    elif name == "importance_sampling":
        return -(ratio * a * mask).sum(), {"importance_ratio": float(mean(ratio.detach(), mask))}
    else:
        return kl_cov(a, mask, new, old, c), {"clip_ratio": 0.0}
    factor, narrowed = correct(b, c.off_policy_correction)
    return (loss * factor * narrowed).sum(), {"clip_ratio": float(mean(clip.float(), mask)), **metrics}


def kl_cov(a: Tensor, mask: Tensor, new: Tensor, old: Tensor, c: SimpleNamespace) -> Tensor:
    scored = mask > 0
    of_a, of_new = a[scored], new.detach()[scored]
    covariance = (of_a - of_a.mean()) * (of_new - of_new.mean())
    chosen = covariance.topk(max(1, int(len(of_a) * c.kl_cov.kl_cov_frac))).indices
    moved = (new - old)[scored]
    penalty = torch.zeros_like(moved).index_add(0, chosen, moved[chosen].abs())
    return (-of_a * moved.exp() + c.kl_cov.ppo_kl_coef * penalty).sum()


def correct(b: SimpleNamespace, o: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """(factor, mask) of SkyRL's off-policy correction."""
    mask, log_w = b.loss_mask, b.old - b.rollout
    w, factor = log_w.exp(), torch.ones_like(log_w)
    if o.outlier_token_is_threshold_low is not None or o.outlier_token_is_threshold_high is not None:
        low, high = o.outlier_token_is_threshold_low or 0.0, o.outlier_token_is_threshold_high or torch.inf
        mask = mask * (((w >= low) & (w <= high)) | (mask == 0)).all(-1, keepdim=True)
    if o.token_mask_is_threshold_low is not None and o.token_mask_is_threshold_high is not None:
        mask = mask * ((w >= o.token_mask_is_threshold_low) & (w <= o.token_mask_is_threshold_high))
    product = (log_w * mask).sum(-1, keepdim=True)
    if o.tis_ratio_type == "token":
        factor = w.clamp(max=o.token_tis_ratio_clip_high)
    elif o.tis_ratio_type == "sequence":
        factor = product.exp().clamp(max=o.sequence_tis_ratio_clip_high)
    if o.sequence_mask_metric == "geometric":
        of_row = (product / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
        mask = mask * ((of_row >= o.geo_mask_low) & (of_row <= o.geo_mask_high))
    elif o.sequence_mask_metric == "product":
        mask = mask * ((product.exp() >= o.product_mask_low) & (product.exp() <= o.product_mask_high))
    return factor, mask


def correction_module(name: str) -> ModuleType:
    """SkyRL's module of corrections by the signatures of its two functions that are called."""
    module = ModuleType(name)

    def off_policy_correction_enabled(off_policy_correction: Any) -> bool:
        return vars(off_policy_correction) != NO_CORRECTION

    def compute_off_policy_correction(old_log_probs, rollout_logprobs, loss_mask, off_policy_correction):
        b = SimpleNamespace(old=old_log_probs, rollout=rollout_logprobs, loss_mask=loss_mask)
        factor, mask = correct(b, off_policy_correction)
        return (None if off_policy_correction.tis_ratio_type is None else factor), {"is_ratio_mean": 1.0}, mask

    module.off_policy_correction_enabled = off_policy_correction_enabled  # type: ignore[attr-defined]
    module.compute_off_policy_correction = compute_off_policy_correction  # type: ignore[attr-defined]
    return module


def core_module(name: str) -> ModuleType:
    """SkyRL's registries without Ray, with functions of the signatures that its own have."""

    def stub(parameters: list[str]) -> Any:
        scope: dict[str, Any] = {}
        exec(f"def stub({', '.join(parameters)}, **kwargs): ...", scope)
        return scope["stub"]

    def registry(functions: dict[str, Any]) -> type:
        class Registry:
            _functions = dict(functions)

            @classmethod
            def register(cls, name: str, func: Any) -> None:
                if name in cls._functions:
                    raise ValueError(f"'{name}' already registered")
                cls._functions[name] = func

            @classmethod
            def unregister(cls, name: str) -> None:
                del cls._functions[name]

        return Registry

    module: Any = ModuleType(name)
    losses = ("regular", "dual_clip", "gspo", "cispo", "rollout_is", "dppo", "sapo", "kl_cov", "importance_sampling")
    module.PolicyLossRegistry = registry({x: stub(SIGNATURES["losses"]) for x in losses})
    estimators = {x: stub(parameters) for x, parameters in SIGNATURES.items() if x != "losses"}
    module.AdvantageEstimatorRegistry = registry(estimators)
    return module


def put(module: ModuleType, setitem: Any) -> None:
    """Enters a module under its name, and the packages that it is in."""
    parts = module.__name__.split(".")
    for n in range(1, len(parts)):
        if ".".join(parts[:n]) not in sys.modules:
            package = ModuleType(".".join(parts[:n]))
            package.__path__ = []
            setitem(sys.modules, package.__name__, package)
    setitem(sys.modules, module.__name__, module)


def package(stand_ins: Any) -> ModuleType:
    """SkyRL's ``ppo_utils``, without Ray and what ``skyrl.backends`` loads of its server; skips where there is none."""
    found = find_spec("skyrl")
    if found is None or found.origin is None:
        pytest.skip("skyrl is not installed")
    with stand_ins(*NEEDS, *RAY):
        if find_spec("ray") is None or sys.modules["ray"].__spec__.origin is None:  # type: ignore[union-attr]
            sys.modules["ray"].is_initialized = lambda: False  # type: ignore[attr-defined]
        backends = ModuleType("skyrl.backends")
        backends.__path__ = [str(Path(found.origin).parent / "backends")]
        sys.modules["skyrl.backends"] = backends
        return importlib.import_module(CORE)
