"""The policy loss of trajectories whose tokens lie on several ranks: what a trajectory adds up to travels, no token.

From its sums over all ranks each rank knows what a trajectory weighs and what its ratio is. A term of a token is then
its rank's alone. A term of a trajectory is formed whole on every rank, from ``[N]`` numbers, and its gradient goes to
the rank's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trajkern import _backends
from trajkern._checks import describe
from trajkern._results import Branch
from trajkern.losses.arguments import LossArguments
from trajkern.losses.clamped import clamped
from trajkern.losses.kinds import KINDS, LOG_RATIO_BOUND, METRICS
from trajkern.ops import span
from trajkern.ops._agreement import agreed
from trajkern.ops._autograd import applied, differentiable_once
from trajkern.ops.tree_loss import leaf_weights, sampler_factor, scored, stacked, summed

Result = tuple[Tensor, dict[str, Tensor]]
Formed = Callable[[Tensor, Tensor | None, Tensor | None, LossArguments], Result]  # policy_loss of laid out arguments


class _Whole(torch.autograd.Function):
    """``whole``, the sum of the ranks' parts, with this rank's part's gradient."""

    @staticmethod
    def forward(ctx: Any, part, whole):
        return whole.to(part.dtype)

    @staticmethod
    @differentiable_once("policy_loss", linear=True)
    def backward(ctx: Any, grad):
        return grad, None


def check_parts(arguments: LossArguments) -> LossArguments:
    """Raises where trajectories cannot be split; else the arguments with ``per_token`` a bool."""
    config = arguments.config
    if arguments.branch is not None:
        raise ValueError(f"branch must be None with sequence_group; got {describe(arguments.branch)}")
    if not config.exact_in_parts:
        raise ValueError(
            f"sequence_group must be None for kind {config.kind!r} with ratio level {config.resolved_ratio_level!r}"
            f" and kl {config.kl!r}, which sums over a rank's tokens do not give"
        )
    # a rank's share may have as many tokens as there are trajectories, so that its length tells nothing
    return arguments._replace(per_token=bool(arguments.per_token))


def check_agreement(arguments: LossArguments) -> None:
    """Raises on every rank where what all must share differs: the trajectories' number and advantages, the options.

    One exchange of a few numbers, which are read; of checked arguments.
    """
    shared = {
        "the number of trajectories in cu_seqlens": arguments.cu_seqlens.shape[0] - 1,  # some of 0 tokens
        "per_token": arguments.per_token,
        "config": arguments.config,
        "normalizer": arguments.normalizer,
        "use_backend": "reference" if _backends.wants_reference("policy_loss", arguments.cu_seqlens) else "",
        "advantages": None if arguments.per_token else arguments.advantages,
    }
    group, device = arguments.sequence_group, arguments.cu_seqlens.device
    agreed("policy_loss", group, "sequence_group", shared, device=device)


def _of_ranks(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's values, ``[ranks, ...]``."""
    of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_ranks, mine, group=group)
    return torch.stack(of_ranks)


def split_loss(logprobs: Tensor, entropy: Tensor | None, arguments: LossArguments, formed: Formed) -> Result:
    """The whole loss on every rank, with this rank's gradient, and the metrics of all ranks' tokens."""
    if arguments.config.is_token_level:
        parts = weighted_parts(arguments, logprobs)
        return over_ranks(formed(logprobs, entropy, None, parts), parts, logprobs)
    form = KINDS[arguments.config.kind].form
    if form == "vespo":
        return _sequence_weighted(logprobs, entropy, arguments, formed)
    if form == "gmpo":
        return _geometric(logprobs, entropy, arguments, formed)
    return _of_ratio(logprobs, entropy, arguments, formed)


def weighted_parts(arguments: LossArguments, like: Tensor) -> LossArguments:
    """The arguments with which the ranks' losses, for ratios per token, add up to the whole one.

    Args:
        like: of the pairs' dtype and length.
    """
    counts, one_or_nan = _remaining(_totals({}, arguments, like), arguments)
    parts = _with_weights(arguments, leaf_weights(arguments, counts))
    return parts if one_or_nan is None else parts._replace(advantages=_given(parts.advantages) * one_or_nan)


