"""TreeRPO (arXiv 2506.05183): GRPO among the continuations of one step."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import Tree, sibling_advantages, subtree_reduce
from trajkern._checks import check_choice, suggesting
from trajkern.ops.tree import SCALES
from trajkern.recipes._groups import check_tree, parents, widened


@suggesting
def node_advantages(
    leaf_rewards: Tensor,  # [L]
    tree: Tree,
    *,
    scale: str = "std",
) -> Tensor:
    """The advantage of each node's tokens over its siblings'. A root's is 0.

        V(leaf) = r        V(n) = mean of V over n's children        A(n) = (V(n) - mean) / (std + 1e-6)

    mean and std (ddof 1) over the children of n's parent, n among them. V is the mean over children, not over leaves:
    the two differ where branches have unequal numbers of leaves. An only child gets 0: it has no one to be compared
    with.

    Args:
        leaf_rewards: float ``[L]``, finite (checked on the CPU), in the order of ``tree.leaves``.
        tree: the nodes.
        scale: "std", or "none" to subtract the mean only. The paper says that its groups are normalised as GRPO's
            and gives no constants, and no code could be read: hence "std", and ddof and eps as GRPO's trainers have
            them.

    Returns:
        ``[M]`` float32 (float64 for float64 rewards), computed in float64. Siblings above equal rewards get exactly 0.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_tree(leaf_rewards, tree)
    scale = check_choice("scale", scale, SCALES)
    x = leaf_rewards.double()
    low, high = subtree_reduce(x, tree, "min"), subtree_reduce(x, tree, "max")
    value = _child_means(x, tree).clamp(low, high)  # rounding must not part nodes above equal rewards
    return sibling_advantages(value, tree, scale=scale, singleton="zero").to(widened(leaf_rewards).dtype)


def _child_means(leaf_rewards: Tensor, tree: Tree) -> Tensor:
    """V of every node: turn j adds what lies 2^j to 2^(j+1) - 1 steps below it, so that depth costs only its log."""
    m = tree.num_nodes
    up = torch.where(parents(tree) < 0, m, parents(tree))
    up = torch.cat((up, up.new_full((1,), m)))  # node m stands above the roots and takes no share
    share = torch.cat((1 / tree.sibling_offsets.diff().double(), leaf_rewards.new_zeros(1)))[up]
    value = leaf_rewards.new_zeros(m + 1).scatter(0, tree.leaves, leaf_rewards)
    for _ in range((tree.levels - 1).bit_length()):
        value = value.index_put((up,), share * value, accumulate=True)
        up, share = up[up], share * share[up]
    return value[:m]
