"""Log-probs and softmax statistics of tokens, from logits.

With u_j = (z_j - max z) / temperature:  log p_j = u_j - log sum_k exp u_k. The target is left out of the sum where it
dominates, so that log p keeps its relative precision as p -> 1. The backward recomputes p from two saved numbers a row:

    d log p_t / d z_j = (delta_jt - p_j) / temperature
    d entropy / d z_j = -p_j (log p_j + entropy) / temperature
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import check_flag, check_names, check_shape, check_tensor, describe, is_fake, laid_out
from trajkern._dtypes import accumulator
from trajkern._results import TokenStats
from trajkern._values import check_targets
from trajkern.ops._autograd import applied, differentiable_once, keep, kept
from trajkern.ops._library import define, recorded
from trajkern.ops._temperature import check_temperature

OUTPUTS = ("entropy", "sum_sq_probs", "is_top1")  # bit i of the op's ``outputs``
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _stats_fake(logits, targets, temperatures, temperature, mask, outputs):
    rows, dtype = targets.shape, accumulator(logits)
    results = [logits.new_empty(rows, dtype=dtype), logits.new_empty((*rows, 2), dtype=dtype)]
    for bit, kind in ((1, dtype), (2, dtype), (4, torch.bool)):
        if outputs & bit:
            results.append(logits.new_empty(rows, dtype=kind))
    return results


# -> [logprobs, norm = (max z, log sum_j exp u_j), then what the bits of ``outputs`` ask for, in OUTPUTS' order]
_token_stats = define(
    "logprob",
    "token_stats(Tensor logits, Tensor targets, Tensor? temperatures, float temperature, Tensor? mask, int outputs)"
    " -> Tensor[]",
    _stats_fake,
)
_token_stats_backward = define(
    "logprob",
    "token_stats_backward(Tensor grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor targets,"
    " Tensor? temperatures, float temperature, Tensor? mask, Tensor logprobs, Tensor norm, Tensor? entropy) -> Tensor",
    lambda grad_logprobs, grad_entropy, logits, *rest: logits.new_empty(logits.shape),
)
_token_stats_backward_ = define(
    "logprob",
    "token_stats_backward_(Tensor grad_logprobs, Tensor? grad_entropy, Tensor(a!) logits, Tensor targets,"
    " Tensor? temperatures, float temperature, Tensor? mask, Tensor logprobs, Tensor norm, Tensor? entropy) -> ()",
    lambda *args: None,
)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, rows, outputs, inplace):
        targets, temperatures, temperature, mask = rows
        logprobs, norm, *rest = _token_stats(logits, targets, temperatures, temperature, mask, outputs)
        entropy = rest[0] if outputs & 1 else None
        keep(ctx, logits, targets, temperatures, mask, logprobs, norm, entropy)
        ctx.temperature, ctx.inplace = temperature, inplace
        if outputs & 6:
            ctx.mark_non_differentiable(*rest[outputs & 1 :])
        ctx.set_materialize_grads(False)
        return logprobs, *rest

    @staticmethod
    @differentiable_once("token_logprobs", "token_stats")
    def backward(ctx: Any, grad_logprobs, *grad_rest):
        if ctx.inplace == "spent":
            raise RuntimeError("inplace_backward: the first backward has overwritten the logits; run the forward again")
        logits, targets, temperatures, mask, logprobs, norm, entropy = kept(ctx)
        grad_entropy = None if entropy is None else grad_rest[0]
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 4
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(logprobs)
        args = (logits, targets, temperatures, ctx.temperature, mask, logprobs, norm, entropy)
        if not ctx.inplace:
            return _token_stats_backward(grad_logprobs, grad_entropy, *args), None, None, None
        ctx.inplace = "spent"
        _token_stats_backward_(grad_logprobs, grad_entropy, *args)
        return logits.detach(), None, None, None


@recorded
def token_logprobs(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,  # [...]
    inplace_backward: bool = False,
) -> Tensor:
    """Log-probs of the targets: log softmax(logits / temperature)[target].

    Args:
        logits: float32, bfloat16, float16 or float64 (CPU), any leading shape, any strides; ``[..., V]``. Read once.
        targets: int64 or int32, the leading shape. A target outside [0, V) on an unmasked row is a ValueError on the
            CPU; on a GPU, where it cannot be checked without a synchronisation, that row's result is NaN.
        temperature: a positive number that float32 and its reciprocals hold (float64's for float64 logits), or such
            floats of the leading shape, or without dimensions; checked on the CPU, elsewhere an illegal one gives NaN.
            Where what reaches the backward, divided by it, overflows, the row's gradient is inf or NaN.
        mask: bool of the leading shape; a False row is not read, gives 0 and has gradient 0.
        inplace_backward: write the gradient over the logits' memory and return it, so that no second tensor of that
            size exists. The logits are lost: a second backward raises, and so does the backward of any other op that
            saved them and comes later. As for torch's own in-place ops the logits must not share memory among
            themselves, nor be a leaf that requires a gradient or a view of one. Under ``torch.compile`` a new tensor is
            made.

    Returns:
        log p, the leading shape; float32 (float64 for float64 logits). Differentiable once, in the logits; no other
        argument gets a gradient, a tensor of temperatures neither. A row with a NaN or an infinite logit, or of -inf
        alone, is NaN, as for ``torch.log_softmax``.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    return _stats(logits, targets, (), temperature, mask, inplace_backward)[0]


@recorded
def token_stats(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    *,
    outputs: Sequence[str] = ("entropy",),
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,  # [...]
    inplace_backward: bool = False,
) -> TokenStats:
    """Log-probs and, from the same read of the logits, the other statistics of p = softmax(logits / temperature).

    Args:
        outputs: any of "entropy" (-sum_j p_j log p_j, nats, differentiable), "sum_sq_probs" (sum_j p_j^2, no gradient)
            and "is_top1" (bool: no other logit is larger than the target's; a tie counts).
        logits, targets and all others: as in :func:`token_logprobs`.

    Returns:
        :class:`TokenStats` of the leading shape; what was not asked for is None. Masked rows are 0 and False.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    outputs = check_names("outputs", outputs, OUTPUTS)
    results = iter(_stats(logits, targets, outputs, temperature, mask, inplace_backward))
    return TokenStats(next(results), *(next(results) if name in outputs else None for name in OUTPUTS))


def _stats(logits, targets, outputs, temperature, mask, inplace_backward) -> Sequence[Tensor]:
    """Log p, then the outputs in their order."""
    temperatures, temperature = _check(logits, targets, temperature, mask)
    inplace_backward = check_flag("inplace_backward", inplace_backward)
    if _backends.wants_reference("logprob", logits):
        if not torch.compiler.is_compiling() and not is_fake(targets):
            check_targets(targets, logits.shape[-1], mask)
        each = temperature if temperatures is None else temperatures
        stats = _backends.reference().token_stats(logits, targets, outputs=outputs, temperature=each, mask=mask)
        return [x for x in stats if x is not None]
    inplace = inplace_backward and not torch.compiler.is_compiling()
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        _check_overwritten(logits)
    bits = sum(1 << i for i, name in enumerate(OUTPUTS) if name in outputs) if outputs else 0
    rows = laid_out(targets, torch.int64), temperatures, temperature, laid_out(mask, torch.bool)
    return applied(_TokenStats, logits, rows, bits, inplace)


def _check(logits, targets, temperature, mask) -> tuple[Tensor | None, float]:
    """The temperatures of the rows, or the one of all."""
    check_tensor("logits", logits, dtypes=LOGITS_DTYPES)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have a last dimension V of at least 1; got {describe(logits)}")
    rows = tuple(logits.shape[:-1])
    check_tensor("targets", targets, dtypes=(torch.int64, torch.int32), device=logits.device)
    check_shape("targets", targets, rows, "the leading shape of logits")
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), device=logits.device)
        check_shape("mask", mask, rows, "the leading shape of logits")
    return check_temperature(temperature, logits, rows, "the leading shape of logits")


def _check_overwritten(logits: Tensor) -> None:
    """Raises where torch would not let an in-place op write into the logits."""
    if _may_overlap(logits):
        raise ValueError(
            "logits must not overlap themselves in memory where inplace_backward is True; "
            f"got {describe(logits)} with strides {logits.stride()}"
        )
    base = logits if logits._base is None else logits._base
    if logits.is_leaf or base.is_leaf and base.requires_grad:
        raise ValueError(
            "logits must not be a leaf that requires a gradient, or a view of one, where inplace_backward is True, "
            f"which would write the leaf's gradient over its values; got {describe(logits)}"
        )


def _may_overlap(x: Tensor) -> bool:
    """Whether two places of x may be one in memory: False where each stride steps over all of the smaller ones."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += (size - 1) * stride
    return False
