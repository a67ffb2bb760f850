"""What prime-rl's losses are on packed tokens, in trajkern's op; :mod:`trajkern.integrations.prime_rl` runs them.

A term is a sum over its tokens, over its component's scale. prime-rl's own are A r inside a trust region, whose mask
has no gradient, and the square of the log-ratio: the op's clipped ratio with a band that nothing leaves, and its k2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_number
from trajkern.losses.kinds import METRICS, computed

# How a metric is told: a number, or values and the tokens whose mean it is.
Metrics = dict[str, Tensor | tuple[Tensor, Tensor]]
Term = Callable[["Tokens", float], tuple[Tensor, Metrics]]

UNBOUNDED = 1e9  # above exp(20), the op's largest ratio
# prime-rl's losses -> their options and defaults
HOSTS_OWN = {
    "default": {"dppo_mask_low": 0.2, "dppo_mask_high": 0.2, "adv_tau": 1.0, "kl_tau": 1e-3},
    "ipo": {"ipo_threshold": 0.1, "adv_tau": 1.0, "kl_tau": 1e-3},
}
REF_KL_TAU, REF_KL_THRESHOLD = 1e-3, 0.2  # prime-rl's, which no option changes
NOT_SERVED = {
    "kl_cov": "ranks the tokens of a whole batch",
    "clip_cov": "ranks the tokens of a whole batch",
    "gmpo": "has one number a trajectory, where prime-rl divides a sum over tokens",
}


class Tokens(NamedTuple):
    """The packed tokens of a component."""

    new: Tensor  # [T], differentiable
    old: Tensor  # [T] of the inference engine
    ref: Tensor | None  # [T]
    advantages: Tensor  # [T]
    mask: Tensor  # bool [T]
    weights: Tensor | None  # [T]
    cu_seqlens: Tensor  # [n+1]


def term_of(kind: str = "default", **options: Any) -> Term:
    """The term of that kind; TypeError or ValueError, which name the option, where prime-rl cannot serve it."""
    if kind in HOSTS_OWN:
        known = HOSTS_OWN[kind]
        if unknown := options.keys() - known.keys():
            raise TypeError(f"kind {kind!r} has the options {', '.join(known)}, got {', '.join(sorted(unknown))}")
        for name, value in options.items():
            check_number(name, value, low=0, dtype=torch.float32)
        own: dict[str, Callable[..., tuple[Tensor, Metrics]]] = {"default": _default, "ipo": _ipo}
        return partial(own[kind], **known | options)
    if kind in NOT_SERVED:
        raise ValueError(f"kind must not be {kind!r}: it {NOT_SERVED[kind]}")
    aggregate = options.pop("aggregate", None)
    if aggregate not in (None, "token_sum"):
        raise ValueError(f"aggregate must be 'token_sum', which prime-rl divides by its tokens; got {aggregate!r}")
    config = tk.PolicyLoss(kind, aggregate="token_mean", **options)
    if config.entropy_coef:
        raise ValueError(f"entropy_coef must be 0: prime-rl gives a loss no entropy; got {config.entropy_coef}")
    if config.sampler_correction != "none":
        raise ValueError(
            "sampler_correction must be 'none': prime-rl's old log-probs are the sampler's; "
            f"got {config.sampler_correction!r}"
        )
    return partial(_of_kind, config=config)


@lru_cache
def _unclipped(kl_tau: float) -> tk.PolicyLoss:
    return tk.PolicyLoss("dapo", clip_low=1.0, clip_high=UNBOUNDED, kl="k2", kl_coef=2 * kl_tau)


def _kept(x: Tokens, advantages: Tensor, kept: Tensor, kl_tau: float, scale: float) -> Tensor:
    """The sum of w (-kept A r + kl_tau (log r)^2) over the scale."""
    weights = None if x.weights is None else torch.where(x.mask, x.weights, 0)
    loss, _ = tk.policy_loss(
        x.new,
        x.old,
        torch.where(kept, advantages if weights is None else advantages * weights, 0),
        x.cu_seqlens,
        config=_unclipped(kl_tau),
        mask=x.mask,
        ref_logprobs=x.old,
        normalizer=scale,
        per_token=True,
        kl_weights=weights,
        kl_normalizer=None if weights is None else scale,
    )
    return loss


@torch.no_grad()
def _moved(x: Tokens) -> tuple[Tensor, Tensor]:
    """By how much each token's probability has changed, and prime-rl's mismatch r - 1 - log r."""
    log_ratio = x.new - x.old
    return x.new.exp() - x.old.exp(), log_ratio.exp() - log_ratio - 1


def _default(
    x: Tokens, scale: float, *, dppo_mask_low: float, dppo_mask_high: float, adv_tau: float, kl_tau: float
) -> tuple[Tensor, Metrics]:
    """``default_loss_fn``: DPPO's trust region in total variation, on the side that the advantage asks for."""
    moved, mismatch = _moved(x)
    up, down = x.advantages > 0, x.advantages < 0
    far = torch.where(up, moved > dppo_mask_high, moved < -dppo_mask_low)
    dropped = x.mask & far
    return _kept(x, adv_tau * x.advantages, ~far, kl_tau, scale), {
        "masked_mismatch_kl": (mismatch, dropped),
        "unmasked_mismatch_kl": (mismatch, x.mask & ~far),
        "is_masked": (far, x.mask),
        "is_masked_low": (down & far, x.mask),
        "is_masked_high": (up & far, x.mask),
        "masked_advantage_positive": (up, dropped),
        "masked_advantage_negative": (down, dropped),
    }


