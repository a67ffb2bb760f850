"""What one update trains: a tree of rollouts, each shared prefix once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

import trajkern as tk
from trajkern import recipes


@dataclass(frozen=True, eq=False)
class Forest:
    """The trees of a batch of prompts and what is known of their tokens; ``tree.leaf_group`` is a leaf's prompt."""

    tree: tk.Tree
    tokens: Tensor  # [T]
    loss_mask: Tensor  # [T] bool, True on what the policy wrote
    sampler_logprobs: Tensor  # [T]
    rewards: Tensor  # [L]

    @classmethod
    def from_batch(cls, batch: tk.PackedBatch) -> Forest:
        """The shared prefixes of rollouts sampled one by one; leaf n is trajectory n."""
        assert batch.rewards is not None and batch.sampler_logprobs is not None
        tree = tk.Tree.from_trajectories(batch, on_mismatch="split")
        tokens, loss_mask, logprobs = (x[tree.source] for x in (batch.tokens, batch.loss_mask, batch.sampler_logprobs))
        return cls(tree, tokens, loss_mask, logprobs, batch.rewards)

    @property
    def flat_tokens(self) -> int:
        """Tokens of the rollouts, each with its own copy of what it shares."""
        return self.tree.flat_index.shape[0]

    @cached_property
    def path_nodes(self) -> tuple[Tensor, Tensor]:
        """(leaf, node) of every step of every rollout, rollout after rollout from its root down, ``[S]`` each."""
        return recipes.path_nodes(self.tree)

    def completions(self) -> list[list[int]]:
        """What the policy wrote in each rollout."""
        index, bounds = self.tree.flat_index, self.tree.flat_cu_seqlens.tolist()
        tokens, written = self.tokens[index], self.loss_mask[index]
        return [tokens[a:b][written[a:b]].tolist() for a, b in pairwise(bounds)]

    def flat_pairs(self, loss_mask: Tensor) -> tuple[Tensor, Tensor]:  # [T]
        """For the flat rollouts' scored tokens, their pair among the tree's; and how the rollouts bound them, [L+1]."""
        number = loss_mask.cumsum(0) - 1
        index, bounds = self.tree.flat_index, self.tree.flat_cu_seqlens
        scored = loss_mask[index]
        counted = torch.cat((scored.new_zeros(1, dtype=torch.int64), scored.cumsum(0)))
        return number[index[scored]], counted[bounds]

    def nodes_of(self, leaves: Tensor) -> Tensor:  # [L] bool
        """The nodes on the paths of the rollouts marked by ``leaves``, bool ``[M]``."""
        return tk.subtree_reduce(leaves.float(), self.tree, "max") > 0

    def prune(self, keep: Tensor) -> Forest:  # [L] bool
        """The rollouts marked by ``keep`` and what leads to them."""
        tree, nodes = self.tree, self.nodes_of(keep)
        number = nodes.cumsum(0) - 1
        parent = tree.parent[nodes]
        parent = torch.where(parent < 0, -1, number[parent])
        groups = torch.arange(tree.num_roots) if tree.group_ids is None else tree.group_ids
        roots = nodes[tree.parent < 0]
        tokens = nodes[tree.token_node]
        return Forest(
            tk.Tree(parent, tree.node_lengths[nodes], groups[roots]),
            self.tokens[tokens],
            self.loss_mask[tokens],
            self.sampler_logprobs[tokens],
            self.rewards[keep],
        )
