"""SkyRL's policy losses on padded rows, in trajkern's op; :mod:`trajkern.integrations.skyrl` registers them.

Each has its formula in :func:`trajkern.policy_loss` and says here how SkyRL's differs. SkyRL scales the advantages so
that a plain sum is the reduction that was asked for; a token's loss here is multiplied with what stands in the loss
mask, as there. A mini-batch without an unmasked token has loss 0. Log-ratios are bounded at 20 either way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_choice, check_number, renamed
from trajkern.integrations._adapter import PaddedRows, clipped, padded_rows
from trajkern.integrations._outside import Outside
from trajkern.losses.kinds import LOG_RATIO_BOUND

Result = tuple[Tensor, dict[str, float]]
LOSSES: dict[str, Callable[..., Result]] = {}
OPTIONS = {  # what trajkern calls an option -> what SkyRL does, of the losses by name
    "": {"clip_low": "eps_clip_low", "clip_high": "eps_clip_high", "clip_dual": "clip_ratio_c"},
    "cispo": {"clip_low": "cispo.cispo_eps_clip_low", "clip_high": "cispo.cispo_eps_clip_high"},
    "sapo": {"sapo_tau_pos": "sapo.tau_pos", "sapo_tau_neg": "sapo.tau_neg"},
    "kl_cov": {"cov_fraction": "kl_cov.kl_cov_frac", "cov_coef": "kl_cov.ppo_kl_coef"},
}
CORRECTION = "skyrl.backends.skyrl_train.utils.off_policy_correction_utils"
UNCLIPPED: dict[str, Any] = {
    "clip_low": 1.0,
    "clip_high": torch.tensor(LOG_RATIO_BOUND, dtype=torch.float32, device="cpu").exp().item(),
}  # a band that holds every ratio


class _Call:
    """One call of a policy loss: SkyRL's arguments, checked, as the op wants them."""

    def __init__(self, log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs):
        if config is None:
            raise ValueError("config must be the algorithm's configuration, got None")
        if not isinstance(log_probs, Tensor):
            raise TypeError(f"log_probs must be a tensor, got {type(log_probs).__name__}")
        self.config, self._options = config, Outside("config", config)
        self.loss_mask = torch.ones_like(log_probs, dtype=torch.float32) if loss_mask is None else loss_mask
        self.rows: PaddedRows = padded_rows("loss_mask", self.loss_mask, weighs=True)
        self.weights = self.loss_mask.reshape(-1).float()
        self.new, self.advantages = self._pack("log_probs", log_probs), self._pack("advantages", advantages).detach()
        self._old, self._rollout = old_log_probs, rollout_logprobs

    def _pack(self, name: str, x: Any) -> Tensor:
        return self.rows.pack(name, x)

    @cached_property
    def old(self) -> Tensor:
        return self._pack("old_log_probs", self._old).detach()

    @cached_property
    def rollout(self) -> Tensor | None:
        return None if self._rollout is None else self._pack("rollout_logprobs", self._rollout).detach()

    def option(self, path: str) -> Outside:
        """An option of the configuration by its path, such as "cispo.cispo_eps_clip_low"."""
        found = self._options
        for name in path.split("."):
            found = found.at(name)
        return found

    def number(self, path: str) -> float:
        return float(check_number(path, self.option(path).value))

    @property
    def band(self) -> dict[str, Any]:
        return {"clip_low": self.number("eps_clip_low"), "clip_high": self.number("eps_clip_high")}

    def ratio(self, base: Tensor) -> Tensor:
        """exp(new - base) without a gradient, ``[B * L]``; 1 under the mask."""
        moved = torch.where(self.rows.mask, self.new.detach() - base, 0)
        return moved.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()

    def mean(self, x: Tensor) -> Tensor:  # [B * L]
        """The mean over tokens by their weights in the loss mask."""
        return torch.where(self.rows.mask, x.float(), 0) @ self.weights / self.weights.sum().clamp_min(1)

    def __call__(
        self,
        loss: tk.PolicyLoss,
        *,
        base: Tensor,
        new: Tensor | None = None,
        factor: Tensor | None = None,
        **found: Any,
    ) -> Result:
        """The op's sum with SkyRL's own off-policy correction, whose factor is at least 0, so that it may stand at A.

        Every kind of loss but kl_cov has f(r, w A) = w f(r, A) for w >= 0.
        """
        weights, of_correction = self._correction()
        a = self.advantages * weights
        value, _ = tk.policy_loss(
            self.new if new is None else new,
            base,
            a if factor is None else a * factor,
            self.rows.cu_seqlens,
            config=loss,
            mask=self.rows.mask,
            per_token=True,
        )
        return value, _numbers(found) | of_correction

    @torch.no_grad()
    def _correction(self) -> tuple[Tensor, dict[str, float]]:
        """What each token's loss is multiplied with, ``[B * L]``, and SkyRL's metrics of it."""
        options = getattr(self.config, "off_policy_correction", None)
        if options is None or self.rollout is None:
            return self.weights, {}
        theirs = importlib.import_module(CORRECTION)
        if not theirs.off_policy_correction_enabled(options):
            return self.weights, {}
        rollout = torch.where(self.rows.mask, self.rollout, 0)
        old = torch.where(self.rows.mask, self.old, 0)
        ratio, metrics, mask = theirs.compute_off_policy_correction(
            self.rows.pad(old), self.rows.pad(rollout), self.loss_mask, options
        )
        weights = mask if ratio is None else mask * ratio
        return weights.expand(self.rows.shape).reshape(-1).float(), metrics


