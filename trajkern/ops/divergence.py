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

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import (
    check_count,
    check_flag,
    check_number,
    check_shape,
    check_tensor,
    describe,
    laid_out,
    readable,
)
from trajkern._dtypes import FLOATS, INTEGERS, accumulator
from trajkern._tiles.arguments import Head
from trajkern._tiles.tiles import FIXED_ROWS, WORKSPACE
from trajkern.ops._autograd import applied, differentiable_once, keep, kept
from trajkern.ops._head_arguments import check_logit_scales, check_projection, checked_workspace, of_aligned_width
from trajkern.ops._library import define, recorded
from trajkern.ops.head import HEAD, grads_fake

_ARGUMENTS = f"{HEAD}, {re.sub(r'(?<= )(?=[a-z_]+(,|$))', 'teacher_', HEAD)}, float beta, int? vocabulary"


def _fake(*args):
    student, _ = Head.split(args)
    new, tokens = student.hidden.new_empty, student.hidden.shape[0]
    saved = torch.float64 if student.hidden.device.type == "cpu" else student.accumulator
    return [new(tokens, dtype=student.accumulator), new((tokens, 6), dtype=saved)]


# -> [divergence, saved = a row's (max z, sum_j exp u_j without the maximum's 1) of the student and of the teacher, log
#     (s / t) or log(s / m) at the largest s, and from there to its mean over s]
_linear_divergence = define("divergence", f"linear_divergence({_ARGUMENTS}) -> Tensor[]", _fake)
_linear_divergence_backward = define(
    "divergence",
    f"linear_divergence_backward({_ARGUMENTS}, Tensor grad, Tensor saved, bool[] needs) -> Tensor[]",
    grads_fake,
)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, others):
        args = hidden, weight, bias, *others
        divergence, saved = _linear_divergence(*args)
        student, rest = Head.split(args)
        teacher, ctx.options = Head.split(rest)
        keep(ctx, *student.tensors(), *teacher.tensors(), saved)
        ctx.numbers = student.numbers(), teacher.numbers()
        return divergence

    @staticmethod
    @differentiable_once("linear_divergence")
    def backward(ctx: Any, grad):
        *tensors, saved = kept(ctx)
        half = len(tensors) // 2
        heads = (*tensors[:half], *ctx.numbers[0], *tensors[half:], *ctx.numbers[1])
        needs = ctx.needs_input_grad[:3]
        grads = iter(_linear_divergence_backward(*heads, *ctx.options, grad.contiguous(), saved, [*needs]))
        return *(next(grads) if need else None for need in needs), None


