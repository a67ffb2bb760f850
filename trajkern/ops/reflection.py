"""DRO's reasoning reflection reward: how much better a rollout's reasoning predicts a reference answer.

The reference's tokens are packed once per rollout; position j is the same token in all K rollouts of a group. With x
the log-probs, b a baseline, and sums over the group's rollouts n or the positions j:

    m_j = mean_n x_nj        s_j = sqrt(sum_n (x_nj - m_j)^2 / (K - ddof))        S = sum_j s_j
    w_j = s_j / S, or s_j        R_n = sum_j w_j (x_nj - b_nj)        score = max_j s_j

and backward, from the gradients gR, gW, gS of rewards, weights and std and gG of the score, which the first largest
s_j receives:

    A_j = sum_n gR_n (x_nj - b_nj) + gW_nj
    ds_j = (A_j - sum_j A_j w_j) / S, or A_j, + sum_n gS_nj + gG [j largest]
    dx_nj = gR_n w_j + ds_j (x_nj - m_j) / ((K - ddof) s_j)        db_nj = -gR_n w_j

A position whose log-probs agree has s_j = 0 exactly, and a derivative of 0. The arithmetic is float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _backends
from trajkern._checks import (
    check_boundaries,
    check_choice,
    check_count,
    check_flag,
    check_shape,
    check_tensor,
    is_fake,
    laid_out,
    readable,
)
from trajkern._dtypes import FLOATS, INTEGERS, accumulator
from trajkern._results import Reflection
from trajkern._values import check_cu_seqlens, check_equal_lengths, check_squarable
from trajkern.ops._autograd import applied, differentiable_once, keep, kept
from trajkern.ops._library import define, recorded


def _fake(logprobs, cu_seqlens, order, rank, bounds, baseline, ddof, normalize, rewarded):
    weights = torch.empty_like(logprobs)
    if not rewarded:
        return [weights]
    return [logprobs.new_empty(order.shape), weights, torch.empty_like(logprobs), logprobs.new_empty(order.shape)]


# -> order: the rollouts by ascending id, those of a group in pack order; rank: the group of each, from 0 on in that
# order; bounds: group g is order[bounds[g]:bounds[g+1]], and empty from the number of groups on
_reflection_groups = define(
    "reflection",
    "reflection_groups(Tensor group_ids, Tensor cu_seqlens, SymInt tokens) -> (Tensor, Tensor, Tensor)",
    lambda ids, cu_seqlens, tokens: (torch.empty_like(ids), torch.empty_like(ids), torch.empty_like(cu_seqlens)),
)
_GROUPED = "Tensor logprobs, Tensor cu_seqlens, Tensor order, Tensor rank, Tensor bounds, Tensor? baseline"
# -> [weights], or where rewarded [rewards, weights, std, scores [N], of which the first G are the groups']
_reflection_rewards = define(
    "reflection",
    f"reflection_rewards({_GROUPED}, int ddof, bool normalize, bool rewarded) -> Tensor[]",
    _fake,
)
# -> the gradients in logprobs and baseline that are needed
_reflection_rewards_backward = define(
    "reflection",
    f"reflection_rewards_backward({_GROUPED}, Tensor? grad_rewards, Tensor? grad_weights, Tensor? grad_std,"
    " Tensor? grad_scores, int ddof, bool normalize, bool[] needs) -> Tensor[]",
    lambda logprobs, *rest: [torch.empty_like(logprobs) for need in rest[-1] if need],
)


class _Reflection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs, baseline, grouped, *options):
        ctx.set_materialize_grads(False)
        bounds, *groups = grouped
        bounds = bounds.clone() if bounds.is_cpu else bounds  # whose memory may be numpy's, and change unseen
        keep(ctx, logprobs, bounds, *groups, baseline)
        ctx.options = options
        return tuple(_reflection_rewards(logprobs, *grouped, baseline, *options))

    @staticmethod
    @differentiable_once("variance_weights", "reflection_rewards")
    def backward(ctx: Any, *grads):
        ddof, normalize, rewarded = ctx.options
        upstream = [None if g is None else g.contiguous() for g in grads]
        upstream = upstream if rewarded else [None, *upstream, None, None]
        needs = ctx.needs_input_grad[:2]
        formed = iter(_reflection_rewards_backward(*kept(ctx), *upstream, ddof, normalize, [*needs]))
        return *(next(formed) if need else None for need in needs), *(None,) * 4


@recorded
def variance_weights(
    logprobs: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    group_ids: Tensor,  # [N]
    *,
    ddof: int = 0,
    normalize: bool = True,
) -> Tensor:
    """How much a group's rollouts disagree on each token of the reference: the token's weight in their reward.

        s_j = sqrt(sum_n (x_nj - mean_n x_nj)^2 / (K - ddof))        w_j = s_j / sum_j s_j

    Arguments, errors and source as in :func:`reflection_rewards`, which also gives the rewards.

    Returns:
        ``[P]`` float32 (float64 for float64 log-probs), at least 0, the same for all rollouts of a group; with
        ``normalize`` they sum to 1 over each rollout, or are all 0 where no log-probs differ. Differentiable once.
    """
    ddof, normalize = _check(logprobs, cu_seqlens, group_ids, ddof, normalize)
    if _backends.wants_reference("reflection", logprobs):
        _check_values(logprobs, cu_seqlens, group_ids, None)
        return _backends.reference().variance_weights(logprobs, cu_seqlens, group_ids, ddof=ddof, normalize=normalize)
    return _apply(logprobs, None, cu_seqlens, group_ids, ddof, normalize, False)[0][0]


@recorded
def reflection_rewards(
    logprobs: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    group_ids: Tensor,  # [N]
    *,
    baseline: Tensor | None = None,  # [P]
    ddof: int = 0,
    normalize: bool = True,
    num_groups: int | None = None,
) -> Reflection:
    """Reasoning reflection rewards (R3): a reference answer's log-probs, weighted by how much the rollouts disagree.

        s_j = sqrt(sum_n (x_nj - mean_n x_nj)^2 / (K - ddof))        w_j = s_j / sum_j s_j
        R_n = sum_j w_j (x_nj - b_nj)

    over the K rollouts n of a group and the tokens j of their reference. Tokens that reasoning does not change weigh
    nothing; those that it does, the most.

    Args:
        logprobs: float ``[P]``, in nats, finite (checked on the CPU, where sums that overflow are an error too): log p
            of the reference answer's tokens under each rollout's reasoning, packed once per rollout.
        cu_seqlens: int64 or int32 ``[N+1]``, from 0 to P, never decreasing (checked on the CPU): rollout n scores the
            tokens ``cu_seqlens[n]:cu_seqlens[n+1]``. The rollouts of a group score the same tokens, so their lengths
            are equal. On the CPU that is checked; on a GPU a group of unequal lengths gives NaN, and nothing is read or
            written out of bounds. An empty reference gives a reward of 0.
        group_ids: int64 or int32 ``[N]``, any values in any order; equal ids are one group, of any size.
        baseline: float ``[P]``, finite (checked on the CPU): what is subtracted, in the paper the log-probs under
            masked reasoning; none is 0.
        ddof: 0 for the population's deviation, 1 for the unbiased variance; that of no more than ddof rollouts is 0.
        normalize: divide the weights by their sum. The paper asks only that they increase with s_j.
        num_groups: G, the number of distinct ids in ``group_ids`` (``PackedBatch.num_groups``). Without it G is read
            from the device, the one thing here that waits for a GPU. Another number than G is an error on the CPU; on a
            GPU, group_score is then NaN.

    Returns:
        :class:`Reflection`, float32 (float64 for float64 log-probs): rewards ``[N]``; weights and std ``[P]``, the same
        for all rollouts of a group; group_score ``[G]``, each group's largest std (0 for an empty reference), in
        ascending group id, by which whole prompts are filtered. A group of one, or one whose log-probs agree, has
        weights of exactly 0. Differentiable once, in logprobs and baseline, through all four; a std of 0 counts as
        constant.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.

    Source: DRO (arXiv 2506.13351), which leaves ddof and the normalisation open.
    """
    ddof, normalize = _check(logprobs, cu_seqlens, group_ids, ddof, normalize)
    if baseline is not None:
        check_tensor("baseline", baseline, dtypes=FLOATS, device=logprobs.device)
        check_shape("baseline", baseline, tuple(logprobs.shape), "one value a token")
    if num_groups is not None:
        num_groups = _check_num_groups(num_groups, group_ids.shape[0])
    if _backends.wants_reference("reflection", logprobs):
        _check_values(logprobs, cu_seqlens, group_ids, baseline)
        found = _backends.reference().reflection_rewards(
            logprobs, cu_seqlens, group_ids, baseline=baseline, ddof=ddof, normalize=normalize
        )
        _check_count(num_groups, found.group_score.shape[0])
        return found
    (rewards, weights, std, scores), rank = _apply(logprobs, baseline, cu_seqlens, group_ids, ddof, normalize, True)
    return Reflection(rewards, weights, std, _of_groups(scores, rank, num_groups))


def _of_groups(scores: Tensor, rank: Tensor, num_groups: int | None) -> Tensor:  # [N], [N] -> [G]
    if num_groups is not None and not readable(rank):
        return torch.where(rank[-1:] + 1 == num_groups, scores[:num_groups], torch.nan)
    if rank.is_meta or is_fake(rank):
        raise ValueError("num_groups must be given where group_ids has a shape and no values; got None")
    groups = int(rank[-1]) + 1 if rank.shape[0] else 0
    _check_count(num_groups, groups)
    return scores[:groups]


def _apply(
    logprobs: Tensor,
    baseline: Tensor | None,
    cu_seqlens: Tensor,
    group_ids: Tensor,
    ddof: int,
    normalize: bool,
    rewarded: bool,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The op's outputs, and the rank of each rollout in order."""
    x = laid_out(logprobs, accumulator(logprobs))
    bounds = laid_out(cu_seqlens, torch.int64)
    groups = _reflection_groups(laid_out(group_ids, torch.int64), bounds, x.shape[0])
    results = applied(_Reflection, x, laid_out(baseline, x.dtype), (bounds, *groups), ddof, normalize, rewarded)
    return results, groups[1]


