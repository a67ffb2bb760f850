"""The policy losses in plain torch: per-token terms, then one aggregation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trajkern._dtypes import accumulator
from trajkern._results import Branch
from trajkern.losses.clamped import clamped
from trajkern.losses.config import PolicyLoss
from trajkern.losses.covariance import largest_covariances
from trajkern.losses.kinds import KINDS, LOG_RATIO_BOUND
from trajkern.reference._metrics import metrics_of, sampler_values


class _Added(torch.autograd.Function):
    """The sum over the ranks, what each of them makes of it having a gradient in the parts of all."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: dist.ProcessGroup) -> Tensor:
        ctx.ranks, total = ranks, part.clone()
        dist.all_reduce(total, group=ranks)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Added.apply(grad, ctx.ranks), None


class _Segments:
    """Sums over trajectories, of the tokens of all ranks where they are spread, and back to this rank's tokens."""

    def __init__(self, cu_seqlens: Tensor, ranks: Any = None) -> None:
        lengths, self.ranks = cu_seqlens.diff(), ranks
        self.count = lengths.numel()
        self.of_token = torch.repeat_interleave(torch.arange(self.count, device=lengths.device), lengths)

    def sum(self, x: Tensor) -> Tensor:  # [T] -> [N]
        mine = torch.zeros(self.count, dtype=x.dtype, device=x.device).index_add(0, self.of_token, x)
        return self.added(mine)

    def added(self, x: Tensor) -> Tensor:
        return x if self.ranks is None else _Added.apply(x, self.ranks)

    def largest(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        if self.ranks is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX, self.ranks)
        return x

    def mean(self, x: Tensor, counts: Tensor) -> Tensor:  # [T], [N] -> [N]
        return self.sum(x) / counts.clamp_min(1)


class _Tokens(NamedTuple):
    """What a token's policy term reads, a masked one's as zeros."""

    logprobs: Tensor  # [T]
    old_logprobs: Tensor  # [T]
    token_log_ratio: Tensor  # [T]
    log_ratio: Tensor  # [T], the trajectory's at ratio level "sequence"
    ratio: Tensor  # [T]
    mask: Tensor  # [T]
    segments: _Segments
    counts: Tensor  # [N]


class _Term(NamedTuple):
    """Of each token; sums over rollouts where there is a branch, the flags then the share of them."""

    loss: Tensor
    clipped: Tensor  # whether its ratio is clipped, or it is dropped
    beyond: Tensor  # whether that is a bound of the ratio's


