"""Delta-Belief-RL (arXiv 2602.12342; github bethgelab/delta-belief-rl): a turn is worth what it taught the policy."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import group_advantages
from trajkern._checks import (
    check_boundaries,
    check_choice,
    check_flag,
    check_number,
    check_tensor,
    readable,
    suggesting,
)
from trajkern._dtypes import accumulator
from trajkern._values import check_offsets
from trajkern.ops.advantage import FLOATS, INTEGERS
from trajkern.recipes._groups import check_index, check_order, check_vector, group_sum, pair_ids, taken, widened

FINISHED = ("included", "masked")


@suggesting
def turn_rewards(
    log_beliefs: Tensor,  # [S+N]
    cu_beliefs: Tensor,  # [N+1]
    *,
    won: Tensor,  # [N]
    penalty: Tensor,  # [S]
    scale: float = 0.1,
    clip: bool = True,
    win_reward: float = 2.0,
    turn_cost: float = 0.05,
) -> Tensor:
    """The reward of each turn: r_t = end + scale * max(D_t, 0) + penalty_t; ``[S]``.

    D_t = b_t - b_{t-1}, b_t the log-probability that the policy gives the hidden answer when asked for it after turn t
    (the sum over the answer's tokens). ``end`` is the same for every turn of a trajectory of k turns: win_reward if it
    won, less turn_cost * k if k > 1. The paper's formula lists no turn cost; the released code has it.

    Args:
        log_beliefs: float ``[S+N]``; a trajectory of k turns has its k + 1 beliefs one after another, the first from
            before any turn. Those that were not asked for (after the finishing turn) are NaN.
        cu_beliefs: int64 or int32 ``[N+1]``, the boundaries of the trajectories' beliefs, at least one each (checked on
            the CPU).
        won: bool ``[N]``.
        penalty: float or integer ``[S]``, finite (checked on the CPU), at most 0 by convention; the authors give -5 for
            an invalid turn and -1 for a repeated question.
        scale: of the difference, at least 0; 0.1 was best in the authors' ablation.
        clip: whether losses of belief count as 0. The paper always clips; its code only under a further flag.
        win_reward, turn_cost: as above; the defaults are the authors'.

    Returns:
        float32 (float64 for float64 beliefs). A difference that is not finite counts as 0: after a turn whose belief is
        NaN, and where a belief is -inf (an answer without tokens, or one that the policy excludes).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_tensor("log_beliefs", log_beliefs, dtypes=FLOATS, ndim=1)
    total, device = log_beliefs.shape[0], log_beliefs.device
    check_boundaries("cu_beliefs", cu_beliefs, device)
    count = cu_beliefs.shape[0] - 1
    if readable(cu_beliefs):
        check_offsets("cu_beliefs", cu_beliefs, total, "beliefs")
        if bool((cu_beliefs.diff() < 1).any()):
            at = int((cu_beliefs.diff() < 1).nonzero()[0, 0])
            raise ValueError(f"cu_beliefs must give every trajectory at least one belief; trajectory {at} has none")
    check_vector("won", won, count, "one flag a trajectory", device, (torch.bool,))
    both, meaning = (*FLOATS, *INTEGERS), "one a turn: one less than beliefs, for each trajectory"
    check_vector("penalty", penalty, total - count, meaning, device, both)
    scale, win_reward, turn_cost = (
        check_number(name, value, low=0, dtype=accumulator(log_beliefs))
        for name, value in (("scale", scale), ("win_reward", win_reward), ("turn_cost", turn_cost))
    )
    clip = check_flag("clip", clip)
    cu_turns = cu_beliefs.long() - torch.arange(count + 1, device=device)
    turn = torch.arange(total - count, device=device)
    owner = torch.searchsorted(cu_turns[1:].contiguous(), turn, right=True)
    after = turn + owner + 1
    belief = widened(log_beliefs)
    delta = belief[after] - belief[after - 1]
    delta = torch.where(delta.isfinite(), delta.relu() if clip else delta, 0)
    turns = cu_turns.diff().double()
    end = win_reward * won.double() - torch.where(turns > 1, turn_cost * turns, 0)
    return end.to(belief.dtype)[owner] + scale * delta + penalty.to(belief.dtype)


@suggesting
def turn_advantages(
    turn_rewards: Tensor,  # [S]
    trajectory: Tensor,  # [S]
    turn: Tensor,  # [S]
    group_ids: Tensor,  # [N]
    *,
    finished: str = "included",
) -> Tensor:
    """The advantage of each turn among its group's turns of the same index: (r - mean) / (std + 1e-6); ``[S]``.

    std has ddof 1; equal rewards get exactly 0, and a lone one keeps r / (1 + 1e-6).

    Args:
        turn_rewards: float ``[S]``, finite (checked on the CPU).
        trajectory: int64 or int32 ``[S]``, in [0, N); no trajectory has a turn index twice (both checked on the CPU).
        turn: int64 or int32 ``[S]``, the index of each turn in its trajectory, at least 0 (checked on the CPU).
        group_ids: int64 or int32 ``[N]``; equal ids share a prompt.
        finished: what a group's rollouts count that had finished before a turn. "included" (the released code): as a
            reward of 0 in that turn's mean and deviation. "masked": not at all. Either baseline depends on who got that
            far, and so is biased for the policy gradient (verl issue 7244).

    Returns:
        float32 (float64 for float64 rewards), to be spread to the tokens of each turn.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("turn_rewards", turn_rewards, None, "", None)
    steps, device = turn_rewards.shape[0], turn_rewards.device
    check_vector("group_ids", group_ids, None, "", device, INTEGERS)
    check_index("trajectory", trajectory, steps, "one a turn", device, group_ids.shape[0], "trajectories")
    check_order("turn", turn, steps, "one index a turn", device)
    finished = check_choice("finished", finished, FINISHED)
    if readable(turn):
        twice = group_sum(torch.ones_like(turn), pair_ids(trajectory, turn)) > 1
        if bool(twice.any()):
            at = int(twice.nonzero()[0, 0])
            raise ValueError(
                f"turn must be unique in its trajectory; {int(turn[at])} is twice in trajectory {int(trajectory[at])}"
            )
    if not readable(trajectory):
        turn_rewards = turn_rewards + 0 * taken(torch.zeros_like(group_ids, dtype=turn_rewards.dtype), trajectory)
        trajectory = trajectory.clamp(0, max(group_ids.shape[0] - 1, 0))
    ids = pair_ids(group_ids[trajectory], turn)
    if finished == "masked":
        return group_advantages(turn_rewards, ids)
    dense = pair_ids(group_ids)
    rollouts = group_sum(torch.ones_like(dense), dense)[trajectory]
    missing = rollouts - group_sum(torch.ones_like(ids), ids)
    # one reward of 0 for each (group, turn), as often as rollouts had finished before it
    weights = torch.cat((torch.ones_like(ids), torch.zeros_like(ids).scatter(0, ids, missing)))
    rewards = torch.cat((turn_rewards, torch.zeros_like(turn_rewards)))
    every = torch.cat((ids, torch.arange(steps, device=device)))
    return group_advantages(rewards, every, weights=weights.to(widened(rewards).dtype))[:steps]
