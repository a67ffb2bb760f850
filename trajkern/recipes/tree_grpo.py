"""Tree-GRPO (arXiv 2509.21240; github AMAP-ML/Tree-GRPO): a rollout against its prompt's and against its tree's."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import group_advantages
from trajkern._checks import check_choice, readable
from trajkern.recipes._groups import check_ids, check_vector

ESTIMATORS = ("tree", "tree_inner", "tree_2norm")


def leaf_advantages(
    rewards: Tensor,  # [N]
    tree_ids: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    *,
    estimator: str = "tree",
) -> Tensor:
    """The advantage of each rollout, which all of its scored tokens share.

    With norm(x; g)_i = (x_i - mean) / (std + 1e-6) over the rollouts of equal id g, std with ddof 1:

        tree        A = norm(r; group) + norm(r; tree)
        tree_inner  A = norm(r; tree)
        tree_2norm  A = norm(norm(r; group); tree)

    A tree is all the rollouts grown from one first chain, not only the siblings at one branch. A rollout alone in its
    tree keeps r / (1 + 1e-6) there, as in the authors' code: a lone failure of reward 0 gets 0, a lone success about
    1. Equal rewards of a tree or a group get exactly 0 there.

    Args:
        rewards: float ``[N]``, finite (checked on the CPU): each rollout's outcome.
        tree_ids: int64 or int32 ``[N]``, unique over the batch: a tree lies in one group (checked on the CPU).
        group_ids: int64 or int32 ``[N]``; equal ids share a prompt.
        estimator: "tree" (the authors' default), "tree_inner" (which collapsed in their ablation) or "tree_2norm".

    Returns:
        ``[N]`` float32 (float64 for float64 rewards). Tokens shared by several rollouts are trained once per rollout:
        give the advantages to ``trajkern.Paths`` for the packed tree, or train the flat rollouts.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("rewards", rewards, None, "", None)
    count, device = rewards.shape[0], rewards.device
    check_ids("tree_ids", tree_ids, count, "one id a reward", device)
    check_ids("group_ids", group_ids, count, "one id a reward", device)
    check_choice("estimator", estimator, ESTIMATORS)
    if readable(tree_ids) and count:
        _check_trees(tree_ids, group_ids)
    if estimator == "tree_inner":
        return group_advantages(rewards, tree_ids)
    across = group_advantages(rewards, group_ids)
    if estimator == "tree_2norm":
        return group_advantages(across, tree_ids)
    return across + group_advantages(rewards, tree_ids)


def _check_trees(tree_ids: Tensor, group_ids: Tensor) -> None:
    order = tree_ids.argsort(stable=True)
    tree, group = tree_ids[order], group_ids[order]
    torn = (tree[1:] == tree[:-1]) & (group[1:] != group[:-1])
    if bool(torn.any()):
        at = int(torn.nonzero()[0, 0])
        groups = torch.stack((group[at], group[at + 1])).tolist()
        raise ValueError(f"tree_ids must put each tree in one group; tree {int(tree[at])} is in {groups}")