def _clamp(log_ratio: Tensor) -> Tensor:
    return clamped(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """``torch.where`` of two numbers, in the precision of ``like``."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def policy_loss(
    logprobs: Tensor,  # [T]
    *args: Any,
    config: PolicyLoss,
    ref_logprobs: Tensor | None = None,  # [T]
    supervised_weights: Tensor | None = None,  # [T]
    supervised_normalizer: float | Tensor | None = None,
    kl_weights: Tensor | None = None,  # [T]
    kl_normalizer: float | Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """See :func:`trajkern.policy_loss`."""
    of_mask = config if kl_weights is None else replace(config, kl_coef=0.0)
    loss, metrics = _token_loss(logprobs, *args, config=of_mask, ref_logprobs=ref_logprobs, **others)
    dtype = accumulator(logprobs)

    def mean(weights: Tensor, normalizer: Any, value: Callable[[Tensor], Tensor]) -> Tensor:
        taken = weights != 0
        number = taken.sum().clamp_min(1) if normalizer is None else normalizer
        return (weights[taken].to(dtype) * value(taken)).sum() / (number if taken.any() else 1)

    if kl_weights is not None and config.kl_coef:
        assert ref_logprobs is not None
        apart = logprobs.to(dtype) - ref_logprobs.detach().to(dtype)
        kl = mean(kl_weights, kl_normalizer, lambda taken: _kl(config.kl, apart[taken], apart[taken]))
        loss, metrics = loss + config.kl_coef * kl, metrics | {"kl": kl.detach()}
    if supervised_weights is not None:
        nll = mean(supervised_weights, supervised_normalizer, lambda taken: -logprobs[taken].to(dtype))
        loss, metrics = loss + nll, metrics | {"supervised_loss": nll.detach()}
    return loss, metrics


def _token_loss(
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
    **layout: Any,  # per_token, sequence_group
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the tokens of the mask; see :func:`trajkern.policy_loss`."""
    per_token, sequence_group = layout.get("per_token"), layout.get("sequence_group")
    if branch is not None and not isinstance(branch, Branch):
        of_tokens = logprobs, old_logprobs, mask, ref_logprobs, sampler_logprobs, entropy
        return _flat_policy_loss(branch, config, cu_seqlens, normalizer, of_tokens)
    dtype = accumulator(logprobs)
    segments = _Segments(cu_seqlens.long(), sequence_group)
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
    tokens = _Tokens(new, old, token_log_ratio, log_ratio, ratio, mask, segments, counts)
    terms = _policy_terms(config, a, times, tokens)
    loss = terms.loss * (1 if factor is None else factor)
    kl = None
    if config.kl_coef:
        kl = _kl(config.kl, difference(logprobs, ref_logprobs), ratio)  # type: ignore[arg-type]
        loss = loss + config.kl_coef * leaves * kl
    if entropy is not None:
        entropy = torch.where(mask, entropy.to(dtype), 0)
        loss = loss - config.entropy_coef * leaves * entropy
    log_w = None if sampler_logprobs is None else _clamp(difference(old_logprobs, sampler_logprobs))
    values = _clip_values(terms, tokens) | {"entropy": entropy, "kl": kl} | sampler_values(log_w)
    metrics = metrics_of(values, torch.where(mask, total, 0), segments)
    weights = _token_weights(config, segments.sum(torch.where(mask, leaves, 0)), normalizer)[segments.of_token]
    share = torch.where(mask, loss * weights, 0).sum()
    if sequence_group is not None:
        share = segments.added(share.detach()) + (share - share.detach())  # its gradient is this rank's part's
    return share, metrics


def _policy_terms(config: PolicyLoss, advantages: list[Tensor], times: list[Tensor], tokens: _Tokens) -> _Term:
    """The terms under each of a token's advantages: their sum, and the shares of its rollouts."""
    form = _TERMS[KINDS[config.kind].form]
    terms = [form(config, a, tokens) for a in advantages]
    rollouts = torch.stack(times).sum(0).clamp_min(1)

    def share(flags: list[Tensor]) -> Tensor:
        return torch.stack([flag * count for flag, count in zip(flags, times, strict=True)]).sum(0) / rollouts

    loss = torch.stack([x.loss for x in terms]).sum(0)
    return _Term(loss, share([x.clipped for x in terms]), share([x.beyond for x in terms]))


def _clip_values(terms: _Term, x: _Tokens) -> dict[str, Tensor | None]:
    """What the metrics of the ratio are made of, ``[T]``."""
    return {
        "clip_fraction": terms.clipped,
        "clip_low": torch.where(x.log_ratio < 0, terms.beyond, 0),
        "clip_high": torch.where(x.log_ratio > 0, terms.beyond, 0),
        "approx_kl": -x.token_log_ratio,
        "ratio_mean": x.ratio,
        "ratio_max": x.ratio,
        "num_tokens": torch.ones_like(x.ratio),
    }


def _flat_policy_loss(
    paths: Any, config: PolicyLoss, cu_seqlens: Tensor, normalizer: Any, of_tokens: tuple[Tensor | None, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the flat rollouts: every prefix repeated, a trajectory for each leaf."""
    tree = type(paths.tree)(paths.tree.parent, cu_seqlens.diff())
    logprobs, old, mask, ref, sampler, entropy = (None if x is None else x[tree.flat_index] for x in of_tokens)
    assert logprobs is not None and old is not None
    if paths.gate is not None:
        counted = torch.repeat_interleave(paths.gate, tree.flat_lengths)
        mask = counted if mask is None else mask & counted
    return _token_loss(
        logprobs,
        old,
        paths.advantages,
        tree.flat_cu_seqlens,
        config=config,
        mask=mask,
        ref_logprobs=ref,
        sampler_logprobs=sampler,
        entropy=entropy,
        normalizer=normalizer,
        per_token=False,
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
    if config.sampler_correction == "icepop":
        return torch.where((w < low) | (w > high), 0, w), mask
    raise AssertionError(f"unknown sampler_correction {config.sampler_correction!r}")


def _token_weights(config: PolicyLoss, counts: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """What a token of each trajectory weighs in the scalar loss, ``[N]``."""
    aggregate = config.resolved_aggregate
    if aggregate == "token_sum":
        return torch.ones_like(counts)
    if normalizer is None:
        normalizer = counts.sum() if aggregate == "token_mean" else (counts > 0).sum()
        normalizer = torch.where(normalizer == 0, 1, normalizer)
    normalizer = normalizer.to(counts.dtype) if isinstance(normalizer, Tensor) else counts.new_full((), normalizer)
    weights = torch.where(counts > 0, 1 / torch.where(normalizer > 0, normalizer, torch.nan), 0)
    if aggregate in ("token_mean", "seq_mean_token_sum"):
        return weights
    if aggregate == "seq_mean_token_mean":
        return weights / counts.clamp_min(1)
    if aggregate == "seq_mean_token_sum_norm":
        return weights / config.max_length  # type: ignore[operator]
    raise AssertionError(f"unknown aggregate {aggregate!r}")


def _kl(estimator: str, d: Tensor, ratio: Tensor) -> Tensor:
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    k3 = torch.expm1(_clamp(-d)) + _clamp(d)
    if estimator == "k3":
        return k3
    if estimator == "k3_corrected":
        return ratio * k3
    raise AssertionError(f"unknown kl {estimator!r}")


def _clip(c: PolicyLoss, a: Tensor, x: _Tokens) -> _Term:
    bounded = clamped(x.ratio, 1 - c.clip_low, 1 + c.clip_high)
    loss, beyond = torch.maximum(-x.ratio * a, -bounded * a), x.ratio * a > bounded * a
    clipped = beyond
    if c.ranks_tokens:
        dropped = _largest_covariances(c, a, x, x.mask & ~clipped, (c.cov_low, c.cov_high))
        loss, clipped = torch.where(dropped, 0, loss), clipped | dropped
    if c.clip_dual is not None:
        bound = -c.clip_dual * a
        over = (a < 0) & (loss > bound)
        loss, clipped = torch.where(over, bound, loss), clipped | over
    return _Term(loss, clipped, beyond)


def _cispo(c: PolicyLoss, a: Tensor, x: _Tokens) -> _Term:
    bounded = x.ratio.detach().clamp(1 - c.clip_low, 1 + c.clip_high)
    return _Term(-bounded * a * x.logprobs, bounded != x.ratio, bounded != x.ratio)


def _sapo(c: PolicyLoss, a: Tensor, x: _Tokens) -> _Term:
    tau = _choose(a > 0, c.sapo_tau_pos, c.sapo_tau_neg, a)
    return _unclipped(-a * (4 / tau) * torch.sigmoid(tau * (x.ratio - 1)), x)


def _reinforce(c: PolicyLoss, a: Tensor, x: _Tokens) -> _Term:
    return _unclipped(-a * x.logprobs, x)


def _dppo_tv(c: PolicyLoss, a: Tensor, x: _Tokens) -> _Term:
    moved = x.logprobs.detach().exp() - x.old_logprobs.exp()
    return _unless(torch.where(a > 0, moved > c.clip_high, moved < -c.clip_low), a, x)


def _dppo_kl(c: PolicyLoss, a: Tensor, x: _Tokens) -> _Term:
    new, old = x.logprobs.detach(), x.old_logprobs
    p, q = new.exp(), old.exp()
    binary_kl = q * (old - new) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return _unless(torch.where(a > 0, (binary_kl > c.clip_high) & (p > q), (binary_kl > c.clip_low) & (p < q)), a, x)


def _unless(past: Tensor, a: Tensor, x: _Tokens) -> _Term:
    """No loss where the token's probability has moved past the threshold in the direction A pushes it."""
    return _Term(-a * x.ratio.detach().clamp_max(20) * x.logprobs * ~past, past, past)


def _kl_cov(c: PolicyLoss, a: Tensor, x: _Tokens) -> _Term:
    chosen = _largest_covariances(c, a, x, x.mask)
    return _Term(-x.ratio * a + torch.where(chosen, c.cov_coef * x.log_ratio.abs(), 0), chosen, chosen & False)


def _gmpo(c: PolicyLoss, a: Tensor, x: _Tokens) -> _Term:
    sign, inside = a.sign(), clamped(x.log_ratio, -c.clip_low, c.clip_high)
    bounded = torch.minimum(sign * x.log_ratio, sign * inside) * sign
    mean_ratio = x.segments.mean(torch.where(x.mask, bounded, 0), x.counts).exp()
    mean_advantage = x.segments.mean(torch.where(x.mask, a, 0), x.counts)
    beyond = sign * x.log_ratio > sign * inside
    return _Term(-(mean_advantage * mean_ratio)[x.segments.of_token], beyond, beyond)


def _vespo(c: PolicyLoss, a: Tensor, x: _Tokens) -> _Term:
    log_w = _clamp(x.segments.sum(x.token_log_ratio.detach())[x.segments.of_token])
    k = _choose(a >= 0, c.vespo_k_pos, c.vespo_k_neg, a)
    decay = _choose(a >= 0, c.vespo_lambda_pos, c.vespo_lambda_neg, a)
    weight = (decay + k * log_w - decay * log_w.exp()).exp()
    return _unclipped(-weight * a * x.logprobs, x)


_TERMS: dict[str, Callable[[PolicyLoss, Tensor, _Tokens], _Term]] = {
    "clip": _clip,
    "cispo": _cispo,
    "sapo": _sapo,
    "reinforce": _reinforce,
    "dppo_tv": _dppo_tv,
    "dppo_kl": _dppo_kl,
    "kl_cov": _kl_cov,
    "gmpo": _gmpo,
    "vespo": _vespo,
}


def _unclipped(loss: Tensor, x: _Tokens) -> _Term:
    return _Term(loss, torch.zeros_like(x.mask), torch.zeros_like(x.mask))


def _largest_covariances(
    c: PolicyLoss, a: Tensor, x: _Tokens, candidates: Tensor, band: tuple[float, float] | None = None
) -> Tensor:
    return largest_covariances(a, x.logprobs.detach(), x.mask, candidates, c.cov_fraction, band)
