"""The policy loss inside the head: the loss and its gradients from the same logits as the log-probs.

Its derivative in every log-prob is known as soon as the sums of a row are, so a block of rows is turned into gradients
while its logits are there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import check_flag
from trajkern._dtypes import accumulator
from trajkern._results import Branch
from trajkern._tiles.arguments import Head
from trajkern.losses.arguments import LossArguments
from trajkern.losses.config import PolicyLoss
from trajkern.losses.inputs import LossInputs, joined, metric_names
from trajkern.ops._autograd import applied, differentiable_once
from trajkern.ops._head_arguments import HeadArguments, check_head, reference_arguments
from trajkern.ops._library import define, recorded
from trajkern.ops._loss_arguments import check_loss
from trajkern.ops.head import HEAD, checked_token_stats, grads_fake
from trajkern.ops.policy_loss import LOSS_INPUTS, checked_policy_loss, scaled_once
from trajkern.ops.policy_loss_ranks import over_ranks, weighted_parts
from trajkern.ops.tree_loss import Paths, read_branch

# an op has one argument of a name: here the loss's have the head's beside them
_LOSS_INPUTS = LOSS_INPUTS.replace("mask", "loss_mask").replace("options", "loss_options")


def _policy_loss_fake(*args):
    head, others = Head.split(args)
    shapes = ((), len(LossInputs(*others[:-2]).metrics), head.targets.shape)
    results = [head.hidden.new_empty(shape, dtype=head.accumulator) for shape in shapes]
    wide = head.accumulator if head.hidden.dtype == torch.float16 else head.hidden.dtype
    return results + [grad.to(wide) for grad in grads_fake(*args)]


# -> [loss, metrics, logprobs, the gradients in hidden, weight and bias that ``needs`` asks
#     for, fp16's in float32: a loss scaler's large upstream factor comes too late for what fp16 has rounded to 0]
_linear_policy_loss = define(
    "head",
    f"linear_policy_loss({HEAD}, Tensor? {_LOSS_INPUTS}, int outputs, bool[] needs) -> Tensor[]",
    _policy_loss_fake,
)


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, others):
        needs = ctx.needs_input_grad[:3]
        loss, metrics, logprobs, *grads = _linear_policy_loss(hidden, weight, bias, *others, [*needs])
        formed = iter(grads)
        ctx.grads = [next(formed) if need else None for need in needs]
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(metrics, logprobs)
        return loss, metrics, logprobs

    @staticmethod
    @differentiable_once("linear_policy_loss")
    def backward(ctx: Any, grad_loss, *_):
        grads = scaled_once(ctx, "linear_policy_loss", grad_loss)
        return *(None if grad is None else grad.to(ctx.dtype) for grad in grads), None


@recorded
def linear_policy_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [P]
    old_logprobs: Tensor | None,  # [P]
    advantages: Tensor | None,  # [N] or [P]
    cu_seqlens: Tensor,  # [N+1]
    *,
    # as in policy_loss
    config: PolicyLoss,
    ref_logprobs: Tensor | None = None,  # [P]
    sampler_logprobs: Tensor | None = None,  # [P]
    branch: Branch | Paths | None = None,
    normalizer: float | Tensor | None = None,
    per_token: bool | None = None,
    sequence_group: Any = None,
    supervised_weights: Tensor | None = None,  # [P]
    supervised_normalizer: float | Tensor | None = None,
    kl_weights: Tensor | None = None,  # [P]
    kl_normalizer: float | Tensor | None = None,
    # of this op
    with_entropy: bool = False,
    with_logprobs: bool = False,
    # as in linear_logprobs
    rows: Tensor | None = None,  # [P]
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [T]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # [P]
    sampling_support: tuple[Tensor, Tensor] | None = None,  # [E], [P+1]
    logits_dtype: torch.dtype = torch.float32,
    workspace_bytes: int | None = None,
    process_group: Any = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss of :func:`policy_loss` inside the head: ``policy_loss(linear_logprobs(...))`` in fewer FLOP.

    For kinds with token-level ratios the gradients are formed in the forward, a block of rows at a time, so the logits
    are computed once: 6 T H V FLOP with the backward, 4 with a frozen weight. On a CPU, pairs without a gradient
    (advantage 0 and neither KL nor entropy term) take no part in the gradients' products. Ratios per trajectory
    ("gspo", "gmpo", "luspo", "vespo", or ratio_level "sequence") and "kl_cov" and "clip_cov", which need every log-prob
    first, compute the logits twice: 8 T H V.

    Args:
        hidden, weight, targets, rows, bias, temperature, softcap, logit_scale, mask, sampling_support, logits_dtype,
            process_group, batch_invariant: as in :func:`linear_logprobs`.
        workspace_bytes: bound of the memory for logits, at least one row of them. Blocks of few rows make slow
            products, and each reads and writes d weight in float32, 4 V H bytes, unless there is only one. So None
            means as many bytes as that: blocks of H rows of float32 logits, of 2 H in 16 bits; and on a GPU one block
            of up to twice as many rows, which writes a bfloat16 d weight as it is and has no sum beside it. At Qwen3-8B
            (V 151,936, H 4,096) that is 2.3 GiB, or 4.6 GiB for up to 8,192 rows at once, at Llama-3-70B (128,256,
            8,192) 3.9 and 7.8 GiB. Where it is less than 64 MiB (a GPU: 256 MiB), or the weight is frozen, it is that.
            In float16, d weight stays in float32 until the upstream factor is known, so that a loss scaler finds what
            fp16 would lose.
        old_logprobs, ref_logprobs, sampler_logprobs, advantages, cu_seqlens, config, branch, normalizer, per_token,
            sequence_group, supervised_weights, supervised_normalizer, kl_weights, kl_normalizer: as in
            :func:`policy_loss`, per pair where that says per token: cu_seqlens counts pairs. A pair with a weight is
            computed whatever the mask says.
        with_entropy: compute the entropy as a metric also where config.entropy_coef is 0.
        with_logprobs: also return the log-probs ``[P]``, detached, as ``metrics["logprobs"]``: the old ones of a second
            update on the batch.

    Returns:
        (loss, metrics) as :func:`policy_loss`, the loss differentiable once in hidden, weight and bias; no other
        argument gets a gradient, a tensor of temperatures neither.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: a second backward through the same loss.
    """
    head_arguments = HeadArguments(
        hidden,
        weight,
        targets,
        rows,
        bias,
        temperature,
        softcap,
        logit_scale,
        mask,
        sampling_support,
        logits_dtype,
        workspace_bytes,
        process_group,
        batch_invariant,
    )
    of_pairs = config, old_logprobs, advantages, cu_seqlens, mask, ref_logprobs, sampler_logprobs
    streams = supervised_weights, supervised_normalizer, kl_weights, kl_normalizer
    loss_arguments = LossArguments(*of_pairs, branch, normalizer, per_token, sequence_group, *streams)
    return _linear_policy_loss_of(head_arguments, loss_arguments, with_entropy, with_logprobs)


