"""The policy loss of packed trajectories: loss, gradient and metrics in one pass over the tokens.

The loss is a scalar, so its gradient in every log-prob is known in the forward, where it is formed; the backward only
scales it, in place, by the upstream number.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import laid_out
from trajkern._dtypes import accumulator
from trajkern._results import Branch
from trajkern.losses.arguments import LossArguments
from trajkern.losses.clamped import clamped
from trajkern.losses.config import PolicyLoss
from trajkern.losses.covariance import largest_covariances
from trajkern.losses.inputs import LossInputs, metric_names
from trajkern.losses.kinds import KINDS, LOG_RATIO_BOUND, METRICS
from trajkern.ops._autograd import applied, differentiable_once
from trajkern.ops._library import define, recorded
from trajkern.ops._loss_arguments import check_loss
from trajkern.ops.policy_loss_ranks import split_loss
from trajkern.ops.tree import branch_coefficients
from trajkern.ops.tree_loss import (
    Paths,
    leaf_counts,
    leaf_weights,
    path_sums,
    read_branch,
    remaining_rollouts,
    sampler_factor,
    scored,
    stacked,
    summed,
)

# LossInputs behind its old log-probs, in every op's schema
LOSS_INPUTS = (
    "old_logprobs, Tensor advantages, Tensor cu_seqlens, Tensor? mask, Tensor? ref_logprobs, Tensor? sampler_logprobs,"
    " Tensor? normalizer, Tensor? supervised_weights, Tensor? supervised_normalizer, Tensor? kl_weights,"
    " Tensor? kl_normalizer, int[] options, float[] params"
)
Result = tuple[Tensor, dict[str, Tensor]]


def _policy_loss_fake(logprobs, entropy, selected, *inputs):
    given = LossInputs(*inputs)
    *_, need_logprobs, need_entropy = given.options
    grads = [logprobs.new_empty(logprobs.shape) for need in (need_logprobs, need_entropy) if need]
    return [logprobs.new_empty(()), logprobs.new_empty(len(given.metrics)), *grads]


# -> [loss, metrics in LossInputs.metrics' order, then the gradients in logprobs and entropy that the last two options
#     ask for]
_policy_loss = define(
    "policy_loss",
    f"policy_loss(Tensor logprobs, Tensor? entropy, Tensor? selected, Tensor {LOSS_INPUTS}) -> Tensor[]",
    _policy_loss_fake,
)
_scale_gradients_ = define(
    "policy_loss",
    "scale_gradients_(Tensor(a!) first, Tensor(b!)? second, Tensor scale) -> ()",
    lambda first, second, scale: None,
)


def scaled_once(ctx: Any, op: str, grad_loss: Tensor) -> list[Tensor | None]:
    """The gradients that ``op`` formed in its forward, ``ctx.grads``, times the upstream number.

    In place where no graph is traced.
    """
    if ctx.grads is None:
        raise RuntimeError(f"{op}: a second backward; the gradient was formed in the forward and scaled once")
    grads, ctx.grads = ctx.grads, None
    formed = [grad for grad in grads if grad is not None]
    if torch.compiler.is_compiling():
        return [None if grad is None else (grad * grad_loss).to(grad.dtype) for grad in grads]
    wide = [grad.view(-1) for grad in formed if grad.dtype in (torch.float32, torch.float64)]
    for first, second in zip_longest(wide[::2], wide[1::2]):
        _scale_gradients_(first, second, grad_loss)
    for grad in formed:
        if grad.dtype not in (torch.float32, torch.float64):
            grad.mul_(grad_loss)
    return grads


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs, entropy, selected, inputs):
        needs, (*tensors, options, params) = ctx.needs_input_grad[:2], inputs
        options = [*options, *map(int, needs)]
        loss, metrics, *grads = _policy_loss(logprobs, entropy, selected, *tensors, options, params)
        formed = iter(grads)
        ctx.grads = [next(formed) if need else None for need in needs]
        ctx.set_materialize_grads(False)  # the metrics have none
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @differentiable_once("policy_loss")
    def backward(ctx: Any, grad_loss, _):
        return *scaled_once(ctx, "policy_loss", grad_loss), None, None


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
    sequence_group: Any = None,
    # terms of their own
    supervised_weights: Tensor | None = None,  # [T]
    supervised_normalizer: float | Tensor | None = None,
    kl_weights: Tensor | None = None,  # [T]
    kl_normalizer: float | Tensor | None = None,
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

    **Terms of their own.** With weights s and c of tokens, and normalisers S and C, the loss is the one above, without
    its KL where c is given, plus

        - (sum of s logprobs) / S + kl_coef (sum of c KL) / C:

    the cross-entropy of demonstrations, and a KL to the reference where it is wanted, packed with what was sampled. A
    token of weight 0 takes no part in its term; one of another weight does, whatever the mask says.

    Args:
        logprobs, old_logprobs: float ``[T]``; log p of each token now and when it was sampled (or at the last sync).
            None: the policy has not moved since, so the old ones are these.
        advantages: float, per trajectory ``[N]`` or per token ``[T]``; None where ``branch`` is given.
        cu_seqlens: int64 or int32 ``[N+1]``, from 0 to T, never decreasing (checked on the CPU).
        config: :class:`PolicyLoss`.
        mask: bool ``[T]``; a False token is not read and has gradient 0.
        ref_logprobs: float ``[T]``, needed when config.kl_coef is not 0, and read only then.
        sampler_logprobs: float ``[T]``, what the sampling engine reported; needed by config.sampler_correction, else
            only metrics.
        entropy: float ``[T]``, differentiable; needed when config.entropy_coef is not 0, else only a metric.
        branch: :class:`Paths`, for tokens of a packed tree of which ``cu_seqlens`` bounds the nodes (as
            ``tree.pairs(...)`` gives it); any aggregation. Or a :class:`Branch` of sums per node or per token, for
            advantages that are not a leaf's own; "token_mean" and "token_sum", ratios per token.
        normalizer: a positive number or a tensor of one element, in place of the token count of "token_mean" and the
            trajectory count of "seq_mean_*" (for gradient accumulation and data parallelism). 0 is legal where nothing
            is to be learnt, and gives a loss and gradients of 0: no token is scored, or no scored one has an advantage,
            a KL term or an entropy term. Else it is an error on the CPU, and NaN where its value or the mask's cannot
            be read; so is a negative one. There, unscored tokens alone count as nothing to be learnt.
        per_token: whether advantages are per token; None: by their length, per trajectory where N = T, and per
            trajectory with ``sequence_group``.
        sequence_group: of torch.distributed, over whose ranks the trajectories' tokens are spread (context parallel):
            each rank's ``cu_seqlens`` bounds its tokens of the same N trajectories, any number or none of each, and
            advantages per trajectory, config and normalizer are the same on all (checked on the CPU). Every rank must
            make the call. What is counted or averaged over a trajectory or the batch is over all ranks' tokens, for
            which a number or a few a trajectory travel;
            loss and metrics are the whole batch's, the same on every rank, and each has its own tokens' gradient, so
            that the ranks' gradients of a parameter add up. No ``branch``; not "kl_cov", "clip_cov", nor ratio level
            "sequence" with "k3_corrected" or a kind whose trees refuse it, nor "gmpo" and "vespo" with it.
        supervised_weights, kl_weights: float ``[T]``, s and c; None: no such term. Not with ``branch``, whose tokens
            stand for several rollouts, nor with ``sequence_group``; and c not with kl "k3_corrected". c is not read
            where config.kl_coef is 0.
        supervised_normalizer, kl_normalizer: S and C, as ``normalizer``; None: how many tokens have a weight that is
            not 0, at least 1.

    Returns:
        (loss, metrics): a float32 scalar (float64 for float64 logprobs), differentiable once in logprobs and entropy
        (no other argument gets a gradient), and a dict of scalars on the device over the tokens that take part, the
        unmasked ones of the trajectories that the sequence mask leaves:

        - "clip_fraction" (ratio clipped, or token dropped), and of it "clip_low" and "clip_high", where the kind's own
          bound below or above r = 1 is what clips; the rest is at clip_dual, or chosen by covariance;
        - "approx_kl" (mean of old - new), "ratio_mean", "ratio_max", "num_tokens";
        - "entropy" where it is given, "kl" where config.kl_coef is not 0;
        - where sampler_logprobs are given, with log w = clamp(old_logprobs - sampler_logprobs, -20, 20): "sampler_kl"
          (k3 of KL(sampler || old policy): mean of w - 1 - log w), "sampler_outside" (share of w outside [1/2, 2]),
          and "effective_sample_size" as a share of the n tokens, (sum w)^2 / (n sum w^2).

        A metric that was not computed is NaN; one of no tokens is 0. With supervised_weights there is also
        "supervised_loss", their term; with kl_weights "kl" is (sum of c KL) / C.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: a second backward through the same loss.

    Sources: GRPO 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, BNPO 2506.02864, GSPO 2507.18071, GMPO 2507.20673,
    CISPO 2506.13585, SAPO 2511.20347, LUSPO and VESPO as in TRL, GPG 2504.02546, DPPO 2602.04879, KL-Cov and Clip-Cov
    2505.22617; TIS and IcePop as in OpenRLHF and NeMo-RL.
    """
    arguments = LossArguments(
        config,
        old_logprobs,
        advantages,
        cu_seqlens,
        mask,
        ref_logprobs,
        sampler_logprobs,
        branch,
        normalizer,
        per_token,
        sequence_group,
        supervised_weights,
        supervised_normalizer,
        kl_weights,
        kl_normalizer,
    )
    return checked_policy_loss(logprobs, entropy, check_loss(logprobs, entropy, arguments))


