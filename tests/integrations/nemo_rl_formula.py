"""NeMo-RL's clipped policy loss by its formulas, row by row (0.7.0; commit 7ea279a)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern.integrations._nemo_rl_terms import Options

EXTREMES = ("probs_ratio_min", "probs_ratio_max", "probs_ratio_clamped_min", "probs_ratio_clamped_max")
METRICS = (
    *("probs_ratio", "probs_ratio_clamped", "token_mult_prob_error", "gen_kl_error", "policy_kl_error"),
    *("js_divergence_error", "sampling_importance_ratio", "approx_entropy", "is_oob_ratio"),
)


class ClippedPGLossConfig:
    """As NeMo-RL's: declared options, with defaults."""

    model_fields = dict.fromkeys(Options.__dataclass_fields__)

    def __init__(self, **options: Any) -> None:
        vars(self).update(vars(Options()) | options)


class ClippedPGLossFn:
    """As NeMo-RL's, row by row and on the tokens that take part alone."""

    def __init__(self, cfg, use_fused_linear_logprobs=False):
        self.cfg = cfg

    def __call__(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks):
        o, tokens, rows = self.cfg, float(global_valid_toks) + 1e-8, float(global_valid_seqs) + 1e-8
        total, told = next_token_logprobs.new_zeros(()), dict.fromkeys(METRICS, 0.0)
        told |= dict(zip(EXTREMES, (torch.inf, -torch.inf) * 2, strict=True))
        told["num_valid_samples"] = float(data["sample_mask"].sum())
        kl, nll, correct = 0.0, 0.0, 0
        for b in range(len(next_token_logprobs)):
            if not data["sample_mask"][b]:
                continue
            keep = data["token_mask"][b, 1:] != 0
            row = _Row(next_token_logprobs[b][keep], {k: x[b, 1:][keep] for k, x in data.items() if padded(x)}, o)
            share = 1 / tokens if o.token_level_loss else 1 / (rows * max(int(keep.sum()), 1))
            total = total + share * row.clipped().sum()
            if o.reference_policy_kl_penalty and not o.use_kl_in_reward:
                kl = kl + share * row.kl().sum()
            if o.positive_example_nll_weight and data["rewards"][b] > 0:
                nll, correct = nll - row.new.sum(), correct + len(row.new)
            _tell(told, row, tokens, rows)
        nll = nll / max(correct, 1)
        loss = total + o.reference_policy_kl_penalty * kl + o.positive_example_nll_weight * nll
        parts = {"loss": loss, "kl_penalty": kl, "positive_nll_loss": nll}
        told |= {name: float(torch.as_tensor(x).detach()) for name, x in parts.items()}
        if o.truncated_importance_sampling_type is None:
            del told["is_oob_ratio"]
        return loss, told


def padded(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 2


def _estimate(log_ratio: Tensor, kind: str) -> Tensor:
    return {"k1": -log_ratio, "k2": log_ratio**2 / 2, "k3": log_ratio.exp() - 1 - log_ratio}[kind]


class _Row:
    """The tokens of one row that take part."""

    def __init__(self, new: Tensor, data: dict[str, Tensor], o: Any) -> None:
        self.new, self.o, self.data = new, o, data
        self.old = new.detach() if o.force_on_policy_ratio else data["prev_logprobs"]
        self.sampler, self.a = data["generation_logprobs"], data["advantages"]
        d = new - self.old
        self.ratio = d.mean().exp().expand_as(d) if o.sequence_level_importance_ratios and len(d) else d.exp()
        self.bounded = self.ratio.clamp(1 - o.ratio_clip_min, 1 + o.ratio_clip_max)
        if o.force_on_policy_ratio:
            self.ratio = self.bounded = (new - new.detach()).exp()
        elif o.disable_ppo_ratio:
            self.ratio = self.bounded = new
        self.weights, self.outside = self._weights()

    def _weights(self) -> tuple[Tensor, Tensor]:
        o, d = self.o, self.old - self.sampler
        w = d.sum().exp().expand_as(d) if o.sequence_level_importance_ratios else d.exp()
        high, low = o.truncated_importance_sampling_ratio, o.truncated_importance_sampling_ratio_min or 0.0
        kind = o.truncated_importance_sampling_type
        if kind is None:
            return w, torch.zeros_like(w, dtype=torch.bool)
        outside = (w > high) | (w < low)
        if kind == "tis":
            return w.clamp(low, high), outside
        if kind == "icepop":
            return w * ~outside, outside
        mean = d.mean().exp() if len(d) else d.new_ones(())
        outside = ((mean > high) | (mean < low)).expand_as(d)
        return w * ~outside, outside

    def clipped(self) -> Tensor:
        o, a = self.o, self.a
        if o.use_cispo:
            loss = -a * self.bounded.detach() * self.new
        else:
            loss = torch.maximum(-a * self.ratio, -a * self.bounded)
        if o.ratio_clip_c is not None:
            loss = torch.where(a < 0, torch.minimum(loss, -a * o.ratio_clip_c), loss)
        return loss * self.weights if o.use_importance_sampling_correction else loss

    def kl(self) -> Tensor:
        """Where a clamp is at work it stops the gradient of what it clamps, and of the sampling at the input."""
        o, d = self.o, self.data["reference_policy_logprobs"] - self.new
        base = self.sampler if o.use_on_policy_kl_approximation else self.new.detach()
        w, bound = (self.new - base).exp(), o.kl_input_clamp_value
        if bound is not None:
            far = d.abs() > bound
            w, d = torch.where(far, w.detach(), w), torch.where(far, bound * d.detach().sign(), d)
        found, most = w * _estimate(d, o.reference_policy_kl_type), o.kl_output_clamp_value
        return found if most is None else torch.where(found.abs() > most, most * found.detach().sign(), found)


def _tell(told: dict[str, float], row: _Row, tokens: float, rows: float) -> None:
    o, new, d = row.o, row.new.detach(), row.sampler - row.old
    mixture = ((row.old.exp() + row.sampler.exp()) / 2).log()
    means = {
        "probs_ratio": row.ratio,
        "probs_ratio_clamped": row.bounded,
        "token_mult_prob_error": d.abs().exp(),
        "gen_kl_error": _estimate(-d, o.reference_policy_kl_type),
        "policy_kl_error": _estimate(d, o.reference_policy_kl_type),
        "js_divergence_error": (_estimate(row.old - mixture, "k3") + _estimate(row.sampler - mixture, "k3")) / 2,
        "approx_entropy": -(new - row.sampler).exp() * new,
        "sampling_importance_ratio": row.weights,
        "is_oob_ratio": row.outside.double(),
    }
    for name, x in means.items():
        told[name] += float(x.detach().sum()) / tokens
    if o.sequence_level_importance_ratios:
        of_row = float(row.weights[0]) if len(new) else 1.0
        told["sampling_importance_ratio"] += of_row / rows - float(row.weights.sum()) / tokens
    if not len(new):
        return
    if o.truncated_importance_sampling_type == "seq-mask-tis":
        told["is_oob_ratio"] += float(row.outside[0]) / rows - float(row.outside.sum()) / tokens
    extremes = (x for ratio in (row.ratio.detach(), row.bounded.detach()) for x in (ratio.min(), ratio.max()))
    for name, x in zip(EXTREMES, extremes, strict=True):
        told[name] = (min if name.endswith("min") else max)(told[name], float(x))
