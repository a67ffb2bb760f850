"""ToolPO (DeepAgent, arXiv 2510.21618): the outcome to every token, the tool reward to the tokens that acted."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import group_advantages
from trajkern._checks import check_number, check_values, readable
from trajkern._dtypes import FLOATS, INTEGERS, accumulator
from trajkern.recipes._groups import check_ids, check_packing, check_vector, to_tokens, widened

COUNTS = (*FLOATS, *INTEGERS)


def action_rewards(
    correct_calls: Tensor,  # [N]
    preference: Tensor,  # [N]
    *,
    call_weight: float = 1.0,
    preference_weight: float = 1.0,
) -> Tensor:
    """R_action = call_weight * (number of right tool calls) + preference_weight * S_pref; ``[N]``.

    Args:
        correct_calls: float or integer ``[N]``, at least 0 (checked on the CPU): how many of a rollout's tool calls
            were right.
        preference: float ``[N]``, finite (checked on the CPU); see :func:`fold_preference`. 0 where memory is not
            folded.
        call_weight, preference_weight: at least 0; the paper's are 1 and 1.

    Returns:
        float32 (float64 for float64 arguments).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("correct_calls", correct_calls, None, "", None, COUNTS)
    check_vector("preference", preference, correct_calls.shape[0], "one a rollout", correct_calls.device)
    if readable(correct_calls):
        check_values("correct_calls", correct_calls, 0)
    dtype = torch.promote_types(accumulator(correct_calls), accumulator(preference))
    call_weight = check_number("call_weight", call_weight, low=0, dtype=dtype)
    preference_weight = check_number("preference_weight", preference_weight, low=0, dtype=dtype)
    return call_weight * widened(correct_calls) + preference_weight * widened(preference)


def fold_preference(
    direct_lengths: Tensor,  # [N]
    folded_lengths: Tensor,  # [N]
) -> Tensor:
    """S_pref = (L_direct - L_fold) / (L_direct + L_fold), in [-1, 1]: how much shorter folding the memory made it.

    Args:
        direct_lengths, folded_lengths: float or integer ``[N]``, at least 0 (checked on the CPU); the tokens spent
            without and with folding. Two zeros give 0.
    """
    check_vector("direct_lengths", direct_lengths, None, "", None, COUNTS)
    count, device = direct_lengths.shape[0], direct_lengths.device
    check_vector("folded_lengths", folded_lengths, count, "one a rollout", device, COUNTS)
    for name, lengths in (("direct_lengths", direct_lengths), ("folded_lengths", folded_lengths)):
        if readable(lengths):
            check_values(name, lengths, 0)
    direct, folded = widened(direct_lengths), widened(folded_lengths)
    total = direct + folded
    return (direct - folded) / torch.where(total == 0, 1, total)


def token_advantages(
    success: Tensor,  # [N]
    action: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    action_mask: Tensor,  # [T]
    cu_seqlens: Tensor,  # [N+1]
) -> Tensor:
    """The advantage of each token: A_t = A_success + M_t * A_action, each x minus its group's mean; ``[T]``.

    Neither is divided by a standard deviation. A rollout alone in its group, and equal values, get exactly 0.

    Args:
        success: float ``[N]``, finite (checked on the CPU): each rollout's outcome reward.
        action: float ``[N]``, finite (checked on the CPU); see :func:`action_rewards`.
        group_ids: int64 or int32 ``[N]``; equal ids share a prompt.
        action_mask: bool ``[T]``, M: the tokens of tool calls and of memory folds. The paper does not say whether the
            delimiters of a call are among them, nor whether a failed call's are; the caller's mask decides.
        cu_seqlens: int64 or int32 ``[N+1]``, the boundaries of the trajectories (checked on the CPU).

    Returns:
        float32 (float64 for float64 rewards). Observations get a value too: mask them from the loss.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("action_mask", action_mask, None, "", None, (torch.bool,))
    tokens, device = action_mask.shape[0], action_mask.device
    count = check_packing(cu_seqlens, tokens, device)
    check_vector("success", success, count, "one a trajectory", device)
    check_vector("action", action, count, "one a trajectory", device)
    check_ids("group_ids", group_ids, count, "one id a trajectory", device)
    of_outcome, of_action = (group_advantages(x, group_ids, scale="none", singleton="zero") for x in (success, action))
    acting, other = (to_tokens(x, cu_seqlens, tokens) for x in (of_outcome + of_action, of_outcome))
    return torch.where(action_mask, acting, other)