def checked_policy_loss(logprobs: Tensor, entropy: Tensor | None, arguments: LossArguments) -> Result:
    """:func:`policy_loss` of checked arguments."""
    if arguments.old_logprobs is None:
        arguments = arguments._replace(old_logprobs=logprobs.detach())
    if _backends.wants_reference("policy_loss", logprobs):
        return _backends.reference().policy_loss(logprobs, entropy=entropy, **arguments._asdict())
    dtype = accumulator(logprobs)
    logprobs, entropy, arguments = laid_out(logprobs, dtype), laid_out(entropy, dtype), arguments.laid_out(dtype)
    if arguments.sequence_group is not None:
        return split_loss(logprobs, entropy, arguments, _formed)
    if isinstance(arguments.branch, Paths) and arguments.config.resolved_ratio_level == "sequence":
        return _sequence_loss(logprobs, entropy, arguments)
    arguments = read_branch(arguments, dtype)
    return _formed(logprobs, entropy, _selected(logprobs, arguments), arguments)


def _formed(logprobs: Tensor, entropy: Tensor | None, selected: Tensor | None, arguments: LossArguments) -> Result:
    inputs = arguments.inputs()
    loss, metrics = applied(_PolicyLoss, logprobs, entropy, selected, inputs)
    return loss, dict(zip(metric_names(inputs.supervised_weights), metrics.unbind(), strict=True))


