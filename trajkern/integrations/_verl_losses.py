"""verl's policy losses on padded rows, in trajkern's op; :mod:`trajkern.integrations.verl` registers them.

Each has its formula in :func:`trajkern.policy_loss` and says here how verl's differs. Where verl does not bound a
log-ratio (gspo from below, geo_mean, kl_cov, clip_cov), the op does, at 20 either way.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import renamed
from trajkern.integrations._adapter import PaddedRows, padded_rows
from trajkern.integrations._arguments import weighing

Result = tuple[Tensor, dict[str, Any]]
LOSSES: dict[str, Callable[..., Result]] = {}
WEIGHTS = "rollout_is_weights"
AGGREGATES = {
    mode: mode.replace("-", "_")
    for mode in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
}


_OPTIONS = {  # what the op's are made of
    "clip_dual": "clip_ratio_c",
    "cov_coef": "policy_loss.ppo_kl_coef",
    "cov_fraction": "policy_loss.kl_cov_ratio",
    "max_length": "config.global_batch_info['loss_scale_factor']",
    "normalizer": "config.global_batch_info",
    "sapo_tau_neg": "tau_neg",
    "sapo_tau_pos": "tau_pos",
}


class _Call:
    """One call of a policy loss: verl's arguments, checked, as the op wants them."""

    def __init__(self, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights):
        if config is None:
            raise ValueError("config must be the actor's configuration, got None")
        self.config, self.mode = config, loss_agg_mode
        self.rows: PaddedRows = padded_rows("response_mask", response_mask)
        tensors = {"old_log_prob": old_log_prob, "log_prob": log_prob, "advantages": advantages}
        self.old, self.new, self.advantages = (self.rows.pack(name, x) for name, x in tensors.items())
        self.old, self.advantages = self.old.detach(), self.advantages.detach()
        w = rollout_is_weights
        self.weights = None if w is None else weighing(WEIGHTS, self.rows.pack(WEIGHTS, w).detach())

    @property
    def weighted(self) -> Tensor:
        """w A: every kind of loss but kl_cov has f(r, w A) = w f(r, A) for w >= 0."""
        return self.advantages if self.weights is None else self.weights * self.advantages

    @property
    def bounds(self) -> dict[str, str]:
        """Which options give the clip's bounds."""
        given = {x: getattr(self.config, f"clip_ratio_{x}", None) is not None for x in ("low", "high")}
        return {f"clip_{x}": f"clip_ratio_{x}" if own else "clip_ratio" for x, own in given.items()}

    @property
    def clip(self) -> dict[str, Any]:
        c = self.config
        low, high = c.clip_ratio_low, c.clip_ratio_high
        return {
            "clip_low": c.clip_ratio if low is None else low,
            "clip_high": c.clip_ratio if high is None else high,
        }

    def __call__(self, loss: tk.PolicyLoss, *, new=None, old=None, advantages=None, mode=None, **options: Any):
        """The op, aggregated over the global batch that verl describes in ``config.global_batch_info``."""
        info = dict(getattr(self.config, "global_batch_info", None) or {})
        mode = self.mode if mode is None else mode
        if mode not in AGGREGATES:
            raise ValueError(f"loss_agg_mode must be one of {sorted(AGGREGATES)}, got {mode!r}")
        ranks, factor = info.pop("dp_size", 1), info.pop("loss_scale_factor", None)
        whole = {"token": info.pop("batch_num_tokens", None), "seq": info.pop("global_batch_size", None)}
        if info:
            raise ValueError(f"config.global_batch_info has entries that are not supported: {sorted(info)}")
        count = whole[mode.split("-")[0]] if mode != "token-sum" else None
        if count is None and ranks > 1 and mode != "token-sum":
            raise ValueError(f"config.global_batch_info must give the global count for {mode} where dp_size is {ranks}")
        length = self.rows.shape[1] if factor is None else factor
        loss = replace(
            loss, aggregate=AGGREGATES[mode], max_length=length if mode == "seq-mean-token-sum-norm" else None
        )
        options.setdefault("normalizer", None if count is None else count / ranks)
        value, metrics = tk.policy_loss(
            self.new if new is None else new,
            self.old if old is None else old,
            self.weighted if advantages is None else advantages,
            self.rows.cu_seqlens,
            config=loss,
            mask=self.rows.mask,
            per_token=True,
            **options,
        )
        return (value * ranks if mode == "token-sum" and ranks != 1 else value), metrics

    def unweighted(self, loss: tk.PolicyLoss, metrics: dict[str, Tensor], *, new=None, old=None) -> dict[str, Tensor]:
        """The op's metrics as verl counts them: of the advantages without the weights, whose zeros no clip cuts."""
        if self.weights is None:
            return metrics
        new, old = self.new if new is None else new, self.old if old is None else old
        options: dict[str, Any] = {"config": loss, "mask": self.rows.mask, "per_token": True}
        return tk.policy_loss(new.detach(), old, self.advantages, self.rows.cu_seqlens, **options)[1]

    def truncated(self, bound: float) -> Tensor:
        """Which tokens have a ratio above ``bound``."""
        return self.rows.mask & (self.new.detach() - self.old > math.log(bound))


