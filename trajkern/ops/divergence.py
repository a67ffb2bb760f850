"""How far a student's distributions are from a teacher's, token by token.

With s and t the softmaxes of the student's and the teacher's logits over the temperature, m = (1 - beta) s + beta t:

    beta 0: KL(t || s)    beta 1: KL(s || t)    between: beta KL(t || m) + (1 - beta) KL(s || m)

(the generalised Jensen-Shannon divergence in the convention of TRL's ``generalized_jsd_loss``). Its derivative in the
student's logits over the temperature is

    beta 0: s - t    beta 1: s (log(s / t) - KL(s || t))    between: (1 - beta) s (log(s / m) - KL(s || m))

and the teacher gets none. Neither head's logits [T, V] ever exist: the forward takes both in blocks of rows, the
backward computes slices of them again (2 T V (H + H') FLOP forward, 2 T V (3 H + H') backward).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trajkern import _backends
from trajkern._checks import check_number, check_shape, check_tensor, describe, laid_out, readable
from trajkern._dtypes import FLOATS, accumulator
from trajkern._tiles.tiles import WORKSPACE
from trajkern.ops._library import define, recorded

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor teacher_hidden, Tensor teacher_weight, Tensor? mask, float temperature,"
    " float beta, int workspace"
)


def _fake(hidden, *_):
    saved = torch.float64 if hidden.device.type == "cpu" else accumulator(hidden)
    return [
        hidden.new_empty(hidden.shape[0], dtype=accumulator(hidden)),
        hidden.new_empty((hidden.shape[0], 6), dtype=saved),
    ]


# -> [divergence, saved = a row's (max z, sum_j exp u_j without the maximum's 1) of the student and of the teacher, log
#     (s / t) or log(s / m) at the largest s, and from there to its mean over s]
_linear_divergence = define("divergence", f"linear_divergence({_ARGUMENTS}) -> Tensor[]", _fake)
_linear_divergence_backward = define(
    "divergence",
    f"linear_divergence_backward({_ARGUMENTS}, Tensor grad, Tensor saved, bool[] needs) -> Tensor[]",
    lambda hidden, weight, *rest: [
        x.new_empty(x.shape) for need, x in zip(rest[-1], (hidden, weight), strict=True) if need
    ],
)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args):
        divergence, saved = _linear_divergence(*args)
        ctx.save_for_backward(*args[:5], saved)
        ctx.options = args[5:]
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        *tensors, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        grads = iter(_linear_divergence_backward(*tensors, *ctx.options, grad.contiguous(), saved, [*needs]))
        return *(next(grads) if need else None for need in needs), *(None,) * 6


@recorded
def linear_divergence(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [T, H']
    teacher_weight: Tensor,  # [V, H']
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,  # [T]
    workspace_bytes: int | None = None,
) -> Tensor:
    """Divergence of each token's student softmax(h w^T / temperature) from the teacher's, both in nats and head-fused.

    beta 0 is KL(teacher || student), beta 1 KL(student || teacher), and between lies the generalised Jensen-Shannon
    divergence beta KL(teacher || m) + (1 - beta) KL(student || m), m = (1 - beta) student + beta teacher: what
    GKD (arXiv:2306.13649) and TRL's ``generalized_jsd_loss`` call so. The mixture's divergence tends to 0 at both ends;
    divided by beta or by 1 - beta it tends to the KL that stands there.

    Args:
        hidden: float32, bfloat16, float16 or float64 (CPU) ``[T, H]``.
        weight: ``[V, H]`` of the same dtype.
        teacher_hidden: ``[T, H']`` of any of these dtypes (float64 where and only where the student is); H' may differ.
        teacher_weight: ``[V, H']`` of the teacher's dtype, the same vocabulary.
        beta: in [0, 1].
        temperature: a positive number, which divides both logits. The divergence is not multiplied by its square.
        mask: bool ``[T]``; a False token gives 0 and has gradient 0, and on a CPU is not computed.
        workspace_bytes: bound of the memory for both logits, at least one row of each; 64 MiB on a CPU and 256 MiB on a
            GPU if None. The bits change only where the number of rows that fit does.

    Returns:
        The divergence ``[T]``, never negative; float32 (float64 for float64 inputs). Differentiable once, in hidden and
        weight; the teacher gets no gradient.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    arguments = _check(hidden, weight, teacher_hidden, teacher_weight, mask, temperature, beta, workspace_bytes)
    if _backends.wants_reference("divergence", hidden):
        return _backends.reference().linear_divergence(
            hidden, weight, teacher_hidden, teacher_weight, beta=beta, temperature=temperature, mask=mask
        )
    return _LinearDivergence.apply(*arguments)


def _check(hidden, weight, teacher_hidden, teacher_weight, mask, temperature, beta, workspace_bytes):
    check_tensor("hidden", hidden, dtypes=FLOATS, ndim=2)
    device, tokens = hidden.device, hidden.shape[0]
    check_tensor("weight", weight, dtypes=(hidden.dtype,), ndim=2, device=device)
    if weight.shape[1] != hidden.shape[1] or 0 in weight.shape:
        raise ValueError(f"weight must have shape [V, {hidden.shape[1]}] with V at least 1; got {describe(weight)}")
    dtypes = tuple(x for x in FLOATS if (x == torch.float64) == (hidden.dtype == torch.float64))
    check_tensor("teacher_hidden", teacher_hidden, dtypes=dtypes, ndim=2, device=device)
    if teacher_hidden.shape[0] != tokens or teacher_hidden.shape[1] == 0:
        shape = f"[{tokens}, H'] with H' at least 1"
        raise ValueError(f"teacher_hidden must have shape {shape}; got {describe(teacher_hidden)}")
    check_tensor("teacher_weight", teacher_weight, dtypes=(teacher_hidden.dtype,), device=device)
    expected = (weight.shape[0], teacher_hidden.shape[1])
    check_shape("teacher_weight", teacher_weight, expected, "the student's vocabulary, the teacher's H")
    _check_beta(beta)
    check_number("temperature", temperature, above=0)
    _check_mask(mask, hidden)
    row = 2 * weight.shape[0] * accumulator(hidden).itemsize
    if workspace_bytes is None:
        workspace_bytes = max(row, WORKSPACE[hidden.is_cpu])
    check_number("workspace_bytes", workspace_bytes)
    if workspace_bytes < row:
        raise ValueError(f"workspace_bytes must hold one row of both logits, {row} bytes; got {workspace_bytes}")
    return (
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        laid_out(mask, torch.bool),
        float(temperature),
        float(beta),
        int(workspace_bytes),
    )


def _check_beta(beta: float) -> None:
    check_number("beta", beta, low=0)
    if beta > 1:
        raise ValueError(f"beta must be at most 1, got {beta}")


def _check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), device=x.device)
        check_shape("mask", mask, tuple(x.shape[:1]), "one flag a token")