def _check(logprobs: Tensor, cu_seqlens: Tensor, group_ids: Tensor, ddof: int, normalize: bool) -> tuple[int, bool]:
    """ddof and normalize as Python's."""
    check_tensor("logprobs", logprobs, dtypes=FLOATS, ndim=1)
    check_boundaries("cu_seqlens", cu_seqlens, logprobs.device)
    check_tensor("group_ids", group_ids, dtypes=INTEGERS, device=logprobs.device)
    check_shape("group_ids", group_ids, (cu_seqlens.shape[0] - 1,), "one id a rollout")
    return check_choice("ddof", ddof, (0, 1)), check_flag("normalize", normalize)


def _check_num_groups(num_groups: int, rollouts: int) -> int:
    num_groups = check_count("num_groups", num_groups)
    if not min(rollouts, 1) <= num_groups <= rollouts:
        raise ValueError(
            f"num_groups must lie in [{min(rollouts, 1)}, {rollouts}], the groups that so many rollouts can be; "
            f"got {num_groups}"
        )
    return num_groups


def _check_count(num_groups: int | None, groups: int) -> None:
    if num_groups is not None and num_groups != groups:
        raise ValueError(f"num_groups must be {groups}, the number of distinct ids in group_ids; got {num_groups}")


def _check_values(logprobs: Tensor, cu_seqlens: Tensor, group_ids: Tensor, baseline: Tensor | None) -> None:
    """On the reference route; the launchers check what they can read for nothing."""
    if readable(logprobs):
        check_cu_seqlens(cu_seqlens, logprobs.shape[0])
        check_equal_lengths(cu_seqlens, group_ids)
        check_squarable("logprobs", logprobs)
        if baseline is not None:
            check_squarable("baseline", baseline)
