"""The recipes for trees, called alike: from a tree, its leaves' rewards and its scored tokens to advantages."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trajkern import Tree, subtree_reduce, whiten
from trajkern._checks import check_instance
from trajkern.recipes import gigpo, spo, tree_grpo, treepo, treerl, treerpo, vineppo
from trajkern.recipes._groups import parents

DISCOUNT = 0.95  # a step, in gigpo's returns


class TreeRecipe(NamedTuple):
    """A recipe, and whom its advantages belong to.

    Args:
        advantages: called with (tree, rewards ``[L]``, loss_mask ``[T]``).
        per: "leaf" ``[L]``, "node" ``[M]``, or "step" ``[S]``, one for each of :func:`path_nodes`.
        learns: None, or which tokens learn, bool ``[T]``, by the log-probs ``[T]`` that they were sampled with.
        within_prompt: whether the trees of a prompt are compared, which must then be in one ``tree``.
    """

    advantages: Callable[[Tree, Tensor, Tensor], Tensor]
    per: str
    learns: Callable[[Tensor], Tensor] | None = None
    within_prompt: bool = False


def path_nodes(tree: Tree) -> tuple[Tensor, Tensor]:
    """(leaf, node) of every step of every rollout, rollout after rollout from its root down, ``[S]`` each."""
    check_instance("tree", tree, Tree)
    return tree.path_nodes


def _tree_grpo(tree: Tree, rewards: Tensor, loss_mask: Tensor) -> Tensor:
    return tree_grpo.leaf_advantages(rewards, tree.leaf_root, tree.leaf_group)


def _tree_diff(tree: Tree, rewards: Tensor, loss_mask: Tensor) -> Tensor:
    return tree_grpo.node_rewards(rewards, tree)


def _treerl(tree: Tree, rewards: Tensor, loss_mask: Tensor) -> Tensor:
    return treerl.node_rewards(rewards, tree)


def _treepo(tree: Tree, rewards: Tensor, loss_mask: Tensor) -> Tensor:
    """A prompt's roots are one branch, and a rollout that has ended is alone; whitened over the scored tokens."""
    advantages = _treepo_branches(tree, rewards, loss_mask)
    index = tree.flat_index
    each = torch.repeat_interleave(advantages, tree.flat_lengths, output_size=index.shape[0])
    return of_rollouts(whiten(each, mask=loss_mask[index]), loss_mask[index], tree.flat_cu_seqlens)


def of_rollouts(values: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:  # [T], [T] bool, [N+1]
    """The value of each rollout's first masked token, 0 for one without; ``[N]``."""
    if not values.shape[0]:
        return values.new_zeros(cu_seqlens.shape[0] - 1)
    seen = torch.cat((cu_seqlens.new_zeros(1, dtype=torch.int64), mask.cumsum(0)))
    before, after = seen[cu_seqlens[:-1].long()], seen[cu_seqlens[1:].long()]
    first = torch.searchsorted(seen[1:], before + 1).clamp_max(values.shape[0] - 1)
    return torch.where(after > before, values[first], 0)


def _treepo_branches(tree: Tree, rewards: Tensor, loss_mask: Tensor) -> Tensor:
    """Before it is whitened."""
    leaf, node = path_nodes(tree)
    ids = -1 - torch.arange(tree.num_leaves, device=tree.device)[:, None].repeat(1, tree.levels)  # no node's number
    ids[leaf, tree.depth[node]] = node
    ids[:, 0] = tree.leaf_group
    return treepo.advantages(rewards, ids)


def _treerpo(tree: Tree, rewards: Tensor, loss_mask: Tensor) -> Tensor:
    return treerpo.node_advantages(rewards, tree)


def _spo(tree: Tree, rewards: Tensor, loss_mask: Tensor) -> Tensor:
    return spo.node_advantages(rewards, tree)


def _vineppo(tree: Tree, rewards: Tensor, loss_mask: Tensor) -> Tensor:
    """V of a node is the mean reward of the leaves below it: the tree's own continuations stand for fresh ones."""
    values = subtree_reduce(rewards, tree, "mean")
    before = torch.where(parents(tree) < 0, values, values[parents(tree)])
    # every node's step as one chain V(parent), V(node), of which only the odd steps are the tree's
    chain = torch.stack((before, values), 1).flatten()
    return vineppo.step_advantages(chain, torch.zeros_like(chain[1:]))[::2]


def _gigpo(tree: Tree, rewards: Tensor, loss_mask: Tensor) -> Tensor:
    """A step's anchor is the node it starts from, the prompt's roots being one; its return is discounted by step."""
    every, node = path_nodes(tree)
    parent, of_all = parents(tree), torch.arange(tree.num_nodes, device=tree.device)
    # the roots by the number of their tree; the other nodes write to a place that nobody reads
    place = torch.where(parent < 0, tree.node_root, tree.num_roots)
    roots = of_all.new_zeros(tree.num_roots + 1).scatter(0, place, of_all)[:-1]
    groups = tree.leaf_group.new_zeros(tree.num_roots).scatter(0, tree.leaf_root, tree.leaf_group)
    first = (groups[:, None] == groups).int().argmax(1)  # of the roots of its prompt
    anchor = torch.where(parent < 0, roots[first][tree.node_root], of_all)
    # a rollout's first step is its root, from nowhere; the others move up by one for each rollout up to theirs
    count = every.shape[0] - tree.num_leaves
    number = torch.arange(tree.num_leaves, device=tree.device)
    leaf = torch.repeat_interleave(number, tree.depth[tree.leaves], output_size=count)
    step = torch.arange(count, device=tree.device) + leaf + 1
    node = node[step]
    later = tree.depth[tree.leaves[leaf]] - tree.depth[node]
    returns = (rewards[leaf].double() * DISCOUNT ** later.double()).to(rewards.dtype)
    anchor, group = anchor[parent[node]], tree.leaf_group[leaf]
    advantages = gigpo.step_advantages(returns, leaf, anchor, group, episode_rewards=rewards, weight=1.0, scale="none")
    return advantages.new_zeros(every.shape).index_copy(0, step, advantages)


TREE_RECIPES: dict[str, TreeRecipe] = {
    "tree_grpo": TreeRecipe(_tree_grpo, "leaf"),
    "tree_diff": TreeRecipe(_tree_diff, "node"),
    "treerl": TreeRecipe(_treerl, "node"),
    "treepo": TreeRecipe(_treepo, "leaf", within_prompt=True),
    "treerpo": TreeRecipe(_treerpo, "node"),
    "spo": TreeRecipe(_spo, "node", spo.low_probability),
    "vineppo": TreeRecipe(_vineppo, "node"),
    "gigpo": TreeRecipe(_gigpo, "step", within_prompt=True),
}
# what a recipe does besides being a term: it whitens
BEFORE_WHITENING = {"treepo_branches": TreeRecipe(_treepo_branches, "leaf", within_prompt=True)}
