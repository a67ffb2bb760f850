"""The policy losses in plain torch: per-token terms, then one aggregation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern._dtypes import accumulator
from trajkern._results import Branch
from trajkern.losses.config import PolicyLoss
from trajkern.losses.covariance import largest_covariances
from trajkern.losses.kinds import METRICS

LOG_RATIO_BOUND = 20.0  # exp of it is finite in float32, so 0 * inf cannot arise


class _Segments:
    """Sums over trajectories, and back to their tokens."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        lengths = cu_seqlens.diff()
        self.count = lengths.numel()
        self.of_token = torch.repeat_interleave(torch.arange(self.count, device=lengths.device), lengths)

    def sum(self, x: Tensor) -> Tensor:  # [T] -> [N]
        return torch.zeros(self.count, dtype=x.dtype, device=x.device).index_add(0, self.of_token, x)

    def mean(self, x: Tensor, counts: Tensor) -> Tensor:  # [T], [N] -> [N]
        return self.sum(x) / counts.clamp_min(1)


def _clamp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """``torch.where`` of two numbers, in the precision of ``like``."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def policy_loss(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor,  # [T]
    advantages: Tensor | None,  # [N] or [T]
    cu_seqlens: Tensor,  # [N+1]
    *,
    config: PolicyLoss,
    mask: Tensor | None = None,  # [T]
    ref_logprobs: Tensor | None = None,  # [T]
    sampler_logprobs: Tensor | None = None,  # [T]
    entropy: Tensor | None = None,  # [T]
    branch: Any = None,
    normalizer: float | Tensor | None = None,
    per_token: bool | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See :func:`trajkern.policy_loss`."""
    if branch is not None and not isinstance(branch, Branch):
        return _flat_policy_loss(
            branch,
            config,
            cu_seqlens,
            normalizer,
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            mask=mask,
            ref_logprobs=ref_logprobs,
            sampler_logprobs=sampler_logprobs,
            entropy=entropy,
        )
    dtype = accumulator(logprobs)
    segments = _Segments(cu_seqlens.long())
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    a, times, leaves = _per_token(advantages, branch, logprobs, segments, per_token, dtype)
    total = torch.stack(times).sum(0)
    mask = mask & (total > 0)
    a = [torch.where(mask, x, 0) for x in a]
    scored = mask

    def difference(x: Tensor, y: Tensor) -> Tensor:  # only the policy's own log-probs have a gradient
        return torch.where(scored, x.to(dtype) - y.detach().to(dtype), 0)

    factor, mask = _sampler_factor(config, difference, old_logprobs, sampler_logprobs, segments, mask)
    counts = segments.sum(mask.to(dtype))
    new = torch.where(mask, logprobs.to(dtype), 0)
    log_ratio = torch.where(mask, _clamp(difference(logprobs, old_logprobs)), 0)
    token_log_ratio = log_ratio
    if config.resolved_ratio_level == "sequence":
        log_ratio = segments.mean(log_ratio, counts)[segments.of_token]
    ratio = log_ratio.exp()
    old = torch.where(mask, old_logprobs.detach().to(dtype), 0)
    given = new, old, token_log_ratio, log_ratio, ratio, segments, counts, mask
    terms = [_policy_term(config, x, *given) for x in a]
    loss = sum(term for term, _ in terms) * (1 if factor is None else factor)
    kl = torch.zeros_like(loss)
    if config.kl_coef:
        kl = _kl(config.kl, difference(logprobs, ref_logprobs), ratio)  # type: ignore[arg-type]
        loss = loss + config.kl_coef * leaves * kl
    entropy = torch.zeros_like(loss) if entropy is None else torch.where(mask, entropy.to(dtype), 0)
    loss = loss - config.entropy_coef * leaves * entropy
    clipped = sum(clipped * n for (_, clipped), n in zip(terms, times, strict=True)) / total.clamp_min(1)
    means = {"clip_fraction": clipped, "approx_kl": -token_log_ratio, "ratio_mean": ratio, "entropy": entropy, "kl": kl}
    metrics = _metrics(means, torch.where(mask, total, 0))
    weights = _token_weights(config, segments.sum(torch.where(mask, leaves, 0)), normalizer)[segments.of_token]
    return torch.where(mask, loss * weights, 0).sum(), {name: metrics[name].detach() for name in METRICS}