def _numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """SkyRL averages numbers only; they are read at once."""
    values = torch.stack([x.detach().double() for x in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))


def _entered(function: Callable[[_Call], Result]) -> Callable[..., Result]:
    """Enters a loss into ``LOSSES`` by its name, with SkyRL's signature; a worker finds it by module and name."""

    def policy_loss(
        log_probs: Tensor,  # [B, L]
        old_log_probs: Tensor,  # [B, L]
        advantages: Tensor,  # [B, L]
        config: Any,
        loss_mask: Tensor | None = None,  # [B, L]
        rollout_logprobs: Tensor | None = None,  # [B, L]
    ) -> Result:
        with renamed(OPTIONS.get(function.__name__, OPTIONS[""])):
            return function(_Call(log_probs, old_log_probs, advantages, config, loss_mask, rollout_logprobs))

    policy_loss.__name__ = policy_loss.__qualname__ = function.__name__
    policy_loss.__doc__, policy_loss.__module__ = function.__doc__, function.__module__
    LOSSES[function.__name__] = policy_loss
    return policy_loss


def _clipped(call: _Call, dual: float | None) -> Result:
    spec = tk.PolicyLoss("grpo", aggregate="token_sum", clip_dual=dual, **call.band)
    below, above = clipped(call.ratio(call.old), call.advantages, spec)
    return call(spec, base=call.old, clip_ratio=call.mean(below | above))


@_entered
def regular(call: _Call) -> Result:
    """As ``regular``: PPO's clip."""
    return _clipped(call, None)


@_entered
def dual_clip(call: _Call) -> Result:
    """As ``dual_clip``: PPO's clip, with A < 0 at most -clip_ratio_c A. ``clip_ratio`` is of the first clip alone."""
    return _clipped(call, call.number("clip_ratio_c"))


@_entered
def gspo(call: _Call) -> Result:
    """As ``gspo``: a row's mean log-ratio, below 10, in the value of every token and its own log-prob in the gradient.

    Where a row's tokens have one advantage and one weight that is trajkern's kind "gspo".
    """
    pad, weights = call.rows.pad, call.rows.pad(call.weights)
    log_ratio = torch.where(pad(call.rows.mask), pad(call.new.detach() - call.old), 0)
    mean = (log_ratio * weights).sum(-1) / weights.sum(-1).clamp_min(1)
    new = call.rows.pack("log_probs", mean[:, None] + pad(call.new - call.new.detach())).clamp(max=10.0)
    spec = tk.PolicyLoss("grpo", aggregate="token_sum", **call.band)
    ratio = new.detach().clamp_min(-LOG_RATIO_BOUND).exp()
    below, above = clipped(ratio, call.advantages, spec)
    return call(spec, base=torch.zeros_like(call.new.detach()), new=new, clip_ratio=call.mean(below | above))


@_entered
def cispo(call: _Call) -> Result:
    """As ``cispo``, whose ratio is clipped on both sides; to the rollout's log-probs where ``cispo_anchor`` says so."""
    chosen = call.option("cispo").get("cispo_anchor")
    anchor = None if chosen is None else check_choice("cispo.cispo_anchor", chosen.value, ("old", "rollout"))
    base = call.old if anchor != "rollout" else _needed(call, "cispo with cispo_anchor='rollout'")
    if anchor == "rollout" and (kind := call.config.off_policy_correction.tis_ratio_type) is not None:
        raise ValueError(
            "off_policy_correction.tis_ratio_type must be None with cispo_anchor='rollout', whose ratio corrects "
            f"already; got {kind!r}"
        )
    low, high = (call.number(f"cispo.cispo_eps_clip_{side}") for side in ("low", "high"))
    ratio = call.ratio(base)
    found = {"clip_ratio": call.mean((ratio < 1 - low) | (ratio > 1 + high))}
    if anchor is not None:
        inside, none = call.rows.mask, call.rows.mask.any()
        found["cispo/ratio_mean"] = call.mean(ratio)
        found["cispo/ratio_clamped_mean"] = call.mean(ratio.clamp(1 - low, 1 + high))
        found["cispo/ratio_max"] = torch.where(none, torch.where(inside, ratio, 0).amax(), ratio.new_ones(()))
        found["cispo/ratio_min"] = torch.where(none, torch.where(inside, ratio, torch.inf).amin(), ratio.new_ones(()))
    return call(tk.PolicyLoss("cispo", aggregate="token_sum", clip_low=low, clip_high=high), base=base, **found)