def _linear_policy_loss_of(
    head_arguments: HeadArguments, loss_arguments: LossArguments, with_entropy: bool, with_logprobs: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    hidden, targets = head_arguments.hidden, head_arguments.targets
    with_entropy, with_logprobs = check_flag("with_entropy", with_entropy), check_flag("with_logprobs", with_logprobs)
    of_loss = loss_arguments._replace(mask=None, sequence_group=None)._asdict() | {"with_entropy": with_entropy}
    head = check_head(head_arguments, "linear_policy_loss", **of_loss)
    logprobs = hidden.new_empty((), dtype=accumulator(hidden)).expand(targets.shape)  # as they will be
    loss_arguments = check_loss(logprobs, logprobs, loss_arguments, in_head=True)
    of_streams = loss_arguments.supervised_weights, loss_arguments.kl_weights
    if any(weights is not None for weights in of_streams):  # which have pairs of their own
        head_arguments = head_arguments._replace(mask=joined(loss_arguments.mask, *of_streams))
        head = check_head(head_arguments, "linear_policy_loss", **of_loss)
    if _backends.wants_reference("head", hidden):
        arguments = reference_arguments(head_arguments, head) | loss_arguments._asdict()
        return _backends.reference().linear_policy_loss(
            **arguments, with_entropy=with_entropy, with_logprobs=with_logprobs
        )
    if loss_arguments.config.entropy_coef != 0:  # no |=, which torch 2.10 makes a graph of that is no Python
        with_entropy = True
    passes = _one_pass if _needs_one_pass(loss_arguments) else _two_passes
    loss, metrics, logprobs = passes(head_arguments, head, loss_arguments, with_entropy)
    return loss, metrics | ({"logprobs": logprobs} if with_logprobs else {})


def _needs_one_pass(arguments: LossArguments) -> bool:
    """Whether the gradients can be formed with the logits: wanted, and a token's needs no other token's log-prob."""
    if arguments.old_logprobs is None and arguments.config.sampler_correction == "sequence_mask":
        return False  # which rollouts remain is said by all of their log-probs
    return arguments.config.is_token_level and torch.is_grad_enabled()


def _two_passes(
    head_arguments: HeadArguments, head: Head, loss_arguments: LossArguments, with_entropy: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The log-probs, then their loss."""
    stats = checked_token_stats(head_arguments, head, ("entropy",) if with_entropy else ())
    loss, metrics = checked_policy_loss(stats.logprobs, stats.entropy, loss_arguments)
    return loss, metrics, stats.logprobs.detach()


def _one_pass(
    head_arguments: HeadArguments, head: Head, loss_arguments: LossArguments, with_entropy: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss and its gradients, formed with the logits."""
    dtype = accumulator(head_arguments.hidden)
    loss_arguments = loss_arguments.laid_out(dtype)
    split = loss_arguments.sequence_group is not None
    if split:
        like = loss_arguments.cu_seqlens.new_empty((), dtype=dtype).expand(head.targets.shape)
        loss_arguments = weighted_parts(loss_arguments, like)
    else:
        loss_arguments = read_branch(loss_arguments, dtype)
    inputs = loss_arguments.inputs()
    if inputs.supervised_weights is None and inputs.kl_weights is None:
        inputs = inputs._replace(mask=None)  # a graph takes no tensor twice, and the head has it
    others = (*head[3:], *inputs, int(with_entropy))
    loss, metrics, logprobs = applied(_LinearPolicyLoss, *head[:3], others)
    result = loss, dict(zip(metric_names(inputs.supervised_weights), metrics.unbind(), strict=True))
    return *(over_ranks(result, loss_arguments, logprobs) if split else result), logprobs
