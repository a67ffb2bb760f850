"""The likeliest tokens of a policy straight from hidden states: the logits [T, V] never exist.

A row keeps the k largest logits it has met, and of all others the maximum and sum_j exp((z_j - maximum) / temperature):
what a tile of logits displaces joins the others. So the mass that the k leave is a sum of its own, not 1 minus theirs.

    d log p_j / d z_i = (1[i = j] - p_i) / temperature
    d tail / d z_i    = (1[i is none of the k] q_i - p_i) / temperature,    q = p / (mass of the others)

The backward computes tiles a second time, and takes them through the gradient of :func:`linear_logprobs` with the k
tokens, and the targets, as the targets of their row (8 P H V FLOP in all).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import check_count, check_shape, check_tensor, describe
from trajkern._dtypes import INTEGERS
from trajkern._results import TopK
from trajkern._tiles.arguments import Head
from trajkern._tiles.pairs import repeated
from trajkern.ops._autograd import applied, differentiable_once, keep, kept
from trajkern.ops._head_arguments import HeadArguments, check_head, check_projection, reference_arguments
from trajkern.ops._library import define, recorded
from trajkern.ops.head import HEAD, grads_fake


def _fake(*args):
    head, (k, each, with_targets) = Head.split(args)
    new, dtype, count = head.hidden.new_empty, head.accumulator, head.targets.shape[0] // each
    found = [new((count, k), dtype=dtype), new((count, k), dtype=torch.int64), new(count, dtype=dtype)]
    found.append(new((head.hidden.shape[0], 2), dtype=dtype))
    return found + ([new(head.targets.shape, dtype=dtype)] if with_targets else [])


# ``each``: pairs a result, which follow each other. -> [log-probs, ids, tail, norm = (max z, sum_j exp u_j without the
#     maximum's 1) of the others of a row, with_targets: the pairs' log-probs]
_linear_topk = define("topk", f"linear_topk({HEAD}, int k, int each, bool with_targets) -> Tensor[]", _fake)
_linear_topk_backward = define(
    "topk",
    f"linear_topk_backward({HEAD}, int each, Tensor logprobs, Tensor ids, Tensor tail, Tensor norm,"
    " Tensor? target_logprobs, Tensor? grad_logprobs, Tensor? grad_tail, Tensor? grad_target_logprobs, bool[] needs)"
    " -> Tensor[]",
    grads_fake,
)


class _LinearTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, others, k, each, with_targets):
        head = Head(hidden, weight, bias, *others)
        logprobs, ids, tail, norm, *of_targets = _linear_topk(*head, k, each, with_targets)
        keep(ctx, *head.tensors(), logprobs, ids, tail, norm, of_targets[0] if of_targets else None)
        ctx.numbers, ctx.each = head.numbers(), each
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return logprobs, ids, tail, *of_targets

    @staticmethod
    @differentiable_once("linear_topk")
    def backward(ctx: Any, grad_logprobs, _, grad_tail, grad_target_logprobs=None):
        none = (None,) * 7
        upstream = grad_logprobs, grad_tail, grad_target_logprobs
        if all(g is None for g in upstream):
            return none
        *head, logprobs, ids, tail, norm, of_targets = kept(ctx)
        saved = ctx.each, logprobs, ids, tail, norm, of_targets
        given = [None if g is None else g.contiguous() for g in upstream]
        needs = ctx.needs_input_grad[:3]
        grads = iter(_linear_topk_backward(*head, *ctx.numbers, *saved, *given, [*needs]))
        return *(next(grads) if need else None for need in needs), *none[3:]


@recorded
def linear_topk(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    k: int,
    *,
    rows: Tensor | None = None,  # [P]
    targets: Tensor | None = None,  # [P] or [P, M]
    # as in linear_logprobs
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,  # [T]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,  # [P]
    workspace_bytes: int | None = None,
    process_group: Any = None,
    batch_invariant: bool = False,
) -> TopK:
    """The k likeliest tokens of softmax(z / temperature), z = softcap(logit_scale (h w^T + bias)), and their log-probs.

    What distils on policy needs of the student: its own likeliest tokens, at which a teacher is then asked
    (``linear_logprobs`` with these ids as k targets a row), and :func:`topk_divergence` of both. ``targets`` are more
    tokens to score from the same logits: what was sampled, or the teacher's likeliest.

    Args:
        hidden, weight: as in :func:`linear_logprobs`.
        k: an int of 1 to V; with ``process_group`` to the whole vocabulary, and a shard may have fewer tokens.
        rows: int64 or int32 ``[P]``, the hidden states that are asked; one that is named twice is computed once. None:
            every one, and P = T.
        targets: int64 or int32 ``[P]`` or ``[P, M]``: one token, or M, of each row. One outside [0, V) on an unmasked
            row is a ValueError on the CPU; on a GPU its log-prob is NaN, and nothing else of that row.
        bias, temperature, softcap, logit_scale, process_group, batch_invariant: as in :func:`linear_logprobs`.
        mask: bool ``[P]``; a False row is not computed, gives zeros (ids of 0, too) and has gradient 0.
        workspace_bytes: as in :func:`linear_logprobs`.

    Returns:
        :class:`TopK`: ``logprobs [P, k]``, the likeliest first; ``ids [P, k]``, int64, of equal logits the lower id
        first; ``tail [P]``, the log of the mass of all other tokens, which keeps its precision where it is tiny and is
        -inf where it is 0 (k = V); ``target_logprobs`` of the shape of ``targets``, None without them. Float32 (float64
        for float64 inputs); all but the ids are differentiable once, in hidden, weight and bias; the choice of the
        tokens is not, and a tail of -inf has gradient 0. A row with a NaN or an infinite logit is NaN, and its ids say
        nothing; so is on a GPU a row that does not exist.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Sources: top-k distillation on policy as in GKD (arXiv:2306.13649) with a truncated support; the tokens are chosen
    exactly, by a running selection over tiles of the vocabulary.
    """
    check_projection(hidden, weight, bias)
    count = _check_rows(hidden, rows, targets, mask)
    each = targets.shape[1] if targets is not None and targets.ndim == 2 else 1
    of_pairs = _pairs(hidden, rows, targets, mask, count, each)
    arguments = HeadArguments(
        hidden,
        weight,
        *of_pairs[:2],
        bias,
        temperature,
        softcap,
        logit_scale,
        of_pairs[2],
        workspace_bytes=workspace_bytes,
        process_group=process_group,
        batch_invariant=batch_invariant,
    )
    head = check_head(arguments, "linear_topk", k=k, **{"second size of targets": each})
    k = _check_k(k, head)
    if _backends.wants_reference("topk", hidden):
        named = reference_arguments(arguments, head) | {"rows": rows, "targets": targets, "mask": mask}
        return _backends.reference().linear_topk(**named, k=k)
    logprobs, ids, tail, *of_targets = applied(_LinearTopK, *head[:3], head[3:], k, each, targets is not None)
    return TopK(logprobs, ids, tail, None if targets is None else of_targets[0].view(targets.shape))


def _check_rows(hidden: Tensor, rows: Tensor | None, targets: Tensor | None, mask: Tensor | None) -> int:
    """Raises, or returns the number of results."""
    device, count = hidden.device, hidden.shape[0]
    if rows is not None:
        check_tensor("rows", rows, dtypes=INTEGERS, ndim=1, device=device)
        count = rows.shape[0]
    if targets is not None:
        check_tensor("targets", targets, dtypes=INTEGERS, device=device)
        if targets.ndim not in (1, 2) or targets.shape[0] != count or 0 in targets.shape[1:]:
            shape = f"[{count}] or [{count}, M] with M at least 1, the tokens of each row"
            raise ValueError(f"targets must have shape {shape}; got {describe(targets)}")
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), device=device)
        check_shape("mask", mask, (count,), "one flag a row that is asked")
    return count


def _pairs(
    hidden: Tensor, rows: Tensor | None, targets: Tensor | None, mask: Tensor | None, count: int, each: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(targets, rows, mask) of ``each`` pairs a result; token 0 stands for a target where there is none."""
    if targets is None:
        return hidden.new_zeros(count, dtype=torch.int64), rows, mask
    if each == 1:
        return targets.reshape(count), rows, mask
    rows = torch.arange(count, device=hidden.device) if rows is None else rows
    return targets.reshape(-1), repeated(rows, each), None if mask is None else repeated(mask, each)


def _check_k(k: int, head: Head) -> int:
    """Raises, or returns k; of a vocabulary that is spread over ranks the launcher knows the size."""
    k, vocabulary = check_count("k", k), head.weight.shape[0]
    if k < 1 or k > vocabulary and not head.group:
        raise ValueError(f"k must be 1 to {vocabulary}, the size of the vocabulary; got {k}")
    return k
