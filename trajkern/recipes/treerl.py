"""TreeRL (arXiv 2506.11902; github THUDM/TreeRL): a step's reward from the leaves that it leads to."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern import Tree, group_advantages, sibling_advantages, subtree_reduce
from trajkern._checks import check_choice, suggesting
from trajkern.recipes._groups import check_tree, check_vector, leaf_means, parents, widened

FORMS = ("paper", "code")
UNCHANGED = 1e-8  # a local advantage below this is filled in


@suggesting
def node_rewards(
    leaf_rewards: Tensor,  # [L]
    tree: Tree,
    *,
    form: str = "paper",
    selected: Tensor | None = None,  # [L]
) -> Tensor:
    """The reward of each node's tokens, used as their advantage without further normalisation. A root's is 0.

    With V(n) the mean reward of the c_n leaves below n, "paper" adds the global and the local advantage:

        R(n) = ((V(n) - V(root)) + (V(n) - V(parent))) / sqrt(c_n)

    "code" is what the released code computes. Leaves are centred leave-one-out over their tree, x_l = r_l - mean of
    the others; s_n of the leaves below n are selected for training:

        sv(n) = mean of x below n / sqrt(s_n)        local(n) = sv(n) - sv(parent)        R(n) = local(n) + sv(n)

    It walks every path from the root's child down and fills in: where abs(local(n)) < 1e-8, n takes the local
    advantage of the node before it on the path, itself filled in by then. A root's child has none before it and keeps
    its own. The node before n is its parent on every path, so that the rule gives one value a node.

    Args:
        leaf_rewards: float ``[L]``, finite (checked on the CPU), in the order of ``tree.leaves``.
        tree: the nodes; one root a prompt, which holds the prompt itself.
        form: "paper" (the default: its formula is what the method claims) or "code".
        selected: bool ``[L]``, for "code": the leaves that are trained (the authors keep 16 of 30); without it all.
            A node above none of them is not divided.

    Returns:
        ``[M]`` float32 (float64 for float64 rewards), from sums in float64. A tree of equal rewards gets exactly 0,
        and so does a tree of one leaf, for which the code stops with an assertion.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_tree(leaf_rewards, tree)
    form = check_choice("form", form, FORMS)
    if selected is not None:
        check_vector("selected", selected, tree.num_leaves, "one flag a leaf", tree.device, (torch.bool,))
        if form == "paper":
            raise ValueError("selected must be None for form 'paper', which counts every leaf")
    above_root = parents(tree) < 0
    if form == "paper":
        value = leaf_means(leaf_rewards, tree)
        # the roots' values by the number of their tree; the other nodes write to a place that nobody reads
        place = torch.where(above_root, tree.node_root, tree.num_roots)
        root_value = value.new_zeros(tree.num_roots + 1).scatter(0, place, value)[tree.node_root]
        local = sibling_advantages(value, tree, baseline="parent", scale="none")
        out = (value - root_value + local) / tree.leaf_count.double().sqrt()
    else:
        centred = group_advantages(
            leaf_rewards.double(), tree.leaf_root, baseline="leave_one_out", scale="none", singleton="zero"
        )
        trained = torch.ones_like(centred) if selected is None else selected.double()
        value = subtree_reduce(centred, tree, "mean") / subtree_reduce(trained, tree, "sum").clamp_min(1).sqrt()
        out = value + _filled(sibling_advantages(value, tree, baseline="parent", scale="none"), tree)
    return torch.where(above_root, 0, out).to(widened(leaf_rewards).dtype)


def _filled(local: Tensor, tree: Tree) -> Tensor:
    """Each node's own local advantage, or that of the nearest node above it that keeps its own."""
    node = torch.arange(tree.num_nodes, device=local.device)
    source = torch.where((tree.depth >= 2) & (local.abs() < UNCHANGED), parents(tree), node)
    for _ in range((tree.levels - 1).bit_length()):  # each turn doubles how far a node has looked up
        source = source[source]
    return local[source]