def _metrics(config: Any, **metrics: Tensor | float) -> dict[str, Any]:
    """``actor/`` metrics, tensors where they are: verl's actor reads them, as it reads the loss, when it collects them.

    Its distillation loss hands them on unread to who can average numbers only: there they are numbers, read here.
    """
    found = {f"actor/{name}": x.detach() if isinstance(x, Tensor) else x for name, x in metrics.items()}
    if not hasattr(config, "policy_loss_mode"):
        return found
    tensors = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    values = torch.stack([x.double() for x in tensors.values()]).tolist() if tensors else []
    return found | dict(zip(tensors, values, strict=True))


def _entered(function: Callable[[_Call], Result]) -> Callable[[_Call], Result]:
    """Enters a loss into ``LOSSES`` under its name, with verl's signature."""

    def policy_loss(
        old_log_prob: Tensor,  # [B, L]
        log_prob: Tensor,  # [B, L]
        advantages: Tensor,  # [B, L]
        response_mask: Tensor,  # [B, L]
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # [B, L]
    ) -> Result:
        call = _Call(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
        with renamed(_OPTIONS | call.bounds):
            return function(call)

    policy_loss.__name__, policy_loss.__doc__ = function.__name__, function.__doc__
    LOSSES[function.__name__] = policy_loss
    return function


@_entered
def vanilla(call: _Call) -> Result:
    """As ``vanilla``: PPO's clip with dual clip ``clip_ratio_c``; every aggregation, so also DAPO and Dr. GRPO.

    A batch without an unmasked token has loss 0, where verl's is NaN; so do the losses below.
    """
    bound = float(call.config.get("clip_ratio_c", 3.0))
    spec = tk.PolicyLoss("grpo", clip_dual=bound, **call.clip)
    loss, m = call(spec)
    m = call.unweighted(spec, m)
    over = call.truncated(bound) & (call.advantages < 0)
    lower = call.rows.mean(over.to(loss.dtype))
    return loss, _metrics(
        call.config, pg_clipfrac=m["clip_low"] + m["clip_high"], ppo_kl=m["approx_kl"], pg_clipfrac_lower=lower
    )


def _dppo(call: _Call, kind: str) -> Result:
    bound = float(call.config.get("clip_ratio_c", 20.0))
    if not 1 <= bound <= 20:
        raise ValueError(f"clip_ratio_c must lie in [1, 20] for {kind}, got {bound}")
    spec = tk.PolicyLoss(kind, **call.clip)
    ratio = (call.new.detach() - call.old).exp()
    loss, m = call(spec, advantages=call.weighted * (bound / ratio.clamp(bound, 20)))  # the op truncates at 20
    m = call.unweighted(spec, m)
    over = call.truncated(bound)
    _, of_over = tk.policy_loss(
        call.new.detach(), call.old, call.advantages, call.rows.cu_seqlens, config=spec, mask=over, per_token=True
    )
    lower = of_over["num_tokens"] * (1 - of_over["clip_fraction"]) / m["num_tokens"].clamp_min(1)
    return loss, _metrics(call.config, pg_clipfrac=m["clip_fraction"], ppo_kl=m["approx_kl"], pg_clipfrac_lower=lower)


@_entered
def dppo_tv(call: _Call) -> Result:
    """As ``dppo_tv``: the ratio is truncated at ``clip_ratio_c`` (3 in verl's configuration), which is at most 20."""
    return _dppo(call, "dppo_tv")


@_entered
def dppo_kl(call: _Call) -> Result:
    """As ``dppo_kl``; the truncation as in ``dppo_tv``."""
    return _dppo(call, "dppo_kl")


@_entered
def cispo(call: _Call) -> Result:
    """As ``cispo``, whose ratio is clipped on both sides."""
    loss, m = call(tk.PolicyLoss("cispo", **call.clip))
    return loss, _metrics(call.config, pg_clipfrac=m["clip_fraction"], ppo_kl=m["approx_kl"], pg_clipfrac_lower=0.0)


@_entered
def sapo(call: _Call) -> Result:
    """As ``sapo``, which always takes the mean over rows of their token means, with ``tau_pos`` and ``tau_neg``."""
    spec = tk.PolicyLoss("sapo", sapo_tau_pos=float(call.config.tau_pos), sapo_tau_neg=float(call.config.tau_neg))
    loss, m = call(spec, mode="seq-mean-token-mean")
    return loss, _metrics(call.config, pg_clipfrac=0.0, ppo_kl=m["approx_kl"], pg_clipfrac_lower=0.0)


@_entered
def gspo(call: _Call) -> Result:
    """As ``gspo``: a row's mean log-ratio, below 10, in the value of every token and its own log-prob in the gradient.

    Where a row's tokens have one advantage and one weight that is trajkern's kind "gspo".
    """
    pad, mask = call.rows.pad, call.rows.pad(call.rows.mask)
    log_ratio = torch.where(mask, pad(call.new.detach() - call.old), 0)
    mean = log_ratio.sum(-1) / mask.sum(-1).clamp_min(1)
    log_ratios = call.rows.pack("log_prob", mean[:, None] + pad(call.new - call.new.detach())).clamp(max=10.0)
    spec, old = tk.PolicyLoss("dapo", **call.clip), torch.zeros_like(call.old)
    loss, m = call(spec, new=log_ratios, old=old)
    m = call.unweighted(spec, m, new=log_ratios, old=old)
    return loss, _metrics(
        call.config, pg_clipfrac=m["clip_fraction"], ppo_kl=-call.rows.mean(log_ratio), pg_clipfrac_lower=0.0
    )


@_entered
def geo_mean(call: _Call) -> Result:
    """As ``geo_mean`` (GMPO): the mean over all rows, empty ones too, whatever the mode and the global batch."""
    low, high = call.clip["clip_low"], call.clip["clip_high"]
    pad, mask = call.rows.pad, call.rows.pad(call.rows.mask)
    a = call.advantages
    if call.weights is not None:
        log_w = torch.where(mask, pad((call.weights + 1e-10).log()), 0).sum(-1) / mask.sum(-1).clamp_min(1)
        a = call.rows.pack("advantages", log_w.exp()[:, None] * pad(a))
    rows = max(call.rows.shape[0], 1)
    loss, m = call(tk.PolicyLoss("gmpo", **call.clip), advantages=a, mode="seq-mean-token-mean", normalizer=rows)
    log_ratio = call.new.detach() - call.old
    outside = (log_ratio < -low) | (log_ratio > high)
    signs = call.advantages > 0, call.advantages < 0
    upper, lower = (call.rows.mean((outside & sign).to(loss.dtype)) for sign in signs)
    return loss, _metrics(call.config, pg_clipfrac=upper, ppo_kl=m["approx_kl"], pg_clipfrac_lower=lower)


@_entered
def gpg(call: _Call) -> Result:
    """As ``gpg``: -A log p."""
    return call(tk.PolicyLoss("gpg"))[0], {}


@_entered
def dro(call: _Call) -> Result:
    """As ``dro`` (Direct Reward Optimization): -(A log p - dro_beta / 2 (log p - log q)^2)."""
    beta = call.config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(f"policy_loss.dro_beta must be positive, got {beta}")
    root = 1.0 if call.weights is None else call.weights.sqrt()  # w d^2 = (root new - root old)^2
    old, spec = call.old * root, tk.PolicyLoss("reinforce", kl="k2", kl_coef=float(beta))
    loss, _ = call(spec, new=call.new * root, old=old, ref_logprobs=old, advantages=call.advantages * root)
    return loss, _metrics(call.config, ppo_kl=call.rows.mean(call.old - call.new))


@_entered
def kl_cov(call: _Call) -> Result:
    """As ``kl_cov``; of equal covariances the earlier token is taken. A weight of 0 is exp(-20)."""
    c, tis = call.config.policy_loss, {}
    options: dict[str, Any] = {
        "cov_fraction": _or_default(c.kl_cov_ratio, 0.0002),
        "cov_coef": _or_default(c.ppo_kl_coef, 1.0),
    }
    if call.weights is not None:  # the penalty is weighted too, which the advantage alone cannot say
        tis["sampler_logprobs"] = call.old - call.weights.log()
        options |= {"sampler_correction": "tis", "sampler_high": math.exp(20)}
    loss, _ = call(tk.PolicyLoss("kl_cov", **options), advantages=call.advantages, **tis)
    return loss, _metrics(call.config, ppo_kl=call.rows.mean((call.new - call.old).abs()))


@_entered
def clip_cov(call: _Call) -> Result:
    """As ``clip_cov``: it drops tokens of the band at random, on the CPU those that verl draws (``torch.randperm``).

    On a GPU they are drawn there, as likely but others: verl's draw needs their number on the host. (trajkern's kind
    "clip_cov" drops those of largest covariance, without chance.)
    """
    dropped = _dropped(call)
    loss, m = call(tk.PolicyLoss("dapo", **call.clip), advantages=torch.where(dropped, 0, call.weighted))
    return loss, _metrics(call.config, pg_clipfrac=call.rows.mean(dropped.to(loss.dtype)), ppo_kl=m["approx_kl"])


@torch.no_grad()
def _dropped(call: _Call) -> Tensor:
    c, mask, a, new = call.config.policy_loss, call.rows.mask, call.advantages, call.new
    fraction = _or_default(c.clip_cov_ratio, 0.0002)
    if fraction <= 0:
        raise ValueError(f"policy_loss.clip_cov_ratio must be positive, got {fraction}")
    ratio = (new - call.old).exp()
    clipped = ratio * a > ratio.clamp(1 - call.clip["clip_low"], 1 + call.clip["clip_high"]) * a
    covariance = (a - call.rows.mean(a)) * (new - call.rows.mean(new))
    inside = (covariance > _or_default(c.clip_cov_lb, 1.0)) & (covariance < _or_default(c.clip_cov_ub, 5.0))
    candidates = mask & ~clipped & inside
    if mask.is_cpu:
        places = torch.nonzero(candidates)[:, 0]
        count = max(int(fraction * int(mask.sum())), 1)
        return torch.zeros_like(mask).index_fill(0, places[torch.randperm(len(places), device="cpu")[:count]], True)
    return _drawn(candidates, (fraction * mask.sum().double()).floor().clamp_min(1))


def _drawn(candidates: Tensor, count: Tensor) -> Tensor:
    """``count`` of the candidates, or all if there are fewer, each choice as likely; nothing is read on the host."""
    lots = torch.where(candidates, torch.rand(candidates.shape, dtype=torch.float32, device=candidates.device), 2.0)
    place = torch.arange(lots.shape[0], device=lots.device)
    return torch.zeros_like(candidates).scatter(0, lots.argsort(), place < count) & candidates


def _or_default(x: float | None, default: float) -> float:
    return default if x is None else float(x)


@_entered
def luspo(call: _Call) -> Result:
    """trajkern's kind "luspo", which verl lacks: the sum over a row of gspo's loss, mean over rows, in any mode."""
    spec = tk.PolicyLoss("luspo", **call.clip)
    loss, m = call(spec, mode="seq-mean-token-sum")
    m = call.unweighted(spec, m)
    return loss, _metrics(call.config, pg_clipfrac=m["clip_fraction"], ppo_kl=m["approx_kl"], pg_clipfrac_lower=0.0)


@_entered
def vespo(call: _Call) -> Result:
    """trajkern's kind "vespo", which verl lacks, with the default k and lambda."""
    loss, m = call(tk.PolicyLoss("vespo"))
    return loss, _metrics(call.config, pg_clipfrac=0.0, ppo_kl=m["approx_kl"], pg_clipfrac_lower=0.0)


def bypass_mode(
    old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None, rollout_is_weights=None
) -> Result:
    """As ``bypass_mode``: verl's own rollout correction and rejection mask, then ``vanilla`` or REINFORCE.

    ``rollout_is_weights`` is not read, as in verl: the weights are computed here.
    """
    correction = None if config is None else config.policy_loss.get("rollout_correction", None)
    if correction is None:
        raise ValueError("config.policy_loss.rollout_correction must be given for bypass_mode, got None")
    kind = correction.get("loss_type", "ppo_clip")
    if kind not in ("ppo_clip", "reinforce"):
        raise ValueError(f"rollout_correction.loss_type must be 'ppo_clip' or 'reinforce', got {kind!r}")
    helper = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
    names = {
        "rollout_is": None,
        "rollout_is_threshold": 2.0,
        "rollout_is_batch_normalize": False,
        "rollout_rs": None,
        "rollout_rs_threshold": None,
    }
    with torch.no_grad():
        weights, mask, metrics = helper.compute_rollout_correction_and_rejection_mask(
            old_log_prob=log_prob,
            rollout_log_prob=old_log_prob,
            response_mask=response_mask,
            **{name: correction.get(name, default) for name, default in names.items()},
        )
    arguments = (old_log_prob, log_prob, advantages, mask, loss_agg_mode, config)
    if kind == "ppo_clip":
        loss, of_loss = LOSSES["vanilla"](*arguments)  # its ratio is the correction
    else:
        loss, _ = LOSSES["gpg"](*arguments, weights.batch["rollout_is_weights"] if weights else None)
        rows = padded_rows("response_mask", mask)
        of_loss = _metrics(config, ppo_kl=rows.mean(old_log_prob - log_prob))
    return loss, {**of_loss, **metrics}


LOSSES["bypass_mode"] = bypass_mode
