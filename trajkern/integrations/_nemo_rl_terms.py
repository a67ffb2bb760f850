"""What NeMo-RL's clipped policy loss is made of, on padded rows: options, importance weights, KL term and metrics.

Formulas of NeMo-RL at commit 7ea279a, those of its 0.7.0; nothing of it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_tensor, describe, renamed
from trajkern.integrations._adapter import PaddedRows, padded_rows
from trajkern.integrations._arguments import NUMBERS, check_kind, parts_of

KL_TYPES = ("k1", "k2", "k3")
CORRECTIONS = (None, "tis", "icepop", "seq-mask-tis")
UNBOUNDED = 1e9  # above exp(20), the op's largest ratio


@dataclass(frozen=True)
class Options:
    """NeMo-RL's ``ClippedPGLossConfig``, its names and defaults; what it does not allow together is a ValueError."""

    disable_ppo_ratio: bool = False
    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    reference_policy_kl_penalty: float = 0.01
    reference_policy_kl_type: str = "k3"
    kl_input_clamp_value: float | None = 20.0
    kl_output_clamp_value: float | None = 10.0
    use_kl_in_reward: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None
    use_on_policy_kl_approximation: bool = False
    force_on_policy_ratio: bool = False
    use_cispo: bool = False
    positive_example_nll_weight: float = 0.0

    @classmethod
    def of(cls, cfg: Any) -> Options:
        """Of NeMo-RL's configuration, or a mapping; what it declares and this does not know is a ValueError.

        NeMo-RL lets a configuration file add names that nobody declares, and reads none of them; nor does this.
        """
        if not isinstance(cfg, Mapping) and (isinstance(cfg, Tensor) or not hasattr(cfg, "__dict__")):
            raise TypeError(
                f"cfg must be NeMo-RL's ClippedPGLossConfig or a mapping of its options, got {describe(cfg)}"
            )
        declared = cfg if isinstance(cfg, Mapping) else getattr(type(cfg), "model_fields", vars(cfg))
        known = [x.name for x in fields(cls)]
        if unknown := sorted(str(x) for x in set(declared) - set(known)):
            raise ValueError(f"cfg has options that trajkern's loss does not know: {', '.join(unknown)}")
        if isinstance(cfg, Mapping):
            return cls(**cfg)
        return cls(**{name: getattr(cfg, name) for name in known if hasattr(cfg, name)})

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            check_kind(field.name, value, parts_of(field.type), None)
            if "float" in str(field.type) and value is not None:
                object.__setattr__(self, field.name, float(value))
        if self.reference_policy_kl_type not in KL_TYPES:
            raise ValueError(
                f"reference_policy_kl_type must be one of {KL_TYPES}, got {self.reference_policy_kl_type!r}"
            )
        if self.ratio_clip_c is not None and not self.ratio_clip_c > 1:
            raise ValueError(f"ratio_clip_c must be greater than 1, got {self.ratio_clip_c}")
        if self.sequence_level_importance_ratios and self.token_level_loss:
            raise ValueError("token_level_loss must be False where sequence_level_importance_ratios is True, got True")
        if self.use_cispo:
            apart = ("disable_ppo_ratio", "force_on_policy_ratio", "sequence_level_importance_ratios", "ratio_clip_c")
            for name in apart:
                if getattr(self, name):
                    raise ValueError(f"{name} must not be given where use_cispo is True, got {getattr(self, name)}")
            if not self.token_level_loss:
                raise ValueError("token_level_loss must be True where use_cispo is True, got False")
        self._check_truncation()

    def _check_truncation(self) -> None:
        kind, prefix = self.truncated_importance_sampling_type, "truncated_importance_sampling"
        high, low = self.truncated_importance_sampling_ratio, self.truncated_importance_sampling_ratio_min
        if kind not in CORRECTIONS:
            raise ValueError(f"{prefix}_type must be one of {CORRECTIONS}, got {kind!r}")
        if kind is None:
            if high is not None:
                raise ValueError(f"{prefix}_type must be given where {prefix}_ratio is, got None")
            return
        if not self.use_importance_sampling_correction:
            raise ValueError(f"use_importance_sampling_correction must be True for {prefix}_type {kind!r}, got False")
        if high is None or not high > 0:
            raise ValueError(f"{prefix}_ratio must be positive for {prefix}_type {kind!r}, got {high}")
        if low is None and kind != "tis":
            raise ValueError(f"{prefix}_ratio_min must be given for {prefix}_type {kind!r}, got None")
        if low is not None and low > high:
            raise ValueError(f"{prefix}_ratio_min must be at most {prefix}_ratio = {high}, got {low}")
        if kind == "seq-mask-tis" and self.sequence_level_importance_ratios:
            raise ValueError(f"sequence_level_importance_ratios must be False for {prefix}_type {kind!r}, got True")

    @property
    def kl_penalty(self) -> float:
        """The coefficient of the KL term in the loss."""
        return 0.0 if self.use_kl_in_reward else self.reference_policy_kl_penalty

    def policy_loss(self) -> tk.PolicyLoss:
        """The clipped term in the op: without a ratio, at a ratio of 1, CISPO's, or clipped per token or sequence."""
        aggregate = "token_mean" if self.token_level_loss else "seq_mean_token_mean"
        clip: dict[str, Any] = {"clip_low": self.ratio_clip_min, "clip_high": self.ratio_clip_max}
        if self.force_on_policy_ratio:
            kind, clip = "dapo", {"clip_low": 1.0, "clip_high": UNBOUNDED}
        elif self.disable_ppo_ratio:
            kind, clip = "reinforce", {}
        elif self.use_cispo:
            kind = "cispo"
        else:
            kind = "gspo" if self.sequence_level_importance_ratios else "dapo"
            clip["clip_dual"] = self.ratio_clip_c
        names = {"clip_low": "ratio_clip_min", "clip_high": "ratio_clip_max", "clip_dual": "ratio_clip_c"}
        with renamed(names):
            return tk.PolicyLoss(kind, aggregate=aggregate, **clip)


