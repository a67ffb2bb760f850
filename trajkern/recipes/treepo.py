"""TreePO (arXiv 2508.17445; github multimodal-art-projection/TreePO): a rollout against its peers at every depth."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import group_advantages
from trajkern._checks import check_choice, check_tensor, suggesting
from trajkern.ops.advantage import INTEGERS
from trajkern.recipes._groups import check_vector, group_sum, pair_ids, widened

WEIGHTINGS = ("average", "group_size")


@suggesting
def advantages(
    rewards: Tensor,  # [N]
    branch_ids: Tensor,  # [N, D]
    *,
    weighting: str = "average",
) -> Tensor:
    """The advantage of each rollout: its mean-centred rewards at every depth, put together.

    At depth d the group of rollout i are the rollouts that share its columns 0..d; let k_d be their number and m_d
    their mean reward.

        average     A_i = mean over d of (r_i - m_d)
        group_size  A_i = sum over d of k_d (r_i - m_d) / sum over d of k_d

    both over the depths at which i is not alone, and always over depth 0, where a rollout alone counts as r_i itself.

    Args:
        rewards: float ``[N]``, finite (checked on the CPU).
        branch_ids: int64 or int32 ``[N, D]``, D at least 1; column d is the branch taken at depth d, any values, and
            column 0 the prompt. A rollout that ended before depth d needs an id of its own there (its number, negative,
            will do), so that it is alone from there on.
        weighting: "average" or "group_size" (what the released function does when it is not told).

    Returns:
        ``[N]`` float32 (float64 for float64 rewards), not yet whitened: the authors spread it to the tokens and whiten
        over the batch's scored tokens (``trajkern.spread``, then ``trajkern.whiten`` with the loss mask).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("rewards", rewards, None, "", None)
    check_tensor("branch_ids", branch_ids, dtypes=INTEGERS, ndim=2, device=rewards.device)
    count, depths = branch_ids.shape
    if count != rewards.shape[0] or depths == 0:
        raise ValueError(
            f"branch_ids must have shape [{rewards.shape[0]}, D] (a row for each reward, D at least 1); "
            f"got {list(branch_ids.shape)}"
        )
    weighting = check_choice("weighting", weighting, WEIGHTINGS)
    r = widened(rewards)
    total, weight, ids = torch.zeros_like(r), torch.zeros_like(r), None
    for d in range(depths):
        column = branch_ids[:, d]
        ids = pair_ids(column) if ids is None else pair_ids(ids, column)
        size = group_sum(torch.ones_like(ids), ids)
        centred = group_advantages(r, ids, scale="none", singleton="raw" if d == 0 else "zero")
        share = size if weighting == "group_size" else torch.ones_like(size)
        share = torch.where(size > 1, share, int(d == 0)).to(r.dtype)
        total, weight = total + share * centred, weight + share
    return total / weight