def _metrics(means: dict[str, Tensor], copies: Tensor) -> dict[str, Tensor]:
    """Over the tokens, each as often as it has unmasked rollouts."""
    count, some, ratio = copies.sum(), copies > 0, means["ratio_mean"]
    metrics = {name: torch.where(some, x * copies, 0).sum() / count.clamp_min(1) for name, x in means.items()}
    largest = torch.where(some, ratio, 0).amax() if ratio.numel() else count
    return metrics | {"ratio_max": largest, "num_tokens": count}


def _flat_policy_loss(
    paths: Any, config: PolicyLoss, cu_seqlens: Tensor, normalizer: Any, **per_token: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the flat rollouts: every prefix repeated, a trajectory for each leaf."""
    tree = type(paths.tree)(paths.tree.parent, cu_seqlens.diff())
    flat: dict[str, Any] = {k: None if x is None else x[tree.flat_index] for k, x in per_token.items()}
    if paths.gate is not None:
        counted = torch.repeat_interleave(paths.gate, tree.flat_lengths)
        flat["mask"] = counted if flat["mask"] is None else flat["mask"] & counted
    return policy_loss(
        advantages=paths.advantages,
        cu_seqlens=tree.flat_cu_seqlens,
        config=config,
        normalizer=normalizer,
        per_token=False,
        **flat,
    )


def _per_token(
    advantages: Any,
    branch: Branch | None,
    logprobs: Tensor,
    segments: _Segments,
    per_token: bool | None,
    dtype: torch.dtype,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The advantages under which a token's loss is taken, for how many rollouts each, and the weight of its KL."""
    size = (advantages if branch is None else branch.positive).numel()
    is_per_token = size != segments.count if per_token is None else per_token

    def of_token(x: Tensor) -> Tensor:
        x = x.detach().to(dtype)
        return x if is_per_token else x[segments.of_token]

    if branch is None:
        one = torch.ones_like(logprobs, dtype=dtype)
        return [of_token(advantages)], [one], one
    positive, negative, leaves, *times = map(of_token, branch)
    return [positive, negative, torch.zeros_like(positive)], times, leaves


def _sampler_factor(config, difference, old_logprobs, sampler_logprobs, segments, mask):
    """The factor of the policy term, and the mask without the trajectories that the correction removes.

    A NaN fails every comparison here and below, so that it reaches the loss instead of being taken for a drop.
    """
    if config.sampler_correction == "none":
        return None, mask
    log_w = _clamp(difference(old_logprobs, sampler_logprobs)).detach()
    low, high = config.sampler_low, config.sampler_high
    if config.sampler_correction == "sequence_mask":
        w = segments.mean(log_w, segments.sum(mask.to(log_w.dtype))).exp()[segments.of_token]
        return torch.where(w.isnan(), w, 1), mask & ~((w < low) | (w > high))
    w = log_w.exp()
    if config.sampler_correction == "tis":
        return w.clamp_max(high), mask
    return torch.where((w < low) | (w > high), 0, w), mask


def _token_weights(config: PolicyLoss, counts: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """What a token of each trajectory weighs in the scalar loss, ``[N]``."""
    aggregate = config.resolved_aggregate
    if aggregate == "token_sum":
        return torch.ones_like(counts)
    if normalizer is None:
        normalizer = counts.sum() if aggregate == "token_mean" else (counts > 0).sum()
        normalizer = torch.where(normalizer == 0, 1, normalizer)
    weights = torch.ones_like(counts) / normalizer
    if aggregate == "seq_mean_token_mean":
        weights = weights / counts.clamp_min(1)
    if config.max_length is not None and aggregate == "seq_mean_token_sum_norm":
        weights = weights / config.max_length
    return weights


def _kl(estimator: str, d: Tensor, ratio: Tensor) -> Tensor:
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    k3 = torch.expm1(_clamp(-d)) + _clamp(d)
    return ratio * k3 if estimator == "k3_corrected" else k3


def _policy_term(c: PolicyLoss, a, new, old, token_log_ratio, log_ratio, ratio, segments, counts, mask):
    """The policy loss of each token, and whether its ratio was clipped (or its token dropped)."""
    never = torch.zeros_like(mask)
    if c.kind in ("gpg", "reinforce"):
        return -a * new, never
    if c.kind == "cispo":
        bounded = ratio.detach().clamp(1 - c.clip_low, 1 + c.clip_high)
        return -bounded * a * new, bounded != ratio
    if c.kind == "sapo":
        tau = _choose(a > 0, c.sapo_tau_pos, c.sapo_tau_neg, a)
        return -a * (4 / tau) * torch.sigmoid(tau * (ratio - 1)), never
    if c.kind in ("dppo_tv", "dppo_kl"):
        valid = _dppo_valid(c, a, new.detach(), old)
        return -a * ratio.detach().clamp_max(20) * new * valid, ~valid
    if c.kind == "vespo":
        weight = _vespo_weight(c, a, segments.sum(token_log_ratio.detach())[segments.of_token])
        return -weight * a * new, never
    if c.kind == "gmpo":
        sign, inside = a.sign(), log_ratio.clamp(-c.clip_low, c.clip_high)
        bounded = torch.minimum(sign * log_ratio, sign * inside) * sign
        mean_ratio = segments.mean(torch.where(mask, bounded, 0), counts).exp()
        mean_advantage = segments.mean(torch.where(mask, a, 0), counts)
        return -(mean_advantage * mean_ratio)[segments.of_token], sign * log_ratio > sign * inside
    if c.kind == "kl_cov":
        chosen = largest_covariances(a, new.detach(), mask, mask, c.cov_fraction)
        return -ratio * a + torch.where(chosen, c.cov_coef * log_ratio.abs(), 0), chosen
    bounded = ratio.clamp(1 - c.clip_low, 1 + c.clip_high)
    loss, clipped = torch.maximum(-ratio * a, -bounded * a), ratio * a > bounded * a
    if c.kind == "clip_cov":
        band = (c.cov_low, c.cov_high)
        dropped = largest_covariances(a, new.detach(), mask, mask & ~clipped, c.cov_fraction, band)
        loss, clipped = torch.where(dropped, 0, loss), clipped | dropped
    if c.clip_dual is not None:
        bound = -c.clip_dual * a
        over = (a < 0) & (loss > bound)
        loss, clipped = torch.where(over, bound, loss), clipped | over
    return loss, clipped


def _dppo_valid(c: PolicyLoss, a: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Whether the token's probability p has not yet moved past the threshold in the direction A pushes it."""
    p, q = new.exp(), old.exp()
    if c.kind == "dppo_tv":
        return ~torch.where(a > 0, p - q > c.clip_high, p - q < -c.clip_low)
    binary_kl = q * (old - new) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return ~torch.where(a > 0, (binary_kl > c.clip_high) & (p > q), (binary_kl > c.clip_low) & (p < q))


def _vespo_weight(c: PolicyLoss, a: Tensor, log_w: Tensor) -> Tensor:
    log_w = _clamp(log_w)
    k = _choose(a >= 0, c.vespo_k_pos, c.vespo_k_neg, a)
    decay = _choose(a >= 0, c.vespo_lambda_pos, c.vespo_lambda_neg, a)
    return (decay + k * log_w - decay * log_w.exp()).exp()
