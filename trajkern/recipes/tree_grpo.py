"""Tree-GRPO (arXiv 2509.21240; github AMAP-ML/Tree-GRPO): a rollout against its prompt's and against its tree's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from trajkern import Tree, group_advantages, sibling_advantages
from trajkern._checks import check_choice, check_flag, check_number, readable, suggesting
from trajkern._dtypes import accumulator
from trajkern._values import check_squarable, check_values
from trajkern.ops.advantage import INTEGERS
from trajkern.recipes._groups import check_ids, check_tree, check_vector, leaf_means, parents, widened

ESTIMATORS = ("tree", "tree_inner", "tree_2norm")
_pooled = partial(group_advantages, singleton="zero")


@suggesting
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
    estimator = check_choice("estimator", estimator, ESTIMATORS)
    if readable(tree_ids) and count:
        _check_trees(tree_ids, group_ids)
    if estimator == "tree_inner":
        return group_advantages(rewards, tree_ids)
    across = group_advantages(rewards, group_ids)
    if estimator == "tree_2norm":
        return group_advantages(across, tree_ids)
    return across + group_advantages(rewards, tree_ids)


def token_advantages(
    token_rewards: Tensor,  # [T]
    tree_ids: Tensor,  # [T]
    group_ids: Tensor,  # [T]
    counted: Tensor,  # [T]
) -> Tensor:
    """The authors' estimator "tree_per_token": a token among all tokens of its prompt and of its tree; ``[T]``.

        A_t = norm(r; group)_t + norm(r; tree)_t

    norm as in :func:`leaf_advantages`, but over the tokens of every rollout, so that a longer one counts more; the only
    token of a group or a tree gets 0 there. An outcome stands at a rollout's last token, with 0 at its others: these
    then get an advantage of their own, -mean / std, and all of a failure's tokens the same.

    Args:
        token_rewards: float ``[T]``, finite where counted (checked on the CPU).
        tree_ids, group_ids: int64 or int32 ``[T]``, of each token's rollout, as there.
        counted: bool ``[T]``. The authors count all tokens of a response, observations included; elsewhere 0 comes out.

    Returns:
        ``[T]`` float32 (float64 for float64 rewards).

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("token_rewards", token_rewards, None, "", None, finite=False)
    count, device = token_rewards.shape[0], token_rewards.device
    check_ids("tree_ids", tree_ids, count, "one id a token", device)
    check_ids("group_ids", group_ids, count, "one id a token", device)
    check_vector("counted", counted, count, "one flag a token", device, (torch.bool,))
    if readable(tree_ids) and count:
        check_squarable("token_rewards", token_rewards, counted)
        _check_trees(tree_ids, group_ids)
    across, inside = (_pooled(token_rewards, ids, gate=counted) for ids in (group_ids, tree_ids))
    return across + inside


@suggesting
def pooled_outcomes(
    rewards: Tensor,  # [N]
    ids: Tensor,  # [N]
    counts: Tensor,  # [N]
    *,
    gate: Tensor | None = None,  # [N]
) -> tuple[Tensor, Tensor]:
    """norm(r; ids) of :func:`token_advantages` for outcomes, from ``[N]`` alone: at each last token, at the others.

    Args:
        rewards: float ``[N]``, finite where it is counted (checked on the CPU): each rollout's outcome.
        ids: int64 or int32 ``[N]``, of prompts or of trees.
        counts: int64 or int32 ``[N]``, at least 0 (checked on the CPU): the counted tokens of each rollout. One without
            any takes part in nothing.
        gate: bool ``[N]``; a False rollout takes part in nothing, and gets 0.

    Returns:
        (of the last token, of every other) ``[N]`` each, float32 (float64 for float64 rewards).
    """
    check_vector("rewards", rewards, None, "", None, finite=False)
    count, device = rewards.shape[0], rewards.device
    check_ids("ids", ids, count, "one id a rollout", device)
    check_vector("counts", counts, count, "one a rollout", device, INTEGERS)
    if readable(counts):
        check_values("counts", counts, 0)
    passed = counts > 0
    if gate is not None:
        check_vector("gate", gate, count, "one flag a rollout", device, (torch.bool,))
        passed = passed & gate
    # a rollout is its outcome once, and as many zeros as it has other tokens
    often = torch.cat((torch.ones_like(counts), (counts - 1).clamp_min(0)))
    both = torch.cat((torch.where(passed, rewards, 0), torch.zeros_like(rewards)))
    found = _pooled(both, ids.repeat(2), gate=passed.repeat(2), weights=often)
    return found[:count], found[count:]


@suggesting
def node_rewards(
    leaf_rewards: Tensor,  # [L]
    tree: Tree,
    *,
    margin: float = 0.1,
    leaves: bool = False,
) -> Tensor:
    """The authors' reward mode "tree_diff": what a step leads to, and what it gained over its parent. A root's is 0.

        R(n) = (max(V(n) - V(parent) - margin, 0) + V(n)) / sqrt(c_n)

    V(n) is the mean reward of the c_n leaves below n. It stands in the released code, which trains Tree-GRPO without
    it; used as an advantage there ("no_estimator") it is the reward of each token of a step, or it is compared with
    those of other tokens (:func:`token_advantages`). The code leaves each step's last token at 0.

    Args:
        leaf_rewards: float ``[L]``, finite (checked on the CPU), in the order of ``tree.leaves``.
        tree: the nodes; one root a tree, which holds the prompt itself.
        margin: a gain up to this counts as none, at least 0; the authors' is 0.1.
        leaves: whether a leaf's own tokens get its R; the authors' code starts at its parent, and gives them 0.

    Returns:
        ``[M]`` float32 (float64 for float64 rewards), from sums in float64.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_tree(leaf_rewards, tree)
    margin = check_number("margin", margin, low=0, dtype=accumulator(leaf_rewards))
    value = leaf_means(leaf_rewards, tree)
    gained = sibling_advantages(value, tree, baseline="parent", scale="none")
    out = ((gained - margin).clamp_min(0) + value) / tree.leaf_count.double().sqrt()
    silent = parents(tree) < 0
    if not check_flag("leaves", leaves):
        silent = silent.scatter(0, tree.leaves, True)
    return torch.where(silent, 0, out).to(widened(leaf_rewards).dtype)


def _check_trees(tree_ids: Tensor, group_ids: Tensor) -> None:
    order = tree_ids.argsort(stable=True)
    tree, group = tree_ids[order], group_ids[order]
    torn = (tree[1:] == tree[:-1]) & (group[1:] != group[:-1])
    if bool(torn.any()):
        at = int(torn.nonzero()[0, 0])
        groups = torch.stack((group[at], group[at + 1])).tolist()
        raise ValueError(f"tree_ids must put each tree in one group; tree {int(tree[at])} is in {groups}")