def _ipo(x: Tokens, scale: float, *, ipo_threshold: float, adv_tau: float, kl_tau: float) -> tuple[Tensor, Metrics]:
    """``ipo_loss_fn``: the trust region on both sides, whatever the advantage."""
    moved, mismatch = _moved(x)
    far = moved.abs() > ipo_threshold
    return _kept(x, adv_tau * x.advantages, ~far, kl_tau, scale), {
        "masked_mismatch_kl": (mismatch, x.mask & far),
        "unmasked_mismatch_kl": (mismatch, x.mask & ~far),
        "is_masked": (far, x.mask),
    }


def ref_kl(x: Tokens, scale: float) -> tuple[Tensor, Metrics]:
    """``ref_kl_loss_fn``: the reference's log-probs less the policy's as advantages, kept where it lost little."""
    if x.ref is None:
        if bool(x.mask.any()):
            raise ValueError("ref_logprobs must be given where ref_kl_weights are not all 0, got None")
        return torch.where(x.mask, x.new, 0).sum(), {}
    moved, mismatch = _moved(x)
    far, apart = moved < -REF_KL_THRESHOLD, (x.ref - x.new).detach()
    return _kept(x, apart, ~far, REF_KL_TAU, scale), {
        "ref_kl/masked_mismatch_kl": (mismatch, x.mask & far),
        "ref_kl/unmasked_mismatch_kl": (mismatch, x.mask & ~far),
        "ref_kl/is_masked": (far, x.mask),
        "ref_kl": (apart, x.mask),
    }


def ce(x: Tokens, scale: float) -> tuple[Tensor, Metrics]:
    """``ce_loss_fn``: -w log p."""
    assert x.weights is not None
    config = tk.PolicyLoss("reinforce")
    options: dict[str, Any] = {"mask": x.mask, "normalizer": scale, "per_token": True}
    loss, _ = tk.policy_loss(x.new, None, x.weights, x.cu_seqlens, config=config, **options)
    return loss, {"nll": (-x.new, x.mask)}


def _of_kind(x: Tokens, scale: float, *, config: tk.PolicyLoss) -> tuple[Tensor, Metrics]:
    """A kind of trajkern's. Its loss of a token is linear in A >= 0 and in A <= 0, so w A is w times it for w >= 0."""
    a = x.advantages
    if x.weights is not None:
        if config.kl_coef:
            raise ValueError(f"kl_coef must be 0 where there are weights of tokens, got {config.kl_coef}")
        if x.weights.is_cpu and bool((x.mask & (x.weights < 0)).any()):
            least = float(x.weights[x.mask].min())
            raise ValueError(f"the weights of tokens must not be negative for kind {config.kind!r}, got {least}")
        a = a * torch.where(x.weights < 0, torch.nan, x.weights)  # where their values are not read
    loss, metrics = tk.policy_loss(
        x.new,
        x.old,
        a,
        x.cu_seqlens,
        config=config,
        mask=x.mask,
        ref_logprobs=x.ref if config.kl_coef else None,
        normalizer=scale,
        per_token=True,
    )
    found = dict(zip(METRICS, computed("ref_logprobs") if config.kl_coef else computed(), strict=True))
    return loss, {name: x for name, x in metrics.items() if found[name]}