def over_ranks(share: Result, parts: LossArguments, logprobs: Tensor) -> Result:
    """The shares added up, with this rank's gradient, and the metrics over the tokens of all ranks.

    Args:
        share: of the arguments ``parts``, whose advantages are a branch's rows.
        logprobs: the old ones where ``parts`` has none.
    """
    loss, metrics = share
    mine = torch.stack([loss.detach(), *(metrics[name] for name in METRICS)]).double()
    mine = torch.cat((mine, _sampler_moments(parts, logprobs.detach())))
    losses, *gathered, ratios, squares = _of_ranks(mine, parts.sequence_group).unbind(1)
    moments = gathered[list(METRICS).index("num_tokens")], ratios, squares
    loss = applied(_Whole, loss, losses.sum())
    found = {name: _reduced(name, x, *moments) for name, x in zip(METRICS, gathered, strict=True)}
    return loss, {name: x.to(loss.dtype) for name, x in found.items()}


def _sampler_moments(parts: LossArguments, logprobs: Tensor) -> Tensor:
    """The sums of w, the ratio of the old policy to the sampler, and of w^2, over this rank's tokens that take part."""
    if parts.sampler_logprobs is None:
        return logprobs.new_full((2,), torch.nan, dtype=torch.float64)
    branch = Branch(*_given(parts.advantages).unbind())
    rollouts = branch.positive_count + branch.negative_count + branch.zero_count
    if not parts.per_token:
        rollouts = _of_tokens(rollouts, parts, logprobs)
    takes_part = (rollouts > 0) if parts.mask is None else (rollouts > 0) & parts.mask
    old = logprobs if parts.old_logprobs is None else parts.old_logprobs
    w = _bounded(old, parts.sampler_logprobs, takes_part).exp().double().where(takes_part, 0)
    ends = parts.cu_seqlens[:: max(parts.cu_seqlens.shape[0] - 1, 1)]  # all of this rank's tokens as one span
    return torch.stack([_summed(x, ends).sum() for x in (w, w * w)])


def _reduced(name: str, of_ranks: Tensor, tokens: Tensor, ratios: Tensor, squares: Tensor) -> Tensor:
    """A metric over all tokens from the ranks', ``[ranks]`` each, and from their sampler's moments."""
    reduction = METRICS[name].reduction
    if reduction == "mean":
        return (of_ranks * tokens).sum() / tokens.sum().clamp_min(1)
    if reduction == "largest":
        return of_ranks.max()
    if reduction == "sum":
        return of_ranks.sum()
    if reduction == "effective_share":
        return ratios.sum().square() / torch.where(tokens.sum() > 0, tokens.sum() * squares.sum(), 1)
    raise AssertionError(f"no reduction over ranks: {reduction!r}")


def _of_ratio(logprobs: Tensor, entropy: Tensor | None, arguments: LossArguments, formed: Formed) -> Result:
    """The policy term a trajectory, from its mean log-ratio; KL and entropy a token."""
    columns = {"log_ratio": _log_ratio(logprobs, arguments)} | _factor(arguments)
    if arguments.per_token:
        a = scored(_given(arguments.advantages), arguments.mask)
        factor = columns.get("factor", torch.ones_like(a))
        columns |= {"positive": factor * a.relu(), "negative": -factor * (-a).relu()}
        columns |= {"positive_count": (a > 0).to(a.dtype), "negative_count": (a < 0).to(a.dtype)}
    sums = _totals(columns, arguments, logprobs)
    counts, one_or_nan = _remaining(sums, arguments)
    weights = leaf_weights(arguments, counts)
    log_ratio = sums["log_ratio"] / sums["count"].clamp_min(1)

    def policy_term(terms: Branch) -> Result:
        config = replace(summed(arguments.config), ratio_level="token", sampler_correction="none")
        of_trajectories = arguments._replace(
            config=replace(config, kl_coef=0.0, entropy_coef=0.0),
            old_logprobs=torch.zeros_like(log_ratio),
            advantages=stacked(terms, log_ratio.dtype),
            cu_seqlens=torch.arange(log_ratio.shape[0] + 1, device=log_ratio.device),
            mask=None,
            ref_logprobs=None,
            sampler_logprobs=None,
            normalizer=None,
            per_token=True,
        )
        return formed(log_ratio, None, None, of_trajectories)

    terms = _terms(sums, counts, weights, arguments)
    policy, of_ratio = policy_term(terms)
    if "factor" in sums:  # a correction of 0 takes a trajectory's loss, not its place in the metrics
        signs = {"positive": terms.positive_count, "negative": -terms.negative_count}
        of_ratio = policy_term(terms._replace(**signs))[1]
    loss, metrics = _tokens_alone(logprobs, entropy, arguments, weights, formed)
    metrics |= {name: of_ratio[name] for name, metric in METRICS.items() if metric.of_ratio}
    return _marked(policy + loss, one_or_nan), metrics


