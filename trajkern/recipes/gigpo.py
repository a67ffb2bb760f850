"""GiGPO (arXiv 2505.10978; github langfengQ/verl-agent): rollouts compared whole, and step by step at equal states."""

from __future__ import annotations

from torch import Tensor

from trajkern import group_advantages
from trajkern._checks import check_choice, check_number, suggesting
from trajkern._dtypes import accumulator
from trajkern.ops.advantage import SCALES
from trajkern.recipes._groups import check_ids, check_index, check_vector, pair_ids, taken, widened


@suggesting
def step_advantages(
    returns: Tensor,  # [S]
    trajectory: Tensor,  # [S]
    anchor: Tensor,  # [S]
    group: Tensor,  # [S]
    *,
    episode_rewards: Tensor,  # [N]
    weight: float = 1.0,
    scale: str = "none",
) -> Tensor:
    """The advantage of each step: A = A_episode + weight * A_step.

    A_episode compares the step's episode reward with those of all steps of its group (a prompt), so that an episode of
    ten steps weighs ten times in the mean. A_step compares the step's discounted return with those of the group's
    steps that were taken in the same state. Both are x - mean, divided by std + 1e-6 (ddof 1) with scale "std".

    The only step of a group keeps its raw episode reward (over 1 + 1e-6 with scale "std"); the only step at an anchor
    gets A_step = 0. Equal values get exactly 0.

    Args:
        returns: float ``[S]``, finite (checked on the CPU); the discounted return from each step on
            (``trajkern.discounted_returns`` over the steps' rewards).
        trajectory: int64 or int32 ``[S]``, in [0, N) (checked on the CPU); the trajectory of each step.
        anchor: int64 or int32 ``[S]``, any values; equal ids in one group are one state. Which observations count as
            the same is the caller's choice: identical ones (the authors' default) or similar ones.
        group: int64 or int32 ``[S]``; equal ids share a prompt.
        episode_rewards: float ``[N]``, finite (checked on the CPU).
        weight: of the step's advantage, at least 0; the authors' is 1.
        scale: "none" (their default, "mean_norm") or "std".

    Returns:
        ``[S]`` float32 (float64 if either rewards or returns are), to be spread to the tokens of each step.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("returns", returns, None, "", None)
    steps, device = returns.shape[0], returns.device
    check_vector("episode_rewards", episode_rewards, None, "", device)
    count = episode_rewards.shape[0]
    check_index("trajectory", trajectory, steps, "one a step", device, count, "trajectories")
    check_ids("anchor", anchor, steps, "one id a step", device)
    check_ids("group", group, steps, "one id a step", device)
    weight = check_number("weight", weight, low=0, dtype=accumulator(returns))
    scale = check_choice("scale", scale, SCALES)
    episode = group_advantages(taken(episode_rewards, trajectory), group, scale=scale)
    step = group_advantages(returns, pair_ids(group, anchor), scale=scale, singleton="zero")
    return widened(episode) + weight * step
