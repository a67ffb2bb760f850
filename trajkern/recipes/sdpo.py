"""SDPO (arXiv 2601.20802; github lasgroup/SDPO): the policy learns from itself, shown what it did not know.

Its teacher is the policy with a solution or feedback in its prompt, of averaged or frozen weights. Defaults are the
released configuration's; its runs with rich feedback take k = 20, beta = 1 and a rate of 0.01 instead. TRL by default
takes the sampled token alone (:func:`trajkern.recipes.feedback.token_advantages`).
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from trajkern import topk_divergence
from trajkern._checks import (
    check_count,
    check_divisor,
    check_flag,
    check_number,
    check_shape,
    check_tensor,
    describe,
    readable,
    renamed,
    suggesting,
)
from trajkern._dtypes import FLOATS, INTEGERS, accumulator
from trajkern._values import check_finite
from trajkern.recipes._groups import check_ids, check_vector, pair_ids

Model = TypeVar("Model", bound=nn.Module)
LOG_RATIO = 20.0  # beyond this a log-ratio counts as this


class TopK(NamedTuple):
    """The likeliest tokens of each position, the likeliest first."""

    ids: Tensor  # [T, K] int64
    logprobs: Tensor  # [T, K]


@suggesting
def topk(logits: Tensor, k: int = 100, *, temperature: float = 1.0) -> TopK:  # [T, V]
    """The ``k`` likeliest tokens under softmax(logits / temperature), all of them if there are fewer; no gradient.

    Over whose likeliest tokens the two are compared is the caller's choice: the teacher's, as it can be stored, or the
    student's, as in the released code and in TRL, which asks the teacher about these.
    """
    check_tensor("logits", logits, dtypes=FLOATS, ndim=2)
    k = check_count("k", k, low=1)
    temperature = check_number("temperature", temperature, above=0, dtype=accumulator(logits))
    with torch.no_grad():
        values, ids = logits.topk(min(k, logits.shape[1]))
        return TopK(ids, _logprobs(logits, ids, temperature, values))


def _logprobs(logits: Tensor, ids: Tensor, temperature: float, values: Tensor | None = None) -> Tensor:
    """log p of each id, ``[T, K]``."""
    wide = accumulator(logits)
    chosen = logits.gather(1, ids) if values is None else values
    return chosen.to(wide) / temperature - (logits.to(wide) / temperature).logsumexp(1, keepdim=True)


@suggesting
def token_losses(
    student_logprobs: Tensor,  # [T, K]
    teacher_logprobs: Tensor,  # [T, K]
    *,
    beta: float = 0.5,
    tail: bool = True,
    weights: Tensor | None = None,  # [T]
    mask: Tensor | None = None,  # [T]
    logprobs: Tensor | None = None,  # [T]
    old_logprobs: Tensor | None = None,  # [T]
    max_ratio: float | None = 2.0,
) -> Tensor:
    """The loss of each token: w_t min(rho_t, max_ratio) D_t, D the divergence of student and teacher; ``[T]``.

    D is that of :func:`trajkern.topk_divergence`. rho = exp(logprobs - old_logprobs), without gradient, is the sampled
    token's ratio of the policy to what it was sampled with.

    Args:
        student_logprobs, teacher_logprobs: float ``[T, K]``, of the same K distinct ids a row (:func:`topk` and
            ``trajkern.linear_logprobs`` give them); -inf is p = 0.
        beta: in [0, 1]: 0 is KL(teacher || student), 1 the reverse, between them the generalised Jensen-Shannon
            divergence.
        tail: whether all other tokens are one more; without it both are made to sum to 1 over the K, as is right where
            these are the whole vocabulary.
        weights: float ``[T]``, finite where ``mask`` (checked on the CPU), such as those of ``Credit.divergences``.
        mask: bool ``[T]``; a False token gives 0 and has gradient 0: those outside of the loss mask, and those of a
            rollout that nothing is known to teach with.
        logprobs, old_logprobs: float ``[T]``, read where ``mask``: log p of the sampled tokens now, and when they were
            sampled.
        max_ratio: above 0; None: tokens are not weighed, and the two log-probs are not read.

    Returns:
        float32 (float64 for float64 log-probs of the student), differentiable in student_logprobs alone.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_tensor("student_logprobs", student_logprobs, dtypes=FLOATS, ndim=2)
    check_tensor("teacher_logprobs", teacher_logprobs, dtypes=FLOATS, device=student_logprobs.device)
    check_shape("teacher_logprobs", teacher_logprobs, tuple(student_logprobs.shape), "that of student_logprobs")
    dtype, (count, _) = accumulator(student_logprobs), student_logprobs.shape
    if check_flag("tail", tail):
        loss = topk_divergence(student_logprobs, teacher_logprobs, beta=beta, mask=mask)
    else:
        halves = (_halved(x, mask) for x in (student_logprobs, teacher_logprobs))
        loss = (2 * topk_divergence(*halves, beta=beta, mask=mask)).to(dtype)
    if weights is not None:
        check_vector("weights", weights, count, "one a token", loss.device, finite=False)
        if readable(weights):
            check_finite("weights", weights, where=mask)
        loss = loss * (weights if mask is None else torch.where(mask, weights, 0)).to(dtype)
    if max_ratio is None:
        return loss
    max_ratio = check_number("max_ratio", max_ratio, above=0, dtype=dtype)
    pair = {"logprobs": logprobs, "old_logprobs": old_logprobs}
    for name, x in pair.items():
        if x is None:
            raise ValueError(f"{name} must be given where max_ratio weighs tokens ({max_ratio}); None weighs none")
        check_vector(name, x, count, "one a token", loss.device, finite=False)
        if readable(x):
            check_finite(name, x, where=mask)
    assert logprobs is not None and old_logprobs is not None
    log_ratio = logprobs.detach().to(dtype) - old_logprobs.to(dtype)
    ratio = log_ratio.clamp(-LOG_RATIO, LOG_RATIO).exp().clamp(max=max_ratio)
    return loss * (ratio if mask is None else torch.where(mask, ratio, 0))