class Batch(NamedTuple):
    """A micro-batch of B padded rows as NeMo-RL hands it over; the first token of each has no log-prob."""

    rows: PaddedRows  # of [B, S-1]
    samples: Tensor  # bool [B]
    new: Tensor  # [T], T = B (S-1), differentiable
    old: Tensor  # [T], new without its gradient where the ratio is forced to 1
    sampler: Tensor  # [T]
    advantages: Tensor  # [T]
    legal: Tensor  # bool, whether the masks hold 0 and 1 alone
    of_rows: Tensor  # int64 [T], each token's row

    def sums(self, x: Tensor) -> Tensor:
        """The sum of each row's tokens that take part, ``[B]``."""
        return torch.where(self.rows.pad(self.rows.mask), self.rows.pad(x), 0).sum(-1)

    def means(self, x: Tensor) -> Tensor:
        """Their mean, 0 where none does, ``[B]``."""
        return self.sums(x) / self.rows.pad(self.rows.mask).sum(-1).clamp_min(1)


def batch_of(new: Tensor, data: Mapping[str, Any], forced: bool) -> Batch:
    """A checked micro-batch; ValueError or TypeError, which name the entry of ``data``, where it does not fit."""
    if not isinstance(new, Tensor) or new.ndim != 2:
        got = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise ValueError(f"next_token_logprobs must have shape [B, S-1], got {got}")
    if not isinstance(data, Mapping):
        raise TypeError(f"data must be a mapping, got {describe(data)}")
    token_mask, sample_mask = (_entry(data, name, new.device) for name in ("token_mask", "sample_mask"))
    if token_mask.shape != (new.shape[0], new.shape[1] + 1):
        wanted = [new.shape[0], new.shape[1] + 1]
        raise ValueError(f"data['token_mask'] must have shape [B, S] = {wanted}, got {list(token_mask.shape)}")
    if sample_mask.shape != new.shape[:1]:
        raise ValueError(f"data['sample_mask'] must have shape [B] = {[new.shape[0]]}, got {list(sample_mask.shape)}")
    token_mask = token_mask[:, 1:]
    legal = torch.stack([((x == 0) | (x == 1)).all() for x in (token_mask, sample_mask)]).all()
    if legal.is_cpu and not bool(legal):
        raise ValueError(
            "data['token_mask'] and data['sample_mask'] must hold 0 and 1 alone, which choose and not weigh"
        )
    samples = sample_mask != 0
    rows = padded_rows("data['token_mask']", (token_mask != 0) & samples[:, None])
    sampler, advantages = (shifted(rows, data, name) for name in ("generation_logprobs", "advantages"))
    flat = new.reshape(-1)
    old = flat.detach() if forced else shifted(rows, data, "prev_logprobs")
    of_rows = torch.arange(new.shape[0], device=new.device).repeat_interleave(new.shape[1])
    return Batch(rows, samples, flat, old, sampler, advantages, legal, of_rows)