def _selected(logprobs: Tensor, arguments: LossArguments) -> Tensor | None:
    """The tokens that kl_cov penalises or clip_cov drops; a ranking of the whole batch, so a pass of its own."""
    config, old, advantages = arguments.config, arguments.old_logprobs, arguments.advantages
    if not config.ranks_tokens:
        return None
    assert old is not None and advantages is not None
    new = logprobs.detach()
    mask = torch.ones_like(new, dtype=torch.bool) if arguments.mask is None else arguments.mask
    if not arguments.per_token:
        token = torch.arange(new.shape[0], device=new.device)
        owner = torch.searchsorted(arguments.cu_seqlens, token, right=True) - 1
        advantages = advantages[owner.clamp(0, advantages.shape[0] - 1)]  # of boundaries that nobody may read, too
    if "cov_low" not in KINDS[config.kind].selects:
        return largest_covariances(advantages, new, mask, mask, config.cov_fraction)
    ratio = (new - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    above, below = ratio > 1 + config.clip_high, ratio < 1 - config.clip_low  # a graph would fix the bounds of a clamp
    clipped = torch.where(advantages > 0, above, below & (advantages < 0))
    band = (config.cov_low, config.cov_high)
    return largest_covariances(advantages, new, mask, mask & ~clipped, config.cov_fraction, band)


def _sequence_loss(logprobs: Tensor, entropy: Tensor | None, arguments: LossArguments) -> Result:
    """The policy term a leaf, from its path's mean log-ratio; KL and entropy a token, as often as it has leaves."""
    paths, mask, cu_seqlens = arguments.branch, arguments.mask, arguments.cu_seqlens
    old, dtype = arguments.old_logprobs, logprobs.dtype
    assert old is not None
    gate, one_or_nan = remaining_rollouts(arguments)
    counts = leaf_counts(arguments, gate)
    weights = leaf_weights(arguments, counts)
    config = replace(summed(arguments.config), ratio_level="token")
    log_ratio = clamped(scored(logprobs - old, mask), -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    log_ratio = path_sums(log_ratio, cu_seqlens, paths.tree) / counts.clamp_min(1)
    terms = counts
    if config.sampler_correction != "none":
        terms = path_sums(scored(sampler_factor(arguments), mask), cu_seqlens, paths.tree)
    config = replace(config, sampler_correction="none")
    advantages = paths.advantages.detach().to(dtype)
    of_leaves = arguments._replace(
        config=replace(config, kl_coef=0.0, entropy_coef=0.0),
        old_logprobs=torch.zeros_like(log_ratio),
        cu_seqlens=torch.arange(paths.tree.num_leaves + 1, device=log_ratio.device),
        mask=None,
        ref_logprobs=None,
        sampler_logprobs=None,
        normalizer=None,
        per_token=True,
    )

    def policy_term(weights: Tensor) -> Result:
        leaves = Branch.of(advantages, weights.to(dtype), counts)
        return _formed(log_ratio, None, None, of_leaves._replace(advantages=stacked(leaves, dtype)))

    policy, of_ratio = policy_term(weights * terms)
    if terms is not counts:  # a correction of 0 takes a rollout's loss, not its place in the metrics
        of_ratio = policy_term(counts)[1]
    no_policy_term = branch_coefficients(torch.zeros_like(advantages), paths.tree, leaf_weights=weights)
    of_tokens = arguments._replace(
        config=replace(config, kind="reinforce"),
        advantages=stacked(no_policy_term, dtype),
        normalizer=None,
    )
    rest, metrics = _formed(logprobs, entropy, None, of_tokens)
    loss = policy + rest if one_or_nan is None else (policy + rest) / one_or_nan
    return loss, metrics | {name: of_ratio[name] for name, metric in METRICS.items() if metric.of_ratio}
