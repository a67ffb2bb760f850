"""prime-rl's loss by its formulas, and its modules as far as the adapter reads them (0.8.0, commit 559b447)."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from trajkern.integrations import prime_rl as adapter

DEFAULT = {"dppo_mask_low": 0.15, "dppo_mask_high": 0.1, "adv_tau": 0.7, "kl_tau": 0.3}
IPO = {"ipo_threshold": 0.05, "adv_tau": 1.5, "kl_tau": 0.02}


def setup_rl_loss_fn(loss_config):
    """As prime-rl's: its functions close over these names."""
    if loss_config.type == "custom":
        module, _, name = loss_config.import_path.rpartition(".")
        custom_fn, kwargs = getattr(importlib.import_module(module), name), loss_config.kwargs

        def rl_fn(inputs):
            return custom_fn(inputs, **kwargs)
    else:

        def rl_fn(inputs):
            return sequence_loss(inputs, loss_config.type, vars(loss_config))

    return rl_fn


def loss_config_of(kind: str, **options):
    return SimpleNamespace(type=kind, **options)


def compute_loss(
    trainer_logprobs,
    inference_logprobs,
    ref_logprobs,
    advantages,
    loss_mask,
    rl_weights,
    ce_weights,
    ref_kl_weights,
    rl_loss_fn,
    rl_scale,
    ce_scale,
    ref_kl_scale,
):
    """The loop: each component of each sequence that has tokens of it, summed, over the component's scale."""
    streams = (rl_weights, ce_weights, ref_kl_weights)
    total, metrics = 0.0, {}
    for i, (new, old, a, mask) in enumerate(
        zip(trainer_logprobs, inference_logprobs, advantages, loss_mask, strict=True)
    ):
        ref = None if ref_logprobs is None else ref_logprobs[i]
        for component, (stream, scale) in enumerate(zip(streams, (rl_scale, ce_scale, ref_kl_scale), strict=True)):
            w = None if stream is None else stream[i]
            if w is None and component:
                continue
            member = mask if w is None else (w != 0) & (mask if component == 0 else True)
            if w is not None and not member.any():
                continue
            inputs = SimpleNamespace(
                trainer_logprobs=new,
                inference_logprobs=old,
                ref_logprobs=ref,
                advantages=a,
                loss_mask=member,
                loss_weights=w,
            )
            out = rl_loss_fn(inputs) if component == 0 else sequence_loss(inputs, ("ce", "ref_kl")[component - 1], {})
            total = total + out.loss / scale
            for name, x in out.metrics.items():
                metrics.setdefault(name, []).append(x)
    return total, {name: torch.stack(x) for name, x in metrics.items()}


def sequence_loss(inputs, kind: str, o: dict[str, Any]):
    """A sequence's loss by its formula, token by token, on the tokens of its mask alone."""
    keep = inputs.loss_mask
    new, old, a = (x[keep] for x in (inputs.trainer_logprobs, inputs.inference_logprobs, inputs.advantages))
    w = torch.ones_like(new) if inputs.loss_weights is None else inputs.loss_weights[keep]
    mean = lambda x, of: x[of].float().sum() / max(int(of.sum()), 1)  # noqa: E731
    every = torch.ones_like(new, dtype=torch.bool)
    if kind == "ce":
        return SimpleNamespace(loss=-(w * new).sum(), metrics={"nll": mean(-new.detach(), every)})
    log_ratio, moved = new - old, (new.exp() - old.exp()).detach()
    ratio = log_ratio.exp()
    mismatch = (ratio - log_ratio - 1).detach()
    kl_tau, scale = o.get("kl_tau", 1e-3), o.get("adv_tau", 1.0)
    if kind == "default":
        far = torch.where(a > 0, moved > o["dppo_mask_high"], moved < -o["dppo_mask_low"])
    elif kind == "ipo":
        far = moved.abs() > o["ipo_threshold"]
    else:
        far, a = moved < -0.2, (inputs.ref_logprobs[keep] - new).detach()
    loss = (w * (kl_tau * log_ratio.square() - torch.where(far, 0.0, scale * a * ratio))).sum()
    metrics = {
        "masked_mismatch_kl": mean(mismatch, far),
        "unmasked_mismatch_kl": mean(mismatch, ~far),
        "is_masked": mean(far, every),
    }
    if kind == "default":
        metrics |= {
            "is_masked_low": mean(far & (a < 0), every),
            "is_masked_high": mean(far & (a > 0), every),
            "masked_advantage_positive": mean(a > 0, far),
            "masked_advantage_negative": mean(a < 0, far),
        }
    if kind == "ref_kl":
        metrics = {f"ref_kl/{name}": x for name, x in metrics.items()} | {"ref_kl": mean(a, every)}
    return SimpleNamespace(loss=loss, metrics=metrics)


def written_down() -> dict[str, ModuleType]:
    """prime-rl's modules as far as the adapter reads them."""
    names = ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", adapter.LOSS, "prime_rl.trainer.rl.train")
    modules = {name: ModuleType(name) for name in names}
    loss = modules[adapter.LOSS]
    loss.compute_loss, loss.setup_rl_loss_fn = compute_loss, setup_rl_loss_fn
    loss.DefaultLossConfig = lambda **o: loss_config_of("default", **(DEFAULT | o))
    loss.IPOLossConfig = lambda **o: loss_config_of("ipo", **(IPO | o))
    loss.CustomLossConfig = lambda import_path, kwargs=None: loss_config_of(
        "custom", import_path=import_path, kwargs=kwargs or {}
    )
    modules["prime_rl.trainer.rl.train"].compute_loss = compute_loss
    return modules