def _terms(sums: dict[str, Tensor], counts: Tensor, weights: Tensor, arguments: LossArguments) -> Branch:
    """What the tokens of each trajectory, of all ranks, add up to, ``[N]`` each."""
    if arguments.per_token:
        positive, negative = sums["positive"], sums["negative"]
        above, below = (torch.where(counts > 0, sums[f"{sign}_count"], 0) for sign in ("positive", "negative"))
    else:
        a, factor = _given(arguments.advantages).where(counts > 0, 0), sums.get("factor", counts)
        positive, negative = factor * a.relu(), -factor * (-a).relu()
        above, below = counts * (a > 0), counts * (a < 0)
    return Branch(weights * positive, weights * negative, weights * counts, above, below, counts - above - below)


def _geometric(logprobs: Tensor, entropy: Tensor | None, arguments: LossArguments, formed: Formed) -> Result:
    """gmpo: the policy term a trajectory, from its mean bounded log-ratio; KL and entropy a token."""
    config, dtype, mask = arguments.config, logprobs.dtype, arguments.mask
    a = _given(arguments.advantages)
    a = a if arguments.per_token else _of_tokens(a, arguments, logprobs)
    sign, log_ratio = scored(a, mask).sign(), _log_ratio(logprobs, arguments)
    inside = clamped(log_ratio, -config.clip_low, config.clip_high)
    bounded = torch.minimum(sign * log_ratio, sign * inside) * sign
    columns = {"log_ratio": bounded, "advantage": scored(a, mask)} | _factor(arguments)
    sums = _totals(columns, arguments, logprobs)
    counts, one_or_nan = _remaining(sums, arguments)
    weights = leaf_weights(arguments, counts)
    each = sums["count"].clamp_min(1)
    factor = torch.where(counts > 0, sums.get("factor", counts), 0)
    policy = -((weights * factor * sums["advantage"] / each).to(dtype) * (sums["log_ratio"] / each).exp()).sum()
    clipped = (sign * log_ratio > sign * inside) & _of_tokens(counts > 0, arguments, logprobs)
    clipped = clipped if mask is None else clipped & mask
    sides = {"clip_fraction": clipped, "clip_low": clipped & (log_ratio < 0), "clip_high": clipped & (log_ratio > 0)}
    loss, metrics = _tokens_alone(logprobs, entropy, arguments, weights, formed, sides)
    return _marked(policy + loss, one_or_nan), metrics


def _sequence_weighted(logprobs: Tensor, entropy: Tensor | None, arguments: LossArguments, formed: Formed) -> Result:
    """vespo: every token's term weighed by a function of its trajectory's whole log-ratio, without a gradient."""
    config, advantages = arguments.config, _given(arguments.advantages)
    sums = _totals({"log_ratio": _log_ratio(logprobs.detach(), arguments)}, arguments, logprobs)
    counts, one_or_nan = _remaining(sums, arguments)
    log_w = sums["log_ratio"].clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if arguments.per_token:
        log_w = _of_tokens(log_w, arguments, logprobs)
    good = advantages >= 0
    k = torch.where(good, config.vespo_k_pos, config.vespo_k_neg)
    decay = torch.where(good, config.vespo_lambda_pos, config.vespo_lambda_neg)
    weight = (decay + k * log_w - decay * log_w.exp()).exp().to(log_w.dtype)
    reweighted = arguments._replace(advantages=weight * advantages, config=replace(config, kind="reinforce"))
    parts = _with_weights(reweighted, leaf_weights(arguments, counts))
    loss, metrics = over_ranks(formed(logprobs, entropy, None, parts), parts, logprobs)
    return _marked(loss, one_or_nan), metrics


