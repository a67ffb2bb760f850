"""The policy loss of packed trajectories: loss, gradient and metrics in one pass over the tokens.

The loss is a scalar, so its gradient in every log-prob is known in the forward, where it is formed; the backward only
scales it, in place, by the upstream number.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trajkern import _backends
from trajkern._checks import check_cu_seqlens, check_number, check_shape, check_tensor, describe, laid_out, readable
from trajkern._dtypes import FLOATS, accumulator
from trajkern._results import Branch
from trajkern.losses.config import PolicyLoss
from trajkern.losses.covariance import largest_covariances
from trajkern.losses.kinds import AGGREGATES, FORMS, KINDS, KL_ESTIMATORS, METRICS, RATIO_LEVELS, SAMPLER_CORRECTIONS
from trajkern.ops._library import define, recorded
from trajkern.ops.tree import branch_coefficients
from trajkern.ops.tree_loss import (
    LOG_RATIO_BOUND,
    Paths,
    check_branch,
    gate_of,
    leaf_counts,
    path_sums,
    read_branch,
    sampler_factor,
    scored,
    summed,
    weights_of,
)


def _policy_loss_fake(
    logprobs, old, advantages, cu_seqlens, mask, ref, sampler, entropy, selected, normalizer, options, params
):
    *_, need_logprobs, need_entropy = options
    grads = [logprobs.new_empty(logprobs.shape) for need in (need_logprobs, need_entropy) if need]
    return [logprobs.new_empty(()), logprobs.new_empty(len(METRICS)), *grads]


# -> [loss, metrics in METRICS' order, then the gradients in logprobs and entropy that the last two options ask for]
_policy_loss = define(
    "policy_loss",
    "policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor cu_seqlens, Tensor? mask,"
    " Tensor? ref_logprobs, Tensor? sampler_logprobs, Tensor? entropy, Tensor? selected, Tensor? normalizer,"
    " int[] options, float[] params) -> Tensor[]",
    _policy_loss_fake,
)
_scale_gradient_ = define("policy_loss", "scale_gradient_(Tensor(a!) x, Tensor scale) -> ()", lambda x, scale: None)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs,
        entropy,
        old,
        advantages,
        cu_seqlens,
        mask,
        ref,
        sampler,
        selected,
        normalizer,
        options,
        params,
    ):
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        loss, metrics, *grads = _policy_loss(
            logprobs,
            old,
            advantages,
            cu_seqlens,
            mask,
            ref,
            sampler,
            entropy,
            selected,
            normalizer,
            [*options, *map(int, needs)],
            params,
        )
        rest = iter(grads)
        ctx.grads = [next(rest) if need else None for need in needs]
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss, _):
        if ctx.grads is None:
            raise RuntimeError("policy_loss: a second backward; the gradient was formed in the forward and scaled once")
        grads, ctx.grads = ctx.grads, None
        return *(scaled(g, grad_loss) for g in grads), *(None,) * 10


def scaled(grad: Tensor | None, scale: Tensor) -> Tensor | None:
    """``grad`` times the upstream number, in place where no graph is traced."""
    if grad is None:
        return None
    if torch.compiler.is_compiling():
        return (grad * scale).to(grad.dtype)
    if grad.dtype not in (torch.float32, torch.float64):
        return grad.mul_(scale)
    _scale_gradient_(grad.view(-1), scale)
    return grad


@recorded
def policy_loss(
    logprobs: Tensor,  # [T]
    old_logprobs: Tensor | None,  # [T]
    advantages: Tensor | None,  # [N] or [T]
    cu_seqlens: Tensor,  # [N+1]
    *,
    config: PolicyLoss,
    mask: Tensor | None = None,  # [T]
    ref_logprobs: Tensor | None = None,  # [T]
    sampler_logprobs: Tensor | None = None,  # [T]
    entropy: Tensor | None = None,  # [T]
    branch: Branch | Paths | None = None,
    normalizer: float | Tensor | None = None,
    per_token: bool | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""The policy loss of a packed batch, to minimise, and its metrics.

    With the log-ratio l = clamp(logprobs - old_logprobs, -20, 20), r = exp(l) (ratio level "sequence": l is the masked
    mean of the trajectory), A the advantage and sg = no gradient, a token's loss is

    ======================  ===========================================================================================
    kind                    loss of a token                                                (its own aggregation)
    ======================  ===========================================================================================
    grpo                    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with clip_dual c and A < 0 at most -c A
                            (seq_mean_token_mean)
    dapo, bnpo              as grpo (token_mean)
    dr_grpo                 as grpo (seq_mean_token_sum_norm)
    gspo                    as grpo at ratio level sequence (seq_mean_token_mean)
    luspo                   as grpo at ratio level sequence (seq_mean_token_sum)
    gmpo                    -mean(A) exp(mean of l, bounded by clip_low below and clip_high above in the direction of A)
                            of the trajectory (seq_mean_token_mean)
    cispo                   -sg(clip(r)) A logprobs (token_mean)
    sapo                    -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A (seq_mean_token_mean)
    vespo                   -sg(exp(lambda + k log w - lambda w)) A logprobs, log w = sum of l over the trajectory,
                            k and lambda by the sign of A (token_mean)
    gpg, reinforce          -A logprobs (token_mean)
    dppo_tv, dppo_kl        -A sg(min(r, 20)) logprobs while the probability has moved by no more than clip_low or
                            clip_high in the direction of A (total variation; binary KL) (token_mean)
    kl_cov                  -r A, plus cov_coef abs(l) on the tokens of largest covariance of A and logprobs
                            (token_mean)
    clip_cov                as grpo, without the tokens of largest covariance inside the band (token_mean)
    ======================  ===========================================================================================

    times the sampler correction, plus kl_coef * KL, minus entropy_coef * entropy; masked tokens take no part. Then
    "token_mean" divides the sum by the unmasked tokens, "token_sum" by 1, "seq_mean_token_sum" by the trajectories
    that have an unmasked token, "seq_mean_token_sum_norm" also by config.max_length, and "seq_mean_token_mean" takes
    the mean over such trajectories of each one's token mean. An empty sum is 0.

    **Trees.** With ``branch`` the tokens are those of a packed tree, each prefix once, and the loss, its gradient and
    the metrics are those of the flat rollouts, one a leaf. A shared token has one r, and an advantage A_l and a weight
    w_l (by the aggregation) for every leaf l below it. Every token-level kind here but kl_cov and clip_cov has
    f(r, c A) = c f(r, A) for c >= 0, the clipped ones too, since min and clip scale with A; so

        sum_l w_l f(r, A_l) = f(r, sum of w_l A_l over A_l > 0) + f(r, sum of w_l A_l over A_l < 0),

    which takes two numbers a token and not one: A_l of both signs are clipped on different sides. KL and entropy have
    the coefficient sum_l w_l. At ratio level "sequence" a leaf's log-ratio is a mean along its path: the log-ratios are
    summed down the paths, the loss is formed a leaf, and its derivatives are summed back up.

    Args:
        logprobs, old_logprobs: float ``[T]``; log p of each token now and when it was sampled (or at the last sync).
            None: the policy has not moved since, so the old ones are these.
        advantages: float, per trajectory ``[N]`` or per token ``[T]``; None where ``branch`` is given.
        cu_seqlens: int64 or int32 ``[N+1]``, from 0 to T, never decreasing (checked on the CPU).
        config: :class:`PolicyLoss`.
        mask: bool ``[T]``; a False token is not read and has gradient 0.
        ref_logprobs: float ``[T]``, needed when config.kl_coef is not 0, and read only then.
        sampler_logprobs: float ``[T]``, needed by config.sampler_correction: what the sampling engine reported.
        entropy: float ``[T]``, differentiable; needed when config.entropy_coef is not 0, else only a metric.
        branch: :class:`Paths`, for tokens of a packed tree of which ``cu_seqlens`` bounds the nodes (as
            ``tree.pairs(...)`` gives it); any aggregation. Or a :class:`Branch` of sums per node or per token, for
            advantages that are not a leaf's own; "token_mean" and "token_sum", ratios per token.
        normalizer: a positive number or a tensor of one element, in place of the token count of "token_mean" and the
            trajectory count of "seq_mean_*" (for gradient accumulation and data parallelism).
        per_token: whether advantages are per token; None: by their length, per trajectory where N = T.

    Returns:
        (loss, metrics): a float32 scalar (float64 for float64 logprobs), differentiable once in logprobs and entropy,
        and a dict of scalars on the device over the unmasked tokens: "clip_fraction" (ratio clipped, or token
        dropped), "approx_kl" (mean of old - new), "ratio_mean", "ratio_max", "entropy", "kl" (0 where not computed),
        "num_tokens".

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: a second backward through the same loss.

    Sources: GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, BNPO 2506.02864, GSPO 2507.18071, GMPO 2507.20673,
    CISPO 2506.13585, SAPO 2511.20347, LUSPO and VESPO as in TRL, GPG 2504.02546, DPPO 2602.04879, KL-Cov and Clip-Cov
    2505.22617; TIS and IcePop as in OpenRLHF and NeMo-RL.
    """
    if old_logprobs is None and isinstance(logprobs, Tensor):
        old_logprobs = logprobs.detach()
    advantages, per_token, divisor, ref, sampler = check_policy(
        logprobs,
        old_logprobs,
        advantages,
        cu_seqlens,
        config,
        mask,
        ref_logprobs,
        sampler_logprobs,
        entropy,
        branch,
        normalizer,
        per_token,
    )
    if _backends.wants_reference("policy_loss", logprobs):
        return _backends.reference().policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            cu_seqlens,
            config=config,
            mask=mask,
            ref_logprobs=ref,
            sampler_logprobs=sampler,
            entropy=entropy,
            branch=branch,
            normalizer=divisor,
            per_token=per_token,
        )
    dtype = accumulator(logprobs)
    new, old = laid_out(logprobs, dtype), laid_out(old_logprobs, dtype)
    mask, cu_seqlens = laid_out(mask, torch.bool), laid_out(cu_seqlens, torch.int64)
    ref, sampler, entropy = laid_out(ref, dtype), laid_out(sampler, dtype), laid_out(entropy, dtype)
    if isinstance(branch, Paths):
        if config.resolved_ratio_level == "sequence":
            return _sequence_loss(new, old, cu_seqlens, config, mask, ref, sampler, entropy, branch, divisor)
    if branch is not None:
        advantages, config, divisor = read_branch(
            branch, config, cu_seqlens, mask, old, sampler, divisor, per_token, dtype
        )
    a = laid_out(advantages, dtype)
    selected = _select(config, new, old, a if per_token else None, advantages, cu_seqlens, mask)
    loss, metrics = _PolicyLoss.apply(
        new, entropy, old, a, cu_seqlens, mask, ref, sampler, selected, divisor, *encode(config, per_token)
    )
    return loss, dict(zip(METRICS, metrics.unbind(), strict=True))