@recorded
def linear_divergence(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    teacher_hidden: Tensor,  # [T, H']
    teacher_weight: Tensor,  # [V', H']
    *,
    # how each makes its logits
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,  # [V']
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    vocabulary: int | None = None,
    # what is measured, and how it is computed
    beta: float = 0.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,  # [T]
    workspace_bytes: int | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """Divergence of each token's student softmax(z / temperature) from the teacher's, both in nats and head-fused.

    Each one's logits are z = softcap(logit_scale (h w^T + bias)), as in :func:`linear_logprobs`. beta 0 is
    KL(teacher || student), beta 1 KL(student || teacher), and between lies the generalised Jensen-Shannon divergence
    beta KL(teacher || m) + (1 - beta) KL(student || m), m = (1 - beta) student + beta teacher: what GKD
    (arXiv:2306.13649) and TRL's ``generalized_jsd_loss`` call so. The mixture's divergence tends to 0 at both ends;
    divided by beta or by 1 - beta it tends to the KL that stands there.

    Args:
        hidden: float32, bfloat16, float16 or float64 (CPU) ``[T, H]``.
        weight: ``[V, H]`` of the same dtype.
        teacher_hidden: ``[T, H']`` of any of these dtypes (float64 where and only where the student is); H' may differ.
        teacher_weight: ``[V', H']`` of the teacher's dtype, the same tokens in the same order.
        bias, softcap, logit_scale: of the student's logits, as in :func:`linear_logprobs`. A bias of -inf takes a token
            out of the softmax; it adds nothing where the teacher's does the same.
        teacher_bias, teacher_softcap, teacher_logit_scale: of the teacher's.
        vocabulary: the number of leading ids that count, at most V and V'. The rows from there on are in neither
            softmax, as if both models' logits were cut off; they are not read, and their gradient is 0. None: all of V,
            which must be V'. Models whose weights are padded to unequal sizes (Qwen2.5: 151,936 and 152,064 rows) need
            it: the tokenizer's own number of ids, or the smaller V, which keeps the padding that both have.
        beta: in [0, 1], and a number that the kernel holds: not between 0 and 1.2e-38 in float32.
        temperature: a positive number, which divides both logits. The divergence is not multiplied by its square.
        mask: bool ``[T]``; a False token gives 0 and has gradient 0, and on a CPU is not computed.
        workspace_bytes: bound of the memory for both logits, at least one row of each; 64 MiB on a CPU and 256 MiB on a
            GPU if None. The bits change only where the number of rows that fit does.
        batch_invariant: whether a token's divergence and its d hidden have the same bits whatever other tokens are in
            the call and wherever it stands, as in :func:`linear_logprobs`: blocks of 64 rows on a CPU and 256 on a GPU.

    Returns:
        The divergence ``[T]``, never negative; float32 (float64 for float64 inputs). Differentiable once, in hidden,
        weight and bias; the teacher gets no gradient.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    student = _Side.checked("", hidden, weight, bias, softcap, logit_scale)
    sides = teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale
    teacher = _Side.checked("teacher_", *sides, beside=hidden)
    vocabulary = _check_vocabulary(weight, teacher_weight, vocabulary)
    beta = _checked_beta(beta, hidden)
    temperature = check_number("temperature", temperature, above=0, dtype=accumulator(hidden))
    _check_mask(mask, hidden)
    options = _check_options(student, vocabulary, workspace_bytes, batch_invariant)
    heads = student.head(mask, temperature, options), teacher.head(None, temperature, options)
    if _backends.wants_reference("divergence", hidden):
        return _backends.reference().linear_divergence(
            **student.named(""),
            **teacher.named("teacher_"),
            vocabulary=vocabulary,
            beta=beta,
            temperature=temperature,
            mask=mask,
        )
    return applied(_LinearDivergence, *heads[0][:3], (*heads[0][3:], *heads[1], beta, vocabulary))


# of the teacher, by whether the student's are float64
_TEACHERS = {True: (torch.float64,), False: tuple(x for x in FLOATS if x != torch.float64)}


class _Side(NamedTuple):
    """What one of the two models makes its logits from, by the names of the head's arguments."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    def named(self, prefix: str) -> dict[str, Any]:
        return {f"{prefix}{name}": value for name, value in self._asdict().items()}

    @classmethod
    def checked(
        cls,
        prefix: str,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        beside: Tensor | None = None,  # the student's hidden states
    ) -> _Side:
        """With Python's own numbers; or raises, under names that begin with ``prefix``."""
        if beside is None:
            check_projection(hidden, weight, bias)
        else:
            dtypes = _TEACHERS[beside.dtype == torch.float64]
            check_projection(hidden, weight, bias, prefix=prefix, dtypes=dtypes, device=beside.device)
            if hidden.shape[0] != beside.shape[0]:
                shape = f"[{beside.shape[0]}, H'], the student's tokens"
                raise ValueError(f"{prefix}hidden must have shape {shape}; got {describe(hidden)}")
        softcap, logit_scale = check_logit_scales(softcap, logit_scale, accumulator(hidden), prefix)
        return cls(hidden, weight, bias, softcap or None, logit_scale)

    def head(self, mask: Tensor | None, temperature: float, options: list[int]) -> Head:
        scales = [float(temperature), self.softcap or 0.0, self.logit_scale]
        states = of_aligned_width(self.hidden, self.weight, bool(options[2]))
        return Head.of_states(*states, self.bias, laid_out(mask, torch.bool), scales, options)


def _check_vocabulary(weight: Tensor, teacher_weight: Tensor, vocabulary: int | None) -> int | None:
    """Raises, or returns the number of ids that count."""
    sizes = weight.shape[0], teacher_weight.shape[0]
    if vocabulary is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher_weight must have the {sizes[0]} rows of weight, got {sizes[1]}; if their leading ids are the "
                f"same tokens and the rest is padding, vocabulary= says how many they are, at most {min(sizes)}"
            )
        return None
    vocabulary = check_count("vocabulary", vocabulary)
    if not 1 <= vocabulary <= min(sizes):
        raise ValueError(f"vocabulary must be 1 to {min(sizes)}, the ids that both weights have; got {vocabulary}")
    return vocabulary