@recorded
def topk_divergence(
    student_logprobs: Tensor,  # [T, K]
    teacher_logprobs: Tensor,  # [T, K]
    *,
    beta: float = 0.0,
    mask: Tensor | None = None,  # [T]
) -> Tensor:
    """The divergences of :func:`linear_divergence` over K stored ids and one bucket with the rest of each distribution.

    The ids of a row are distinct and the same in both arguments: usually the teacher's top K, stored with their
    log-probs; the student's are ``linear_logprobs`` with K targets a row. The rest is 1 - sum p, its log by log1p; for
    a sum of 1 it is that of the smallest normal float64, without gradient. Plain torch on every device, in float64.

    Args:
        student_logprobs: float32, bfloat16, float16 or float64 ``[T, K]``, log p of each id; -inf is p = 0.
        teacher_logprobs: ``[T, K]``, any of these dtypes.
        beta: in [0, 1], as there.
        mask: bool ``[T]``; a False token gives 0 and has gradient 0.

    Returns:
        The divergence ``[T]``; float32 (float64 for float64 log-probs of the student), differentiable in
        student_logprobs. It is at most that of the whole distributions.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; on a CPU also where a row's
            probabilities add up to more than 1 beyond rounding.
    """
    check_tensor("student_logprobs", student_logprobs, dtypes=FLOATS, ndim=2)
    check_tensor("teacher_logprobs", teacher_logprobs, dtypes=FLOATS, device=student_logprobs.device)
    check_shape("teacher_logprobs", teacher_logprobs, tuple(student_logprobs.shape), "that of student_logprobs")
    _check_beta(beta)
    _check_mask(mask, student_logprobs)
    for name, x in (("student_logprobs", student_logprobs), ("teacher_logprobs", teacher_logprobs)):
        if readable(x):
            _check_sums(name, x.detach(), mask)
    return _backends.reference().topk_divergence(student_logprobs, teacher_logprobs, beta=beta, mask=mask)


def _check_sums(name: str, logprobs: Tensor, mask: Tensor | None) -> None:
    total = logprobs.double().exp().sum(1)
    bad = ~(total <= 1 + 1e-3 + 4 * torch.finfo(logprobs.dtype).eps)  # a NaN is
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(f"{name} must be log p of distinct ids, of sum p at most 1; it is {total[row]:g} in row {row}")