def _tokens_alone(
    logprobs: Tensor,
    entropy: Tensor | None,
    arguments: LossArguments,
    weights: Tensor,  # [N]
    formed: Formed,
    clipped: dict[str, Tensor] | None = None,  # [T]
) -> Result:
    """KL and entropy terms and the metrics of tokens; ``clipped``: which of this rank's count as such."""
    config = replace(summed(arguments.config), kind="reinforce", ratio_level="token")
    no_policy_term = torch.zeros_like(weights, dtype=logprobs.dtype)
    of_tokens = arguments._replace(advantages=no_policy_term, config=config, per_token=False)
    parts = _with_weights(of_tokens, weights)
    loss, metrics = formed(logprobs, entropy, None, parts)
    for name, flags in (clipped or {}).items():
        metrics[name] = flags.sum() / metrics["num_tokens"].clamp_min(1)
    return over_ranks((loss, metrics), parts, logprobs)


def _with_weights(arguments: LossArguments, weights: Tensor) -> LossArguments:
    """The arguments of the sum of the tokens' terms, each times its trajectory's weight, ``[N]``."""
    advantages = _given(arguments.advantages)
    counted = (weights != 0).to(weights.dtype)
    if arguments.per_token:
        weights, counted = (_of_tokens(x, arguments, advantages) for x in (weights, counted))
    rows = stacked(Branch.of(advantages, weights, counted), advantages.dtype)
    return arguments._replace(advantages=rows, config=summed(arguments.config), normalizer=None)


def _totals(columns: dict[str, Tensor], arguments: LossArguments, like: Tensor) -> dict[str, Tensor]:
    """Sums of these values of tokens, and their count, over the trajectories of all ranks; ``[N]`` each."""
    ones = torch.ones_like(like)
    columns = columns | {"count": scored(ones, arguments.mask)}
    if arguments.config.sampler_correction == "sequence_mask":
        columns["log_w"] = _bounded(_given(arguments.old_logprobs), arguments.sampler_logprobs, arguments.mask)
    sums = torch.stack([_summed(x, arguments.cu_seqlens) for x in columns.values()], 1)
    whole = sums.detach().to(torch.float64, copy=True)
    dist.all_reduce(whole, group=arguments.sequence_group)
    return dict(zip(columns, applied(_Whole, sums, whole).unbind(1), strict=True))


def _summed(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    if not _backends.wants_reference("span", values):
        return applied(span.SpanReduce, values.contiguous(), cu_seqlens[:-1], cu_seqlens[1:], "sum")
    row = torch.arange(cu_seqlens.shape[0] - 1, device=values.device)
    row = torch.repeat_interleave(row, cu_seqlens.diff(), output_size=values.shape[0])
    return values.new_zeros(cu_seqlens.shape[0] - 1).index_add(0, row, values)


def _remaining(sums: dict[str, Tensor], arguments: LossArguments) -> tuple[Tensor, Tensor | None]:
    """Scored tokens of each trajectory that the sampler's sequence mask leaves; 1, or NaN where that mask met one."""
    counts, config = sums["count"].detach().double(), arguments.config
    if "log_w" not in sums:
        return counts, None
    w = (sums["log_w"] / sums["count"].clamp_min(1)).exp()
    inside = ~((w < config.sampler_low) | (w > config.sampler_high))
    return counts * inside, 1 + 0 * w.sum()


def _log_ratio(logprobs: Tensor, arguments: LossArguments) -> Tensor:
    return _bounded(logprobs, arguments.old_logprobs, arguments.mask)


def _bounded(x: Tensor, y: Tensor | None, mask: Tensor | None) -> Tensor:
    return clamped(scored(x - _given(y), mask), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _factor(arguments: LossArguments) -> dict[str, Tensor]:
    if arguments.config.sampler_correction not in ("tis", "icepop"):
        return {}
    return {"factor": scored(sampler_factor(arguments), arguments.mask)}


def _of_tokens(x: Tensor, arguments: LossArguments, like: Tensor) -> Tensor:
    return torch.repeat_interleave(x, arguments.cu_seqlens.diff(), output_size=like.shape[0])


def _given(x: Tensor | None) -> Tensor:
    assert x is not None  # as the checks left it
    return x


def _marked(loss: Tensor, one_or_nan: Tensor | None) -> Tensor:
    return loss if one_or_nan is None else loss * one_or_nan
