"""Log-probs, softmax statistics and the policy loss straight from hidden states: the logits [T, V] never exist.

    z = softcap * tanh(logit_scale * (h w + bias) / softcap)        p = softmax(z / temperature)

Tiles of logits are folded into each row's maximum and sums. A gradient needs tiles again: the log-probs' backward
computes them a second time (8 T H V FLOP in all); with a frozen weight d log p / d h is formed in the forward (4), and
so are the gradients of the policy loss, whose derivative in every log-prob is known as soon as the row's sums are (6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trajkern import _backends
from trajkern._checks import check_choice, describe, laid_out, readable
from trajkern._dtypes import accumulator
from trajkern._results import Branch, TokenStats
from trajkern.losses.config import PolicyLoss
from trajkern.losses.kinds import METRICS
from trajkern.ops._head_arguments import check_head
from trajkern.ops._library import define, recorded
from trajkern.ops.policy_loss import check_policy, encode, policy_loss, scaled
from trajkern.ops.tree_loss import Paths, read_branch

OUTPUTS = ("entropy", "sum_sq_probs", "is_top1", "mean_logit")  # bit i of the ops' ``outputs``

_HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? rows, Tensor? mask, Tensor? temperatures,"
    " Tensor? support_ids, Tensor? support_offsets, float[] scales, int[] options, str group"
)


def _stats_fake(hidden, weight, bias, targets, *rest):
    *_, outputs, unit = rest
    dtype, shape, keys = accumulator(hidden), targets.shape, hidden.shape[0] if rest[3] is None else targets.shape[0]
    made = [hidden.new_empty(shape, dtype=dtype), hidden.new_empty((keys, 2), dtype=dtype)]
    kinds = (dtype, dtype, torch.bool, dtype)
    made += [hidden.new_empty(shape, dtype=kind) for bit, kind in enumerate(kinds) if outputs >> bit & 1]
    return made + ([hidden.new_empty(hidden.shape, dtype=dtype)] if unit else [])


def _grads_fake(hidden, weight, needs):
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return [hidden.new_empty(shape) for need, shape in zip(needs, shapes, strict=True) if need]


# -> [logprobs, norm = (max z, sum_j exp u_j without the maximum's 1) a row, or a pair
#     with a support, the outputs, with ``unit`` d logprobs / d hidden]
_linear_token_stats = define("head", f"linear_token_stats({_HEAD}, int outputs, bool unit) -> Tensor[]", _stats_fake)
_linear_token_stats_backward = define(
    "head",
    f"linear_token_stats_backward({_HEAD}, Tensor grad_logprobs, Tensor? grad_entropy, Tensor logprobs, Tensor norm,"
    " Tensor? entropy, bool[] needs) -> Tensor[]",
    lambda hidden, weight, *rest: _grads_fake(hidden, weight, rest[-1]),
)
# -> [loss, metrics, logprobs, the gradients in hidden, weight and bias that ``needs`` asks for]
_linear_policy_loss = define(
    "head",
    f"linear_policy_loss({_HEAD}, Tensor? old_logprobs, Tensor advantages, Tensor cu_seqlens, Tensor? ref_logprobs,"
    " Tensor? sampler_logprobs, Tensor? normalizer, int[] loss_options, float[] params, int outputs, bool[] needs)"
    " -> Tensor[]",
    lambda hidden, weight, *rest: [
        hidden.new_empty((), dtype=accumulator(hidden)),
        hidden.new_empty(len(METRICS), dtype=accumulator(hidden)),
        hidden.new_empty(rest[1].shape, dtype=accumulator(hidden)),
        *_grads_fake(hidden, weight, rest[-1]),
    ],
)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden, weight, bias, targets, rows, mask, temperatures, ids, offsets, scales, options, group, outputs
    ):
        head = (hidden, weight, bias, targets, rows, mask, temperatures, ids, offsets)
        frozen = ctx.needs_input_grad[:3] == (True, False, False) and not outputs & 1
        ctx.unit = frozen and _one_target_a_row(rows)
        logprobs, norm, *rest = _linear_token_stats(*head, scales, options, group, outputs, ctx.unit)
        if ctx.unit:
            ctx.save_for_backward(rest.pop(), rows)
        else:
            ctx.save_for_backward(*head, logprobs, norm, rest[0] if outputs & 1 else None)
        ctx.rest, ctx.dtype = (scales, options, group), hidden.dtype
        ctx.mark_non_differentiable(*rest[outputs & 1 :])
        ctx.set_materialize_grads(False)
        return logprobs, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs, *grad_rest):
        if ctx.unit:
            unit, rows = ctx.saved_tensors
            if grad_logprobs is None:
                return (None,) * 13
            g = grad_logprobs if rows is None else unit.new_zeros(unit.shape[0]).index_put((rows,), grad_logprobs)
            return (g[:, None] * unit).to(ctx.dtype), *(None,) * 12
        *head, logprobs, norm, entropy = ctx.saved_tensors
        grad_entropy = None if entropy is None else grad_rest[0]
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 13
        g = torch.zeros_like(logprobs) if grad_logprobs is None else grad_logprobs.contiguous()
        h = None if grad_entropy is None else grad_entropy.contiguous()
        needs = ctx.needs_input_grad[:3]
        saved = (g, h, logprobs, norm, None if h is None else entropy)
        grads = iter(_linear_token_stats_backward(*head, *ctx.rest, *saved, [*needs]))
        return *(next(grads) if need else None for need in needs), *(None,) * 10


def _one_target_a_row(rows: Tensor | None) -> bool:
    """Where that is known without a synchronisation."""
    return rows is None or (readable(rows) and rows.unique().numel() == rows.numel())


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, *rest):
        needs = ctx.needs_input_grad[:3]
        loss, metrics, logprobs, *grads = _linear_policy_loss(hidden, weight, bias, *rest, [*needs])
        made = iter(grads)
        ctx.grads, ctx.count = [next(made) if need else None for need in needs], len(rest)
        ctx.mark_non_differentiable(metrics, logprobs)
        return loss, metrics, logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "linear_policy_loss: a second backward; the gradient was formed in the forward and scaled once"
            )
        grads, ctx.grads = ctx.grads, None
        return *(scaled(g, grad_loss) for g in grads), *(None,) * ctx.count


@recorded
def linear_logprobs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [P]
    *,
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
) -> Tensor:
    """Log-probs of the targets: log softmax(z / temperature)[target], z = softcap(logit_scale (h w^T + bias)).

    Args:
        hidden: float32, bfloat16, float16 or float64 (CPU) ``[T, H]``.
        weight: ``[V, H]`` of the same dtype; with ``process_group`` this rank's rows of it.
        targets: int64 or int32 ``[P]``. One outside [0, V) on an unmasked pair is a ValueError on the CPU; on a GPU
            that pair's result is NaN.
        rows: int64 or int32 ``[P]``, the hidden state that predicts each target; several targets may share one, and
            then share its log-sum-exp. None: target i has row i, and P = T. Rows that no unmasked pair names are not
            computed (on a GPU, where counting would wait, at most min(T, P) rows are).
        bias: ``[V]`` of the same dtype.
        temperature: a positive number, or positive floats ``[T]``.
        softcap: logits are softcap * tanh(logits / softcap).
        logit_scale: multiplies the logits before the softcap.
        mask: bool ``[P]``; a False pair is not computed, gives 0 and has gradient 0.
        sampling_support: (ids ``[E]``, offsets ``[P+1]``), int64: the softmax of pair i runs over the tokens
            ids[offsets[i]:offsets[i+1]] only, the top-k or top-p set it was sampled from, which must hold its target.
        logits_dtype: float32 keeps 32 bits between the product and the softmax (float64 for float64 inputs); the
            inputs' own 16-bit dtype rounds the logits to it, as a plain ``nn.Linear`` does, and halves the workspace.
        workspace_bytes: bound of the memory for logits, at least one row of them; 64 MiB on a CPU and 256 MiB on a GPU
            if None. The bits change only where the number of rows that fit does. A block of few rows makes slow
            products: where the vocabulary is large, four times the memory can save a tenth of the time.
        process_group: of torch.distributed, whose ranks hold the vocabulary's rows in order, in shards of any size.
            Every rank must make the call with the same hidden states; O(T) numbers travel, and d hidden. The sizes of
            the shards are exchanged first, which waits for the GPU.

    Returns:
        log p ``[P]``, float32 (float64 for float64 inputs), differentiable once in hidden, weight and bias; with only
        hidden requiring a gradient, it is formed in the forward.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    return linear_token_stats(
        hidden,
        weight,
        targets,
        outputs=(),
        rows=rows,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
        sampling_support=sampling_support,
        logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes,
        process_group=process_group,
    ).logprobs


