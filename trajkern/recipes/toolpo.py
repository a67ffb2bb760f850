"""ToolPO (DeepAgent, arXiv 2510.21618): the outcome to every token, the tool reward to the tokens that acted."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from trajkern import Spans, group_advantages
from trajkern._checks import check_callable, check_number, describe, readable, suggesting
from trajkern._dtypes import FLOATS, INTEGERS, accumulator
from trajkern._values import check_values
from trajkern.recipes._groups import check_ids, check_packing, check_vector, group_sum, pair_ids, to_tokens, widened

COUNTS = (torch.bool, *FLOATS, *INTEGERS)


class Simulator(Protocol):
    """A model, or a table, that answers a tool call in the place of the tool: steadier and cheaper than real ones.

    A host plugs it in where its environment would run the tool: between a turn that ends in a call and the next, it
    appends ``answered(simulate, call)`` to the rollout as an observation, whose tokens the loss mask leaves out.
    Whether a call was right is judged by the call, as ever, not by the answer.
    """

    def __call__(self, call: str, /) -> str:
        """What the tool would have said. An error that a tool reports is a text like any other; what is raised goes
        through, and ends the rollout."""


def answered(simulate: Simulator, call: str) -> str:
    """``simulate(call)``, checked to be a text.

    Args:
        simulate: see :class:`Simulator`.
        call: what the policy wrote between the delimiters of a call.

    Raises:
        TypeError: one of the two is none, or the answer is no text.
    """
    check_callable("simulate", simulate, "a function of a call")
    if not isinstance(call, str):
        raise TypeError(f"call must be a string, got {describe(call)}")
    answer: Any = simulate(call)
    if not isinstance(answer, str):
        raise TypeError(f"simulate must return a string, got {describe(answer)} for the call {call[:80]!r}")
    return answer


@suggesting
def action_rewards(
    correct_calls: Tensor,  # [N]
    preference: Tensor,  # [N]
    *,
    call_weight: float = 1.0,
    preference_weight: float = 1.0,
) -> Tensor:
    """R_action = call_weight * (number of right tool calls) + preference_weight * S_pref; ``[N]``.

    Args:
        correct_calls: float, integer or bool ``[N]``, at least 0 (checked on the CPU): how many of a rollout's tool
            calls were right.
        preference: of the same dtypes ``[N]``, finite (checked on the CPU); see :func:`fold_preference` and
            :func:`group_preference`. 0 where memory is not folded.
        call_weight, preference_weight: at least 0; the paper's are 1 and 1.

    Returns:
        float32 (float64 for float64 arguments).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("correct_calls", correct_calls, None, "", None, COUNTS)
    check_vector("preference", preference, correct_calls.shape[0], "one a rollout", correct_calls.device, COUNTS)
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

    Returns:
        float32 (float64 for float64 lengths).
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


def group_preference(
    lengths: Tensor,  # [N]
    folded: Tensor,  # [N]
    group_ids: Tensor,  # [N]
) -> Tensor:
    """S_pref of each rollout by its group: a folded one's length against the mean of the direct ones; ``[N]``.

    The paper compares a trajectory with folding and one without; a group has several of either. One that did not
    fold, and one in a group where all did, gets 0: there is nothing to prefer.

    Args:
        lengths: float or integer ``[N]``, at least 0 (checked on the CPU): the tokens that each rollout spent.
        folded: bool ``[N]``, whether it folded its memory.
        group_ids: int64 or int32 ``[N]``; equal ids share a prompt.

    Returns:
        float32 (float64 for float64 lengths), in [-1, 1].
    """
    check_vector("lengths", lengths, None, "", None, COUNTS)
    count, device = lengths.shape[0], lengths.device
    check_vector("folded", folded, count, "one flag a rollout", device, (torch.bool,))
    check_ids("group_ids", group_ids, count, "one id a rollout", device)
    if readable(lengths):
        check_values("lengths", lengths, 0)
    ids = pair_ids(group_ids)
    direct = group_sum(~folded, ids)
    mean = group_sum(torch.where(folded, 0, lengths.double()), ids) / direct.clamp_min(1)
    preference = fold_preference(mean, lengths.double())
    return torch.where(folded & (direct > 0), preference, 0).to(widened(lengths).dtype)


def action_mask(*spans: Spans) -> Tensor:
    """The tokens of any of these spans, bool ``[T]``: of tool calls, and of memory folds where there are any."""
    if not spans:
        raise ValueError("action_mask needs the spans of tool calls, or of memory folds; got none")
    for x in spans:
        if not isinstance(x, Spans):
            raise TypeError(f"spans must be trajkern.Spans, got {describe(x)}")
        if x.num_tokens != spans[0].num_tokens:
            raise ValueError(f"spans must be of the same tokens; they are of {spans[0].num_tokens} and {x.num_tokens}")
    return torch.stack([x.token_span >= 0 for x in spans]).any(0)


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
        success: float, integer or bool ``[N]``, finite (checked on the CPU): each rollout's outcome reward.
        action: of the same dtypes ``[N]``, finite (checked on the CPU); see :func:`action_rewards`.
        group_ids: int64 or int32 ``[N]``; equal ids share a prompt.
        action_mask: bool ``[T]``, M: the tokens of tool calls and of memory folds, as :func:`action_mask` makes it. The
            paper does not say whether the delimiters of a call are among them, nor whether a failed call's are; the
            caller's spans decide.
        cu_seqlens: int64 or int32 ``[N+1]``, the boundaries of the trajectories (checked on the CPU).

    Returns:
        float32 (float64 for float64 rewards). Observations get a value too: mask them from the loss.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("action_mask", action_mask, None, "", None, (torch.bool,))
    tokens, device = action_mask.shape[0], action_mask.device
    count = check_packing(cu_seqlens, tokens, device)
    check_vector("success", success, count, "one a trajectory", device, COUNTS)
    check_vector("action", action, count, "one a trajectory", device, COUNTS)
    check_ids("group_ids", group_ids, count, "one id a trajectory", device)
    success, action = widened(success), widened(action)
    of_outcome, of_action = (group_advantages(x, group_ids, scale="none", singleton="zero") for x in (success, action))
    acting, other = (to_tokens(x, cu_seqlens, tokens) for x in (of_outcome + of_action, of_outcome))
    return torch.where(action_mask, acting, other)
