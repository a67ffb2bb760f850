"""Evaluative and directive feedback (OpenClaw-RL, arXiv 2603.10165): votes on a turn, and what a hint would change.

With a weight of 0 for the votes, ``token_advantages`` is plain on-policy distillation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trajkern import group_advantages
from trajkern._checks import check_count, check_number, check_sequence, check_tensor, describe, readable, suggesting
from trajkern._dtypes import accumulator
from trajkern._values import check_finite
from trajkern.ops.advantage import FLOATS, INTEGERS
from trajkern.recipes._groups import (
    check_ids,
    check_order,
    check_packing,
    check_vector,
    group_sum,
    pair_ids,
    to_tokens,
    widened,
)

CONSTANT = 1e-12  # a variance up to here is none


def majority_vote(votes: Tensor) -> Tensor:  # [K, N]
    """The vote that more judges cast than any other; ``[N]`` float32 of 1, 0 or -1. A tie for the most gives 0.

    Args:
        votes: float or integer ``[K, N]``, K votes on each of N turns: 1 (good), 0 (neutral) or -1 (bad), checked on
            the CPU (elsewhere any other value counts as missing). NaN is a missing vote; all missing gives 0.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_tensor("votes", votes, dtypes=(*FLOATS, *INTEGERS), ndim=2)
    if readable(votes):
        wrong = (votes.abs() != 1) & (votes != 0) & (votes == votes)
        if bool(wrong.any()):
            k, n = wrong.nonzero()[0].tolist()
            raise ValueError(f"votes must be 1, 0, -1 or NaN (missing); it is {float(votes[k, n])} at [{k}, {n}]")
    good, neutral, bad = ((votes == vote).sum(0) for vote in (1, 0, -1))
    up = (good > neutral) & (good > bad)
    down = (bad > neutral) & (bad > good)
    return up.float() - down.float()


@suggesting
def select_hint(scores: Sequence[int | None], hints: Sequence[str | None], *, min_length: int = 10) -> str | None:
    """The hint to teach with: the longest that a judge gave with score 1, stripped, the first of equally long ones.

    Args:
        scores: 1 (the next state showed something worth knowing), -1 or 0 (it did not) or None (no verdict), one a
            judge.
        hints: what each judge would have said, or None.
        min_length: a hint of this many characters or fewer is none; the authors' is 10.

    Returns:
        None where no hint is left: such a sample has no directive term.
    """
    scores = check_sequence("scores", scores, "votes")
    hints = check_sequence("hints", hints, "texts")
    min_length = check_count("min_length", min_length, low=0)
    if len(scores) != len(hints):
        raise ValueError(f"hints must have one entry for each of the {len(scores)} scores, got {len(hints)}")
    for at, score in enumerate(scores):
        if score is not None and (type(score) is not int or score not in (1, 0, -1)):
            raise ValueError(f"scores must be 1, 0, -1 or None; it is {score!r} at index {at}")
    for hint in hints:
        if not isinstance(hint, (str, type(None))):
            raise TypeError(f"hints must be strings or None, got {describe(hint)}")
    good = [hint.strip() for score, hint in zip(scores, hints, strict=True) if score == 1 and hint is not None]
    return max((hint for hint in good if len(hint) > min_length), key=len, default=None)


@suggesting
def token_advantages(
    rewards: Tensor,  # [N]
    teacher_logprobs: Tensor,  # [T]
    old_logprobs: Tensor,  # [T]
    loss_mask: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N+1]
    *,
    reward_weight: float = 1.0,
    directive_weight: float = 1.0,
) -> Tensor:
    """A_t = reward_weight * r + directive_weight * (log p_teacher - log p_old) at scored tokens, 0 elsewhere; ``[T]``.

    Neither whitened nor clamped. The teacher is the policy itself, given the hint.

    Args:
        rewards: float ``[N]``, finite (checked on the CPU): each turn's vote.
        teacher_logprobs, old_logprobs: float ``[T]``, read where ``loss_mask`` is True and finite there (checked on the
            CPU). Both belong to the same tokens: a teacher of another length is an error, never padded. A sample
            without a hint takes its old log-probs as the teacher's.
        loss_mask: bool ``[T]``.
        cu_seqlens: int64 or int32 ``[N+1]``, the boundaries of the trajectories (checked on the CPU).
        reward_weight, directive_weight: at least 0; the authors' are 1 and 1.

    Returns:
        float32 (float64 for float64 log-probs).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("loss_mask", loss_mask, None, "", None, (torch.bool,))
    tokens, device = loss_mask.shape[0], loss_mask.device
    for name, x in (("teacher_logprobs", teacher_logprobs), ("old_logprobs", old_logprobs)):
        check_vector(name, x, tokens, "one a token, like loss_mask", device, finite=False)
        if readable(x):
            check_finite(name, x, where=loss_mask)
    count = check_packing(cu_seqlens, tokens, device)
    check_vector("rewards", rewards, count, "one a trajectory", device)
    dtype = torch.promote_types(accumulator(teacher_logprobs), accumulator(old_logprobs))
    reward_weight = check_number("reward_weight", reward_weight, low=0, dtype=dtype)
    directive_weight = check_number("directive_weight", directive_weight, low=0, dtype=dtype)
    directive = widened(teacher_logprobs) - widened(old_logprobs)
    evaluative = to_tokens(rewards.to(directive.dtype), cu_seqlens, tokens)
    return torch.where(loss_mask, reward_weight * evaluative + directive_weight * directive, 0)


def step_advantages(
    step_rewards: Tensor,  # [S]
    group: Tensor,  # [S]
    step: Tensor,  # [S]
) -> tuple[Tensor, Tensor]:
    """The advantage of each step among the steps of its group and index, and whether it is trained.

    (r - mean) / (std + 1e-6), std with ddof 0. The only step of its group and index keeps its raw reward. Steps whose
    rewards are all equal (variance up to 1e-12) are dropped; where that leaves nothing at all, those that share group
    and index with the first step stay, at 0, as in the authors' code, so that a batch is never empty.

    Args:
        step_rewards: float ``[S]``, finite (checked on the CPU): a step's mean vote plus the outcome.
        group: int64 or int32 ``[S]``; equal ids share a prompt.
        step: int64 or int32 ``[S]``, the index of each step in its trajectory, at least 0 (checked on the CPU).

    Returns:
        (advantages ``[S]`` float32, float64 for float64 rewards, computed in float64; keep bool ``[S]``). A dropped
        step has advantage 0: take it from the loss mask as well.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("step_rewards", step_rewards, None, "", None)
    count, device = step_rewards.shape[0], step_rewards.device
    check_ids("group", group, count, "one id a step", device)
    check_order("step", step, count, "one index a step", device)
    ids, r = pair_ids(group, step), step_rewards.double()
    centred = group_advantages(r, ids, scale="none", singleton="zero")
    size = group_sum(torch.ones_like(ids), ids)
    variance = group_sum(centred.square(), ids) / size
    alone = size == 1
    keep = alone | (variance > CONSTANT)
    keep = keep | (~keep.any() & (ids == ids[:1]))
    out = torch.where(alone, r, torch.where(variance > CONSTANT, centred / (variance.sqrt() + 1e-6), 0))
    return out.to(widened(step_rewards).dtype), keep