@recorded
def linear_token_stats(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [P]
    *,
    outputs: Sequence[str] = ("entropy",),
    **head: Any,
) -> TokenStats:
    """Log-probs and, from the same logits, the other statistics of p.

    Args:
        outputs: any of "entropy" (nats, differentiable), "sum_sq_probs", "is_top1" and "mean_logit" (over the whole
            vocabulary, of the logits divided by the temperature); the last three without gradient.
        The other arguments are those of :func:`linear_logprobs`.

    Returns:
        :class:`TokenStats` of ``[P]``; what was not asked for is None. Masked pairs are 0 and False.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    bits = _output_bits(outputs)
    arguments = check_head(hidden, weight, targets, **head)
    if _backends.wants_reference("head", hidden):
        return _backends.reference().linear_token_stats(hidden, weight, targets, outputs=outputs, **head)
    logprobs, *rest = _LinearTokenStats.apply(*arguments, bits)
    made = iter(rest)
    return TokenStats(logprobs, *(next(made) if bits >> bit & 1 else None for bit in range(len(OUTPUTS))))


def _output_bits(outputs: Sequence[str]) -> int:
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        raise TypeError(f"outputs must be a sequence of names, got {describe(outputs)}")
    for name in outputs:
        check_choice("outputs", name, OUTPUTS)
    return sum(1 << OUTPUTS.index(name) for name in set(outputs))


@recorded
def linear_policy_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [P]
    old_logprobs: Tensor | None,  # [P]
    advantages: Tensor | None,  # [N] or [P]
    cu_seqlens: Tensor,  # [N+1]
    *,
    config: PolicyLoss,
    ref_logprobs: Tensor | None = None,  # [P]
    sampler_logprobs: Tensor | None = None,  # [P]
    branch: Branch | Paths | None = None,
    normalizer: float | Tensor | None = None,
    per_token: bool | None = None,
    with_entropy: bool = False,
    with_logprobs: bool = False,
    **head: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss of :func:`policy_loss` inside the head: ``policy_loss(linear_logprobs(...))`` in fewer FLOP.

    For kinds with token-level ratios the gradients are formed in the forward, a block of rows at a time, so the logits
    are computed once: 6 T H V FLOP with the backward, 4 with a frozen weight. On a CPU, pairs without a gradient
    (advantage 0 and neither KL nor entropy term) take no part in the gradients' products. Ratios per trajectory
    ("gspo", "gmpo", "luspo", "vespo", or ratio_level "sequence") and "kl_cov" and "clip_cov", which need every log-prob
    first, compute the logits twice: 8 T H V.

    Args:
        hidden, weight, targets, and ``head`` (rows, bias, temperature, softcap, logit_scale, mask, sampling_support,
            logits_dtype, workspace_bytes, process_group): as in :func:`linear_logprobs`.
        old_logprobs, ref_logprobs, sampler_logprobs, advantages, cu_seqlens, config, branch, normalizer, per_token: as
            in :func:`policy_loss`, per pair where that says per token: cu_seqlens counts pairs.
        with_entropy: compute the entropy as a metric also where config.entropy_coef is 0.
        with_logprobs: also return the log-probs ``[P]``, detached, as ``metrics["logprobs"]``: the old ones of a second
            update on the batch.

    Returns:
        (loss, metrics) as :func:`policy_loss`, the loss differentiable once in hidden, weight and bias.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
        RuntimeError: a second backward through the same loss.
    """
    arguments = check_head(hidden, weight, targets, **head)
    mask = head.get("mask")
    like = hidden.new_empty((), dtype=accumulator(hidden)).expand(targets.shape)
    a, per_token, divisor, ref, sampler = check_policy(
        like,
        like if old_logprobs is None else old_logprobs,
        advantages,
        cu_seqlens,
        config,
        mask,
        ref_logprobs,
        sampler_logprobs,
        like,
        branch,
        normalizer,
        per_token,
    )
    if _backends.wants_reference("head", hidden):
        return _backends.reference().linear_policy_loss(
            hidden,
            weight,
            targets,
            old_logprobs,
            advantages,
            cu_seqlens,
            config=config,
            ref_logprobs=ref,
            sampler_logprobs=sampler,
            branch=branch,
            normalizer=divisor,
            per_token=per_token,
            with_entropy=with_entropy,
            with_logprobs=with_logprobs,
            **head,
        )
    with_entropy |= config.entropy_coef != 0
    needs_logprobs = isinstance(branch, Paths) and old_logprobs is None and config.sampler_correction == "sequence_mask"
    if needs_logprobs or not config.is_token_level or not torch.is_grad_enabled():
        outputs = ("entropy",) if with_entropy else ()
        stats = linear_token_stats(hidden, weight, targets, outputs=outputs, **head)
        loss, metrics = policy_loss(
            stats.logprobs,
            old_logprobs,
            advantages,
            cu_seqlens,
            config=config,
            mask=mask,
            ref_logprobs=ref_logprobs,
            sampler_logprobs=sampler_logprobs,
            entropy=stats.entropy,
            branch=branch,
            normalizer=normalizer,
            per_token=per_token,
        )
        return loss, metrics | ({"logprobs": stats.logprobs.detach()} if with_logprobs else {})
    dtype = accumulator(hidden)
    old, ref, sampler = laid_out(old_logprobs, dtype), laid_out(ref, dtype), laid_out(sampler, dtype)
    cu_seqlens, mask = laid_out(cu_seqlens, torch.int64), laid_out(mask, torch.bool)
    if branch is not None:
        a, config, divisor = read_branch(branch, config, cu_seqlens, mask, old, sampler, divisor, per_token, dtype)
    loss, values, logprobs = _LinearPolicyLoss.apply(
        *arguments,
        old,
        laid_out(a, dtype),
        cu_seqlens,
        ref,
        sampler,
        divisor,
        *encode(config, per_token),
        int(with_entropy),
    )
    metrics = dict(zip(METRICS, values.unbind(), strict=True))
    return loss, metrics | ({"logprobs": logprobs} if with_logprobs else {})
