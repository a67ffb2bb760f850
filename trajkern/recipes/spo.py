"""SPO-tree (arXiv 2505.23564; github AIFrameResearch/SPO): a segment's advantage over the value of where it started."""

from __future__ import annotations

from torch import Tensor

from trajkern import Tree, sibling_advantages
from trajkern._checks import check_choice, check_number, check_tensor, suggesting
from trajkern._dtypes import FLOATS, accumulator
from trajkern.ops.tree import SCALES
from trajkern.recipes._groups import check_tree, leaf_means, widened


@suggesting
def node_advantages(
    leaf_rewards: Tensor,  # [L]
    tree: Tree,
    *,
    scale: str = "none",
) -> Tensor:
    """The advantage of each node's tokens over its parent. A root's is 0.

        V(n) = mean reward of the leaves below n        A(n) = V(n) - V(parent)

    With scale "std" it is divided by std + 1e-8, the standard deviation (ddof 0) of V over the parent's children. An
    only child has the parent's value and gets 0, and so do siblings above equal rewards.

    Args:
        leaf_rewards: float ``[L]``, finite (checked on the CPU), in the order of ``tree.leaves``.
        tree: the nodes.
        scale: "none" or "std".

    Returns:
        ``[M]`` float32 (float64 for float64 rewards), computed in float64.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_tree(leaf_rewards, tree)
    scale = check_choice("scale", scale, SCALES)
    value = leaf_means(leaf_rewards, tree)
    advantages = sibling_advantages(value, tree, baseline="parent", scale=scale, ddof=0, eps=1e-8)
    return advantages.to(widened(leaf_rewards).dtype)


@suggesting
def low_probability(
    old_logprobs: Tensor,  # [T]
    threshold: float = 0.9,
) -> Tensor:
    """Which tokens learn, bool ``[T]``: those that were sampled with a probability below ``threshold``.

    A token that was all but certain was no decision, and the segment's advantage is not owed to it. Combine with the
    loss mask: ``loss_mask & low_probability(old_logprobs)``.

    Args:
        old_logprobs: float ``[T]``, log-probs at sampling time. NaN (a token that was not sampled) gives False.
        threshold: a probability above 0; the authors' is 0.9.
    """
    check_tensor("old_logprobs", old_logprobs, dtypes=FLOATS, ndim=1)
    threshold = check_number("threshold", threshold, above=0, dtype=accumulator(old_logprobs))
    return widened(old_logprobs).exp() < threshold