def _sequence_loss(new, old, cu_seqlens, config, mask, ref, sampler, entropy, paths, normalizer):
    """The policy term a leaf, from its path's mean log-ratio; KL and entropy a token, as often as it has leaves."""
    tree, (gate, sound) = paths.tree, gate_of(paths, config, cu_seqlens, mask, old, sampler)
    counts = leaf_counts(paths, cu_seqlens, mask, gate)
    weights = weights_of(config, counts, normalizer)
    own = replace(summed(config), ratio_level="token")
    log_ratio = scored(new - old, mask).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    log_ratio = path_sums(log_ratio, cu_seqlens, tree) / counts.clamp_min(1)
    terms = counts
    if own.sampler_correction != "none":
        terms = path_sums(scored(sampler_factor(own, old - sampler), mask), cu_seqlens, tree)
    a, each = paths.advantages.detach().to(new.dtype), torch.arange(tree.num_leaves + 1, device=new.device)
    own = replace(own, sampler_correction="none")
    policy_alone = replace(own, kl_coef=0.0, entropy_coef=0.0)

    def of_leaves(w: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        w, signs = w.to(new.dtype), (counts * sign for sign in (a > 0, a < 0, a == 0))
        leaves = Branch(w * a.relu(), -w * (-a).relu(), w, *signs)
        zeros = torch.zeros_like(log_ratio)
        return policy_loss(log_ratio, zeros, None, each, config=policy_alone, branch=leaves, per_token=True)

    policy, of_ratio = of_leaves(weights * terms)
    if terms is not counts:  # a correction of 0 takes a rollout's loss, not its place in the metrics
        of_ratio = of_leaves(counts)[1]
    branch = branch_coefficients(torch.zeros_like(a), tree, leaf_weights=weights)
    rest, metrics = policy_loss(
        new,
        old,
        None,
        cu_seqlens,
        branch=branch,
        mask=mask,
        ref_logprobs=ref,
        entropy=entropy,
        per_token=False,
        config=replace(own, kind="reinforce"),
    )
    loss = policy + rest if sound is None else (policy + rest) / sound
    return loss, metrics | {k: of_ratio[k] for k in ("clip_fraction", "ratio_mean", "ratio_max")}


def encode(c: PolicyLoss, per_token: bool) -> tuple[list[int], list[float]]:
    """The configuration as the kernels read it: enumerations in ``options``, numbers in ``params``."""
    options = [
        list(FORMS).index(KINDS[c.kind].form),
        RATIO_LEVELS.index(c.resolved_ratio_level),
        1 + KL_ESTIMATORS.index(c.kl) if c.kl_coef else 0,
        AGGREGATES.index(c.resolved_aggregate),
        SAMPLER_CORRECTIONS.index(c.sampler_correction),
        int(per_token),
    ]
    params = [
        c.clip_low,
        c.clip_high,
        math.inf if c.clip_dual is None else c.clip_dual,
        c.kl_coef,
        c.entropy_coef,
        c.max_length or 1,
        c.sampler_low,
        c.sampler_high,
        c.sapo_tau_pos,
        c.sapo_tau_neg,
        c.vespo_k_pos,
        c.vespo_lambda_pos,
        c.vespo_k_neg,
        c.vespo_lambda_neg,
        c.cov_coef,
    ]
    return options, [float(x) for x in params]


def _select(c: PolicyLoss, new, old, per_token, advantages, cu_seqlens, mask) -> Tensor | None:
    """The tokens that kl_cov penalises or clip_cov drops; a ranking of the whole batch, so a pass of its own."""
    if c.kind not in ("kl_cov", "clip_cov"):
        return None
    new = new.detach()
    mask = torch.ones_like(new, dtype=torch.bool) if mask is None else mask
    if per_token is None:
        token = torch.arange(new.shape[0], device=new.device)
        per_token = advantages.to(new.dtype)[torch.searchsorted(cu_seqlens, token, right=True) - 1]
    if c.kind == "kl_cov":
        return largest_covariances(per_token, new, mask, mask, c.cov_fraction)
    ratio = (new - old).clamp(-20, 20).exp()
    clipped = ratio * per_token > ratio.clamp(1 - c.clip_low, 1 + c.clip_high) * per_token
    return largest_covariances(per_token, new, mask, mask & ~clipped, c.cov_fraction, (c.cov_low, c.cov_high))


def check_policy(
    logprobs,
    old_logprobs,
    advantages,
    cu_seqlens,
    config,
    mask,
    ref_logprobs,
    sampler_logprobs,
    entropy,
    branch,
    normalizer,
    per_token,
):
    """Raises, or returns the advantages (a branch's positive ones), per_token, the normalizer as a tensor, and
    ref_logprobs and sampler_logprobs if they are read."""
    if branch is not None and advantages is not None:
        raise ValueError(f"advantages must be None where branch is given; got {describe(advantages)}")
    _check(logprobs, old_logprobs, cu_seqlens, config, mask, ref_logprobs, sampler_logprobs, entropy)
    if branch is not None:
        check_branch(branch, config, logprobs, cu_seqlens)
        if readable(logprobs):
            check_cu_seqlens(cu_seqlens, logprobs.shape[0])
    if isinstance(branch, Paths):
        per_token, advantages = False, logprobs.new_empty(cu_seqlens.shape[0] - 1)
    elif branch is not None:
        advantages = branch.positive
    check_tensor("advantages", advantages, dtypes=FLOATS, ndim=1, device=logprobs.device)
    return (
        advantages,
        _check_advantages(logprobs, advantages, cu_seqlens, per_token),
        _check_normalizer(normalizer, logprobs),
        ref_logprobs if config.kl_coef else None,
        sampler_logprobs if config.sampler_correction != "none" else None,
    )


def _check(logprobs, old_logprobs, cu_seqlens, config, mask, ref_logprobs, sampler_logprobs, entropy):
    check_tensor("logprobs", logprobs, dtypes=FLOATS, ndim=1)
    device, length = logprobs.device, tuple(logprobs.shape)
    if not isinstance(config, PolicyLoss):
        raise TypeError(f"config must be a trajkern.PolicyLoss, got {describe(config)}")
    needed = {
        "old_logprobs": (old_logprobs, True),
        "ref_logprobs": (ref_logprobs, config.kl_coef != 0),
        "sampler_logprobs": (sampler_logprobs, config.sampler_correction != "none"),
        "entropy": (entropy, config.entropy_coef != 0),
    }
    for name, (x, need) in needed.items():
        if x is None and need:
            raise ValueError(f"{name} must be given for this config (kind {config.kind!r}), got None")
        if x is not None:
            check_tensor(name, x, dtypes=FLOATS, device=device)
            check_shape(name, x, length, "one value a token")
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), device=device)
        check_shape("mask", mask, length, "one flag a token")
    check_tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int64, torch.int32), ndim=1, device=device)
    ranks = config.kind in ("kl_cov", "clip_cov")  # reads cu_seqlens before a launcher can check it
    if readable(logprobs) and (ranks or _backends.wants_reference("policy_loss", logprobs)):
        check_cu_seqlens(cu_seqlens, length[0])


def _check_advantages(logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, per_token: bool | None) -> bool:
    tokens, trajectories = logprobs.shape[0], cu_seqlens.shape[0] - 1
    if per_token is None:
        per_token = advantages.shape[0] != trajectories
    if advantages.shape[0] != (tokens if per_token else trajectories):
        raise ValueError(
            f"advantages must have length {trajectories} (one a trajectory) or {tokens} (one a token); "
            f"got {describe(advantages)}"
        )
    return per_token


def _check_normalizer(normalizer: float | Tensor | None, logprobs: Tensor) -> Tensor | None:
    if normalizer is None:
        return None
    dtype = accumulator(logprobs)
    if isinstance(normalizer, Tensor):
        check_tensor("normalizer", normalizer, dtypes=(*FLOATS, torch.int64, torch.int32), device=logprobs.device)
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must have one element; got {describe(normalizer)}")
        if readable(normalizer):
            check_number("normalizer", float(normalizer), above=0)
        return normalizer.detach().to(dtype).reshape(())
    check_number("normalizer", normalizer, above=0)
    return torch.full((), normalizer, dtype=dtype, device=logprobs.device)