@_entered
def rollout_is(call: _Call) -> Result:
    """As ``rollout_is``: -sg(r) A log p with r to the rollout's log-probs, 0 where r is not inside the band."""
    base = _needed(call, "rollout_is")
    ratio = call.ratio(base)
    inside = (ratio > 1 - call.band["clip_low"]) & (ratio < 1 + call.band["clip_high"])
    spec = tk.PolicyLoss("reinforce", aggregate="token_sum")
    return call(spec, base=base, factor=torch.where(inside, ratio, 0), clip_ratio=call.mean(~inside))


@_entered
def dppo(call: _Call) -> Result:
    """As ``dppo``: -r A, r to the rollout's log-probs where there are some, without the tokens that moved too far.

    Its value is r A where trajkern's kinds "dppo_tv" and "dppo_kl" have sg(r) A log p; the gradients are the same.
    """
    base = call.old if call.rollout is None else call.rollout
    masked = call.rows.mask
    new, base_here = (torch.where(masked, x, -1.0) for x in (call.new.detach(), base))
    p, q = new.exp(), base_here.exp()
    up, down = (call.advantages > 0) & (p > q), (call.advantages < 0) & (p < q)
    kind = call.option("dppo.dppo_type").value
    kind = check_choice("dppo.dppo_type", kind, ("binary_tv", "binary_kl"))
    if kind == "binary_tv":
        apart = (p - q).abs()
    else:
        apart = q * (base_here - new) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    out = (up & (apart > call.number("dppo.delta_high"))) | (down & (apart > call.number("dppo.delta_low")))
    spec = tk.PolicyLoss("grpo", aggregate="token_sum", **UNCLIPPED)
    return call(spec, base=base, factor=torch.where(out, 0.0, 1.0), clip_ratio=call.mean(out))


@_entered
def sapo(call: _Call) -> Result:
    """As ``sapo``."""
    tau: dict[str, Any] = {
        "sapo_tau_pos": call.number("sapo.tau_pos"),
        "sapo_tau_neg": call.number("sapo.tau_neg"),
    }
    spec = tk.PolicyLoss("sapo", aggregate="token_sum", **tau)
    return call(spec, base=call.old, clip_ratio=call.weights.new_zeros(()))


@_entered
def importance_sampling(call: _Call) -> Result:
    """As ``importance_sampling``: -r A; as there, without the off-policy correction."""
    value, metrics = tk.policy_loss(
        call.new,
        call.old,
        call.advantages * call.weights,
        call.rows.cu_seqlens,
        config=tk.PolicyLoss("grpo", aggregate="token_sum", **UNCLIPPED),
        mask=call.rows.mask,
        per_token=True,
    )
    return value, _numbers({"importance_ratio": call.mean(call.ratio(call.old))})


@_entered
def kl_cov(call: _Call) -> Result:
    """As ``kl_cov``, without the off-policy correction; of equal covariances the earlier token is taken.

    The penalty does not scale with the advantage, so the loss mask must be 0 or 1, which is checked on the CPU.
    """
    if call.weights.is_cpu and bool(((call.weights != 0) & (call.weights != 1)).any()):
        raise ValueError("loss_mask must be 0 or 1 for kl_cov, whose penalty is no multiple of the advantage")
    options: dict[str, Any] = {
        "cov_fraction": call.number("kl_cov.kl_cov_frac"),
        "cov_coef": call.number("kl_cov.ppo_kl_coef"),
    }
    spec = tk.PolicyLoss("kl_cov", aggregate="token_sum", **options)
    rows = call.rows
    value, _ = tk.policy_loss(
        call.new, call.old, call.advantages, rows.cu_seqlens, config=spec, mask=rows.mask, per_token=True
    )
    return value, {"clip_ratio": 0.0}


def _needed(call: _Call, what: str) -> Tensor:
    if call.rollout is None:
        raise ValueError(f"rollout_logprobs must be given for {what}, got None: generator.sampling_params.logprobs=1")
    return call.rollout
