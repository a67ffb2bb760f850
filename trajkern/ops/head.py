"""Log-probs and softmax statistics straight from hidden states: the logits [T, V] never exist.

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

from trajkern import _backends
from trajkern._checks import check_names, readable
from trajkern._results import TokenStats
from trajkern._tiles.arguments import Head
from trajkern.ops._autograd import applied, differentiable_once, keep, kept
from trajkern.ops._head_arguments import HeadArguments, check_head, reference_arguments
from trajkern.ops._library import define, recorded

OUTPUTS = ("entropy", "sum_sq_probs", "is_top1", "mean_logit")  # bit i of the ops' ``outputs``

HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? rows, Tensor? mask, Tensor? temperatures,"
    " Tensor? support_ids, Tensor? support_offsets, float[] scales, int[] options, str group"
)


def _stats_fake(*args):
    head, (outputs, unit) = Head.split(args)
    new, dtype, shape = head.hidden.new_empty, head.accumulator, head.targets.shape
    wanted = [new(shape, dtype=torch.bool if name == "is_top1" else dtype) for name in _named(outputs)]
    unit_grad = [new(head.hidden.shape, dtype=dtype)] if unit else []
    return [new(shape, dtype=dtype), new((head.keys, 2), dtype=dtype), *wanted, *unit_grad]


def _named(outputs: int) -> list[str]:
    return [name for bit, name in enumerate(OUTPUTS) if outputs >> bit & 1]


def grads_fake(*args):
    head, (*_, needs) = Head.split(args)
    shapes = (head.hidden.shape, head.weight.shape, head.weight.shape[:1])
    return [head.hidden.new_empty(shape) for need, shape in zip(needs, shapes, strict=True) if need]


# -> [logprobs, norm = (max z, sum_j exp u_j without the maximum's 1) a row, or a pair
#     with a support, the outputs, with ``unit`` d logprobs / d hidden]
_linear_token_stats = define("head", f"linear_token_stats({HEAD}, int outputs, bool unit) -> Tensor[]", _stats_fake)
_linear_token_stats_backward = define(
    "head",
    f"linear_token_stats_backward({HEAD}, Tensor grad_logprobs, Tensor? grad_entropy, Tensor logprobs, Tensor norm,"
    " Tensor? entropy, bool[] needs) -> Tensor[]",
    grads_fake,
)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, others, outputs):
        head = Head(hidden, weight, bias, *others)
        frozen = ctx.needs_input_grad[:3] == (True, False, False) and not outputs & 1
        ctx.unit = frozen and _one_target_a_row(head.rows, head.hidden.shape[0])
        logprobs, norm, *rest = _linear_token_stats(*head, outputs, ctx.unit)
        if ctx.unit:
            *rest, unit = rest
            keep(ctx, unit, head.rows)
        else:
            keep(ctx, *head.tensors(), logprobs, norm, rest[0] if outputs & 1 else None)
        ctx.numbers, ctx.dtype = head.numbers(), head.hidden.dtype
        ctx.mark_non_differentiable(*rest[outputs & 1 :])
        ctx.set_materialize_grads(False)
        return logprobs, *rest

    @staticmethod
    @differentiable_once("linear_logprobs", "linear_token_stats")
    def backward(ctx: Any, grad_logprobs, *grad_rest):
        none = (None,) * 5
        if ctx.unit:
            unit, rows = kept(ctx)
            if grad_logprobs is None:
                return none
            g = grad_logprobs if rows is None else unit.new_zeros(unit.shape[0]).index_put((rows,), grad_logprobs)
            return (g[:, None] * unit).to(ctx.dtype), *none[1:]
        *tensors, logprobs, norm, entropy = kept(ctx)
        grad_entropy = None if entropy is None else grad_rest[0]
        if grad_logprobs is None and grad_entropy is None:
            return none
        g = torch.zeros_like(logprobs) if grad_logprobs is None else grad_logprobs.contiguous()
        h = None if grad_entropy is None else grad_entropy.contiguous()
        needs = ctx.needs_input_grad[:3]
        saved = (g, h, logprobs, norm, None if h is None else entropy)
        grads = iter(_linear_token_stats_backward(*tensors, *ctx.numbers, *saved, [*needs]))
        return *(next(grads) if need else None for need in needs), *none[3:]


def _one_target_a_row(rows: Tensor | None, tokens: int) -> bool:
    """Where that is known without a synchronisation. A masked pair may name a row that is not there."""
    if rows is None:
        return True
    return readable(rows) and bool(((rows >= 0) & (rows < tokens)).all()) and rows.unique().numel() == rows.numel()


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
    batch_invariant: bool = False,
) -> Tensor:
    """Log-probs of the targets: log softmax(z / temperature)[target], z = softcap(logit_scale (h w^T + bias)).

    Args:
        hidden: float32, bfloat16, float16 or float64 (CPU) ``[T, H]``; its products keep this dtype under autocast.
        weight: ``[V, H]`` of the same dtype; with ``process_group`` this rank's rows of it.
        targets: int64 or int32 ``[P]``. One outside [0, V) on an unmasked pair is a ValueError on the CPU; on a GPU
            that pair's result is NaN.
        rows: int64 or int32 ``[P]``, the hidden state that predicts each target; several targets may share one, and
            then share its log-sum-exp. None: target i has row i, and P = T. Rows that no unmasked pair names are not
            computed (on a GPU, where counting would wait, at most min(T, P) rows are).
        bias: ``[V]`` of the same dtype.
        temperature: a positive number that float32 and its reciprocals hold (float64's for float64 inputs), or such
            floats ``[T]``, or without dimensions; checked on the CPU, elsewhere an illegal one gives NaN.
            Where what reaches the backward, divided by it, overflows, the row's gradient is inf or NaN.
        softcap: logits are softcap * tanh(logits / softcap); a number in [2^-100, 2^100], and at most 2^100 logit_scale
            (of 2^960 for float64 inputs).
        logit_scale: multiplies the logits before the softcap.
        mask: bool ``[P]``; a False pair is not computed, gives 0 and has gradient 0.
        sampling_support: (ids ``[E]``, offsets ``[P+1]``), int64: the softmax of pair i runs over the tokens
            ids[offsets[i]:offsets[i+1]] only, the top-k or top-p set it was sampled from, which must hold its target.
        logits_dtype: float32 keeps 32 bits between the product and the softmax (float64 for float64 inputs); the
            inputs' own 16-bit dtype rounds the logits to it, as a plain ``nn.Linear`` does, and again after the bias,
            the scale and the softcap, and halves the workspace.
        workspace_bytes: bound of the memory for logits, at least one row of them. None: 64 MiB on a CPU and 256 MiB on
            a GPU, and where d weight is wanted at least 4 V H, see :func:`linear_policy_loss`. The bits change only
            where the number of rows that fit does.
        process_group: of torch.distributed, whose ranks hold the vocabulary's rows in order, in shards of any size.
            Every rank must make the call with the same hidden states; O(T) numbers travel, and d hidden. The sizes of
            the shards are exchanged first, which waits for the GPU.
        batch_invariant: whether a row's results and its d hidden have the same bits whatever other rows are in the call
            and wherever it stands (on one machine, with one number of threads). Every block then has 64 rows on a CPU
            and 256 on a GPU, the last one filled up, so that all products have the same shape; a call takes longer, and
            d weight keeps its sum over blocks in float32.

    Returns:
        log p ``[P]``, float32 (float64 for float64 inputs), differentiable once in hidden, weight and bias, and in no
        other argument, a tensor of temperatures neither; with only hidden requiring a gradient, it is formed in the
        forward. A row with a NaN or an infinite logit is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    head = HeadArguments(
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
    return checked_token_stats(head, check_head(head, "linear_logprobs"), ()).logprobs


@recorded
def linear_token_stats(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [P]
    *,
    outputs: Sequence[str] = ("entropy",),
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
) -> TokenStats:
    """Log-probs and, from the same logits, the other statistics of p.

    Args:
        outputs: any of "entropy" (nats, differentiable), "sum_sq_probs", "is_top1" and "mean_logit" (over the whole
            vocabulary, of the logits divided by the temperature); the last three without gradient.
        hidden, weight, targets and all others: as in :func:`linear_logprobs`.

    Returns:
        :class:`TokenStats` of ``[P]``; what was not asked for is None. Masked pairs are 0 and False.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    outputs = check_names("outputs", outputs, OUTPUTS)
    head = HeadArguments(
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
    return checked_token_stats(head, check_head(head, "linear_token_stats", outputs=sorted(set(outputs))), outputs)


def checked_token_stats(arguments: HeadArguments, head: Head, outputs: Sequence[str]) -> TokenStats:
    """:func:`linear_token_stats` of checked arguments, and ``head``, which is what the kernels read of them."""
    if _backends.wants_reference("head", head.hidden):
        return _backends.reference().linear_token_stats(**reference_arguments(arguments, head), outputs=outputs)
    bits = sum(1 << OUTPUTS.index(name) for name in set(outputs))
    logprobs, *statistics = applied(_LinearTokenStats, *head[:3], head[3:], bits)
    return TokenStats(logprobs, **dict(zip(_named(bits), statistics, strict=True)))