def _check_options(
    student: _Side, vocabulary: int | None, workspace_bytes: int | None, batch_invariant: bool
) -> list[int]:
    """As a head's: what it keeps, half of the workspace, and whether its blocks are of one size."""
    batch_invariant = check_flag("batch_invariant", batch_invariant)
    hidden = student.hidden
    rows = FIXED_ROWS[hidden.is_cpu] if batch_invariant else 1
    least = rows * 2 * (vocabulary or student.weight.shape[0]) * accumulator(hidden).itemsize
    default = max(least, WORKSPACE[hidden.is_cpu])
    workspace = checked_workspace(default if workspace_bytes is None else workspace_bytes, least, rows, "both logits")
    return [0, workspace // 2, int(batch_invariant)]


def _checked_beta(beta: float, x: Tensor) -> float:
    return float(check_number("beta", beta, low=0, high=1, dtype=accumulator(x)))


def _check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), device=x.device)
        check_shape("mask", mask, tuple(x.shape[:1]), "one flag a token")


@recorded
def topk_divergence(
    student_logprobs: Tensor,  # [T, K]
    teacher_logprobs: Tensor,  # [T, K]
    *,
    ids: Tensor | None = None,  # [T, K]
    beta: float = 0.0,
    mask: Tensor | None = None,  # [T]
) -> Tensor:
    """The divergences of :func:`linear_divergence` over K ids and one bucket with the rest of each distribution.

    The ids of a row are the same in both arguments: the teacher's top K, stored with their log-probs, the student's are
    then ``linear_logprobs`` with K targets a row; or the student's own of :func:`linear_topk`, at which the teacher is
    asked so; or both sides' beside each other, of which ``ids`` says where they meet. The rest is 1 - sum p, its log by
    log1p; for a sum of 1 it is that of the smallest normal float64, without gradient. Plain torch on every device, in
    float64.

    Args:
        student_logprobs: float32, bfloat16, float16 or float64 ``[T, K]``, log p of each id; -inf is p = 0.
        teacher_logprobs: ``[T, K]``, any of these dtypes.
        ids: int64 or int32 ``[T, K]``, what the log-probs are of; one that a row names again is not counted again, and
            its log-probs there are not read. None: those of a row are distinct.
        beta: in [0, 1], as there.
        mask: bool ``[T]``; a False token gives 0 and has gradient 0.

    Returns:
        The divergence ``[T]``; float32 (float64 for float64 log-probs of the student), differentiable in
        student_logprobs alone. It is at most that of the whole distributions.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; on a CPU also where a row's
            probabilities add up to more than 1 beyond rounding.
    """
    check_tensor("student_logprobs", student_logprobs, dtypes=FLOATS, ndim=2)
    check_tensor("teacher_logprobs", teacher_logprobs, dtypes=FLOATS, device=student_logprobs.device)
    check_shape("teacher_logprobs", teacher_logprobs, tuple(student_logprobs.shape), "that of student_logprobs")
    if ids is not None:
        check_tensor("ids", ids, dtypes=INTEGERS, device=student_logprobs.device)
        check_shape("ids", ids, tuple(student_logprobs.shape), "that of student_logprobs")
    beta = _checked_beta(beta, student_logprobs)
    _check_mask(mask, student_logprobs)
    reference = _backends.reference()
    for name, x in (("student_logprobs", student_logprobs), ("teacher_logprobs", teacher_logprobs)):
        if readable(x):
            known = x.detach() if ids is None else reference.divergence.counted_once(x.detach(), ids)
            _check_sums(name, known, mask)
    return reference.topk_divergence(student_logprobs, teacher_logprobs, ids=ids, beta=beta, mask=mask)


def _check_sums(name: str, logprobs: Tensor, mask: Tensor | None) -> None:
    total = logprobs.double().exp().sum(1)
    bad = ~(total <= 1 + 1e-3 + 4 * torch.finfo(logprobs.dtype).eps)  # a NaN is
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(
            f"{name} must be log p of distinct ids, of sum p at most 1; it is {float(total[row]):g} in row {row}"
        )