def _entry(data: Mapping[str, Any], name: str, device: torch.device) -> Tensor:
    if name not in data:
        raise ValueError(f"data must have {name!r}, got {sorted(data.keys())}")
    check_tensor(f"data[{name!r}]", data[name], dtypes=NUMBERS, device=device)
    return data[name]


def shifted(rows: PaddedRows, data: Mapping[str, Any], name: str) -> Tensor:
    """An entry ``[B, S]`` of the micro-batch without its first column, as ``[T]``; 0 where no token takes part."""
    x = _entry(data, name, rows.mask.device)
    wanted = [rows.shape[0], rows.shape[1] + 1]
    if list(x.shape) != wanted:
        raise ValueError(f"data[{name!r}] must have shape [B, S] = {wanted}, got {list(x.shape)}")
    return torch.where(rows.mask, x[:, 1:].detach().reshape(-1), 0)


class Weights(NamedTuple):
    """Importance weights of what was sampled, and which of them were out of bounds where they are truncated."""

    raw: Tensor  # [T], or [B] of rows
    outside: Tensor | None  # bool [T], or [B] of rows


def spread(x: Batch, values: Tensor, by_row: bool) -> Tensor:
    """``[T]`` of what is ``[B]`` where it is of rows."""
    return values[x.of_rows] if by_row else values


@torch.no_grad()
def weights_of(x: Batch, o: Options) -> Weights:
    """old / sampler, of a token or the product over a row, truncated as the options say; 0 where it is not finite."""
    apart = x.old - x.sampler
    log_weights = x.sums(apart) if o.sequence_level_importance_ratios else apart
    weights = log_weights.exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    kind, high = o.truncated_importance_sampling_type, o.truncated_importance_sampling_ratio
    if kind is None or high is None:
        return Weights(weights, None)
    low = o.truncated_importance_sampling_ratio_min or 0.0
    outside = (weights > high) | (weights < low)
    if kind == "tis":
        return Weights(weights.clamp(low, high), outside)
    if kind == "icepop":
        return Weights(torch.where(outside, 0, weights), outside)
    mean = x.means(apart.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)).exp()
    rejected = ~((mean >= low) & (mean <= high))
    return Weights(torch.where(rejected[x.of_rows], 0, weights), rejected)


def kl_of(log_ratio: Tensor, kind: str) -> Tensor:
    """NeMo-RL's estimate of a token, of the log of the other policy's probability over the one's."""
    if kind == "k1":
        return -log_ratio
    return log_ratio.square() / 2 if kind == "k2" else torch.expm1(log_ratio) - log_ratio