def _halved(x: Tensor, mask: Tensor | None) -> Tensor:  # [T, K]
    """Made to sum to 1/2, float64: the two tails are then alike, and the divergence is half of that of the K alone."""
    wide = x.double() if mask is None else torch.where(mask[:, None], x.double(), 0)
    return wide.log_softmax(1) - math.log(2)


@suggesting
def divergence_loss(
    logits: Tensor,  # [T, V]
    teacher: TopK | Tensor,  # of [T, K], or [T, V]
    tokens: Tensor,  # [T]
    old_logprobs: Tensor | None = None,  # [T]
    *,
    weights: Tensor | None = None,  # [T]
    mask: Tensor | None = None,  # [T]
    beta: float = 0.5,
    tail: bool = True,
    max_ratio: float | None = 2.0,
    temperature: float = 1.0,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """sum_t of :func:`token_losses` over the number of tokens that ``mask`` counts: SDPO's loss, to be minimised.

    What ``credit.divergence(where, k=k, beta=beta, max_ratio=max_ratio)`` asks a host to add to its loss, with the
    weights that ``Credit.divergences`` has for it and the host's own normaliser.

    Args:
        logits: of the student, float ``[T, V]``: row t gives token t. Where they are too large to exist, take the
            student's ``trajkern.linear_logprobs`` and :func:`token_losses`, or ``trajkern.linear_divergence``.
        teacher: its :class:`TopK` at the same temperature; or its log-probs of the whole vocabulary, float ``[T, V]``.
        tokens: int64 or int32 ``[T]``, in [0, V) where ``mask`` (checked on the CPU): what was sampled.
        old_logprobs, weights, mask, beta, tail, max_ratio: as there.
        temperature: above 0, the sampler's.
        normalizer: in place of the number of tokens, at least 1, that ``mask`` counts.

    Returns:
        A scalar, float32 (float64 for float64 logits). Differentiable in the logits alone.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_tensor("logits", logits, dtypes=FLOATS, ndim=2)
    count, vocabulary = logits.shape
    temperature = check_number("temperature", temperature, above=0, dtype=accumulator(logits))
    check_vector("tokens", tokens, count, "one a row of logits", logits.device, INTEGERS)
    if mask is not None:
        check_vector("mask", mask, count, "one flag a token", logits.device, (torch.bool,))
        tokens = torch.where(mask, tokens, 0)
    _check_places("tokens", tokens, vocabulary)
    tail = check_flag("tail", tail)
    if isinstance(teacher, TopK):
        check_tensor("teacher.ids", teacher.ids, dtypes=INTEGERS, ndim=2, device=logits.device)
        check_shape("teacher.ids", teacher.ids, (count, teacher.ids.shape[1]), "a row for each of logits")
        _check_places("teacher.ids", teacher.ids, vocabulary)
        ids, theirs = teacher.ids.long(), teacher.logprobs
        tail = tail and ids.shape[1] < vocabulary  # nothing is left, but for rounding
    else:
        check_tensor("teacher", teacher, dtypes=FLOATS, device=logits.device)
        check_shape("teacher", teacher, (count, vocabulary), "log p of every token of the vocabulary, or a TopK")
        ids, theirs, tail = torch.arange(vocabulary, device=logits.device).expand(count, -1), teacher, False
    divisor = _divisor(normalizer, mask, logits)
    both = _logprobs(logits, torch.cat((ids, tokens.long()[:, None]), 1), temperature)
    with renamed({"student_logprobs": "logits", "teacher_logprobs": "teacher", "logprobs": "logits"}):
        losses = token_losses(
            both[:, :-1],
            theirs,
            beta=beta,
            tail=tail,
            weights=weights,
            mask=mask,
            logprobs=both[:, -1].detach(),
            old_logprobs=old_logprobs,
            max_ratio=max_ratio,
        )
    return losses.sum() / divisor


def _divisor(normalizer: float | Tensor | None, mask: Tensor | None, logits: Tensor) -> float | Tensor:
    """What is given, else the number of tokens that the mask counts, at least 1."""
    if normalizer is None:
        return max(logits.shape[0], 1) if mask is None else mask.sum().clamp_min(1)
    check_divisor("normalizer", normalizer, logits.device)
    if isinstance(normalizer, Tensor):
        return normalizer.reshape(())
    return check_number("normalizer", normalizer, above=0)


def _check_places(name: str, ids: Tensor, vocabulary: int) -> None:
    if readable(ids) and bool(((ids < 0) | (ids >= vocabulary)).any()):
        found = f"{int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"{name} must lie in [0, {vocabulary}), the vocabulary; got {found}")


@suggesting
def peers(
    rewards: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    *,
    threshold: float = 0.5,
    itself: bool = False,
) -> Tensor:
    """Whose solution each rollout's teacher is shown: the first of its group with r >= threshold; int64 ``[N]``.

    -1 where there is none: such a rollout is not taught, unless by feedback, and leaves the mask.

    Args:
        rewards: float ``[N]``, finite (checked on the CPU).
        group_ids: int64 or int32 ``[N]``; equal ids share a prompt.
        threshold: of success; the released configuration's 0.5, 1.0 in its code and in TRL.
        itself: whether a success may be shown its own solution; in the released configuration it is not.
    """
    check_vector("rewards", rewards, None, "", None)
    count, device = rewards.shape[0], rewards.device
    check_ids("group_ids", group_ids, count, "one id a rollout", device)
    threshold = check_number("threshold", threshold)
    itself = check_flag("itself", itself)
    ids, place = pair_ids(group_ids), torch.arange(count, device=device)
    success = torch.where(rewards >= threshold, place, count)
    first = success.new_full((count,), count).scatter_reduce(0, ids, success, "amin")[ids]
    if not itself:
        other = torch.where(place == first, count, success)
        second = success.new_full((count,), count).scatter_reduce(0, ids, other, "amin")[ids]
        first = torch.where(first == place, second, first)
    return torch.where(first == count, -1, first)


def frozen_teacher(student: Model) -> Model:
    """A copy of the student that does not learn: a static teacher, or the beginning of :func:`update_teacher`'s."""
    _check_module("student", student)
    return copy.deepcopy(student).eval().requires_grad_(False)


@suggesting
def update_teacher(teacher: nn.Module, student: nn.Module, rate: float = 0.05) -> None:
    """teacher = (1 - rate) teacher + rate student, in place, over the parameters of the same names.

    Buffers stay the teacher's, and parameters that are no floats, as frozen ones that are quantised. In bfloat16 a
    change below a rounding is lost: a teacher in float32 follows steadily.

    Args:
        rate: in [0, 1]; 0 keeps the teacher as it is, 1 makes it the student.

    Raises:
        ValueError: the names or shapes of the parameters differ; nothing has changed then.
    """
    for name, model in (("teacher", teacher), ("student", student)):
        _check_module(name, model)
    rate = check_number("rate", rate, low=0, high=1)
    ours, theirs = (dict(x.named_parameters()) for x in (teacher, student))
    if differ := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"teacher must have the student's parameters; only one of them has {', '.join(differ[:5])}")
    for name, x in ours.items():
        if x.shape != theirs[name].shape:
            raise ValueError(f"teacher must have {name} of shape {list(theirs[name].shape)}, got {list(x.shape)}")
        if x is theirs[name]:
            raise ValueError(f"teacher must have parameters of its own; {name} is the student's")
    with torch.no_grad():
        for name, x in ours.items():
            if x.is_floating_point():
                x.lerp_(theirs[name].to(x.device, x.dtype), rate)


def _check_module(name: str, value: Any) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {describe(value)}")
