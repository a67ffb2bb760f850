"""Who earned the reward: a recipe's advantages, and how the policy loss of a packed tree reads them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern import recipes
from trajkern.trainer.forest import Forest


@dataclass(frozen=True, eq=False)
class Credit:
    """Advantages of a forest's rollouts.

    Args:
        forest: what is trained.
        advantages: ``[L]``, one a rollout; ``[S]``, one a step of every rollout, as ``forest.path_nodes`` has them; or
            one a token of every rollout, as ``forest.tree.flat_index`` has them.
        per: "leaf", "step" or "token".
        loss_mask: bool ``[T]``; the tokens that learn.
    """

    forest: Forest
    advantages: Tensor
    per: str
    loss_mask: Tensor

    def reads_tree(self, config: tk.PolicyLoss) -> bool:
        """Whether ``branch=`` gives this loss exactly; the others read the flat rollouts' log-probs."""
        if self.per == "token" or not config.exact_in_tree:
            return False
        reads_rollouts = config.resolved_ratio_level == "sequence" or config.sampler_correction == "sequence_mask"
        return self.per == "leaf" or not reads_rollouts

    def units(self, aggregate: str) -> int:
        """What the loss is divided by: the scored tokens, or the rollouts that have one."""
        scored = self.loss_mask[self.forest.tree.flat_index]
        if not aggregate.startswith("seq_mean"):
            return int(scored.sum())
        counted = torch.cat((scored.new_zeros(1, dtype=torch.int64), scored.cumsum(0)))
        return int((counted[self.forest.tree.flat_cu_seqlens].diff() > 0).sum())

    def pieces(self, most: int | None) -> list[Credit]:
        """Credits of at most ``most`` tokens that train the same rollouts; a rollout that is longer stands alone."""
        tree = self.forest.tree
        if most is None or tree.num_tokens <= most:
            return [self]
        paths: list[list[int]] = [[] for _ in range(tree.num_leaves)]
        for leaf, node in zip(*(x.tolist() for x in self.forest.path_nodes), strict=True):
            paths[leaf].append(node)
        lengths, room = tree.node_lengths.tolist(), most
        pieces: list[list[int]] = [[]]
        included: set[int] = set()
        for leaf in tree.leaf_order.tolist():  # neighbours share the longest prefixes
            new = sum(lengths[node] for node in paths[leaf] if node not in included)
            if new > room and pieces[-1]:
                pieces.append([])
                included, room, new = set(), most, sum(lengths[node] for node in paths[leaf])
            pieces[-1].append(leaf)
            included.update(paths[leaf])
            room -= new
        flags = torch.zeros(len(pieces), tree.num_leaves, dtype=torch.bool)
        for flag, leaves in zip(flags, pieces, strict=True):
            flag[torch.tensor(leaves)] = True
        return [self.of(flag) for flag in flags]

    def of(self, leaves: Tensor) -> Credit:  # [L] bool
        """The rollouts marked by ``leaves``."""
        tree = self.forest.tree
        owner = torch.arange(tree.num_leaves)
        if self.per == "step":
            owner = self.forest.path_nodes[0]
        elif self.per == "token":
            owner = torch.repeat_interleave(owner, tree.flat_cu_seqlens.diff())
        nodes = self.forest.nodes_of(leaves)
        return Credit(
            self.forest.prune(leaves), self.advantages[leaves[owner]], self.per, self.loss_mask[nodes[tree.token_node]]
        )

    def packed(self, config: tk.PolicyLoss, normalizer: float | None = None) -> dict[str, Any]:
        """``branch``, ``config`` and ``normalizer`` for the pairs of the tree."""
        tree = self.forest.tree
        if self.per == "leaf":
            return {"branch": tk.Paths(tree, self.advantages), "config": config, "normalizer": normalizer}
        aggregate = config.resolved_aggregate
        weights = tree.leaf_weights(self.loss_mask, aggregate, max_length=config.max_length)
        if aggregate.startswith("seq_mean"):
            config = dataclasses.replace(config, aggregate="token_sum")
            if normalizer is not None:
                weights, normalizer = weights * (self.units(aggregate) / normalizer), None
        leaf, node = self.forest.path_nodes
        weights = weights[leaf]
        steps = tk.Branch.of(self.advantages.double(), weights, (weights > 0).double())
        sums = torch.zeros(tree.num_nodes, len(steps), dtype=torch.float64).index_add(0, node, torch.stack(steps, 1))
        branch = tk.Branch(*sums.to(self.advantages.dtype).unbind(1))
        return {"branch": branch, "config": config, "normalizer": normalizer}

    def flat(self, per_pair: dict[str, Tensor | None]) -> dict[str, Any]:
        """The arguments of the flat rollouts' loss: what is per pair of the tree, repeated, and the advantages."""
        index, cu_seqlens = self.forest.flat_pairs(self.loss_mask)
        advantages = self.advantages
        if self.per == "step":
            advantages = torch.repeat_interleave(advantages, self.forest.tree.node_lengths[self.forest.path_nodes[1]])
        if self.per != "leaf":
            advantages = advantages[self.loss_mask[self.forest.tree.flat_index]]
        repeated = {name: None if x is None else x[index] for name, x in per_pair.items()}
        return repeated | {"advantages": advantages, "cu_seqlens": cu_seqlens, "per_token": self.per != "leaf"}


def credit_of(recipe: recipes.TreeRecipe, forest: Forest) -> Credit:
    """What the recipe makes of the forest's rewards."""
    mask = forest.loss_mask
    advantages = recipe.advantages(forest.tree, forest.rewards, mask)
    if recipe.per == "node":
        advantages = advantages[forest.path_nodes[1]]
    learns = mask if recipe.learns is None else mask & recipe.learns(forest.sampler_logprobs)
    return Credit(forest, advantages, "leaf" if recipe.per == "leaf" else "step", learns)