def kl_term(x: Batch, data: Mapping[str, Any], o: Options) -> Tensor:
    """The KL to the reference of every token ``[T]``, with the gradient of the sampling, clamped as the options say."""
    ref = shifted(x.rows, data, "reference_policy_logprobs")
    new = data["curr_logprobs_unfiltered"] if "curr_logprobs_unfiltered" in data else x.rows.pad(x.new)
    if new.shape != x.rows.shape:
        wanted = list(x.rows.shape)
        raise ValueError(f"data['curr_logprobs_unfiltered'] must have shape [B, S-1] = {wanted}, got {list(new.shape)}")
    new = torch.where(x.rows.mask, new.reshape(-1), 0)
    base = x.sampler if o.use_on_policy_kl_approximation else new.detach()
    weights = (new - base).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    log_ratio, bound = ref - new, o.kl_input_clamp_value
    if bound is not None:
        inside = log_ratio.abs() <= bound
        weights = torch.where(inside, weights, weights.detach())
        log_ratio = log_ratio.clamp(-bound, bound)
    kl, most = weights * kl_of(log_ratio, o.reference_policy_kl_type), o.kl_output_clamp_value
    return kl if most is None else kl.clamp(-most, most)


class Ratios(NamedTuple):
    """What the loss calls ratios, of tokens ``[T]``: the log-probs themselves where it has none."""

    plain: Tensor
    clamped: Tensor


@torch.no_grad()
def ratios_of(x: Batch, o: Options) -> Ratios:
    new = x.new.detach()
    if o.force_on_policy_ratio:
        return Ratios(torch.ones_like(new), torch.ones_like(new))
    if o.disable_ppo_ratio:
        return Ratios(new, new)
    log_ratio = torch.where(x.rows.mask, new - x.old, 0)
    if o.sequence_level_importance_ratios:
        log_ratio = x.means(log_ratio)[x.of_rows]
    ratio = log_ratio.exp()
    return Ratios(ratio, ratio.clamp(1 - o.ratio_clip_min, 1 + o.ratio_clip_max))


@torch.no_grad()
def metrics_of(x: Batch, o: Options, weights: Weights, tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """NeMo-RL's metrics as tensors; ``tokens`` and ``rows`` are the numbers that divide their sums."""
    mask, new = x.rows.mask, torch.where(x.rows.mask, x.new.detach(), 0)
    ratios, mixture = ratios_of(x, o), (0.5 * x.old.exp() + 0.5 * x.sampler.exp()).log()

    def mean(values: Tensor, by_row: bool = False) -> Tensor:
        return torch.where(mask, spread(x, values, by_row), 0).sum() / tokens

    def extreme(values: Tensor, sign: int) -> Tensor:
        if not values.shape[0]:
            return values.new_tensor(-sign * torch.inf)
        return sign * torch.where(mask, sign * values, -torch.inf).max()

    kind, apart, by_row = o.reference_policy_kl_type, x.sampler - x.old, o.sequence_level_importance_ratios
    of_samples = (weights.raw * x.samples).sum() / rows if by_row else mean(weights.raw)
    found = {
        "probs_ratio": mean(ratios.plain),
        "probs_ratio_clamped": mean(ratios.clamped),
        "probs_ratio_min": extreme(ratios.plain, -1),
        "probs_ratio_max": extreme(ratios.plain, 1),
        "probs_ratio_clamped_min": extreme(ratios.clamped, -1),
        "probs_ratio_clamped_max": extreme(ratios.clamped, 1),
        "token_mult_prob_error": mean(apart.abs().exp()),
        "gen_kl_error": mean(kl_of(-apart, kind)),
        "policy_kl_error": mean(kl_of(apart, kind)),
        "js_divergence_error": mean((kl_of(x.old - mixture, "k3") + kl_of(x.sampler - mixture, "k3")) / 2),
        "sampling_importance_ratio": of_samples,
        "num_valid_samples": x.samples.sum(),
        "approx_entropy": -mean((new - x.sampler).exp() * new),
    }
    if weights.outside is not None:
        if o.truncated_importance_sampling_type == "seq-mask-tis":
            found["is_oob_ratio"] = (weights.outside & x.samples).sum() / rows
        else:
            found["is_oob_ratio"] = mean(weights.outside.to(new.dtype), by_row)
    return found
