"""Trees of rollouts, each shared prefix once: as they are sampled, and with the credit that an update trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern.credit import Credit, Rollouts
from trajkern.trainer.packing import select


@dataclass(frozen=True, eq=False)
class Forest:
    """The trees of a batch of prompts and what is known of their tokens; ``tree.leaf_group`` is a leaf's prompt."""

    tree: tk.Tree
    tokens: Tensor  # [T]
    loss_mask: Tensor  # [T] bool, True on what the policy wrote
    sampler_logprobs: Tensor  # [T]

    @classmethod
    def from_batch(cls, batch: tk.PackedBatch) -> Forest:
        """The shared prefixes of rollouts sampled one by one; leaf n is trajectory n."""
        assert batch.sampler_logprobs is not None
        tree = tk.Tree.from_trajectories(batch, on_mismatch="split")
        per_token = (x[tree.source] for x in (batch.tokens, batch.loss_mask, batch.sampler_logprobs))
        return cls(replace(tree, source=None), *per_token)

    def batch(self, rewards: Tensor) -> tk.PackedBatch:  # [L]
        """The rollouts one by one; trajectory n is leaf n."""
        tree = self.tree
        tokens, loss_mask, logprobs = (x[tree.flat_index] for x in (self.tokens, self.loss_mask, self.sampler_logprobs))
        bounds, groups = tree.flat_cu_seqlens, tree.leaf_group
        return tk.PackedBatch(tokens, bounds, loss_mask, groups, rewards, sampler_logprobs=logprobs)

    def completions(self) -> list[list[int]]:
        """What the policy wrote in each rollout."""
        index, bounds = self.tree.flat_index, self.tree.flat_cu_seqlens.tolist()
        tokens, written = self.tokens[index], self.loss_mask[index]
        return [tokens[a:b][written[a:b]].tolist() for a, b in pairwise(bounds)]

    def prune(self, keep: Tensor) -> Forest:  # [L] bool
        """The rollouts marked by ``keep`` and what leads to them."""
        tree, nodes = self.tree.pruned(keep)
        tokens = nodes[self.tree.token_node]
        return Forest(tree, *(x[tokens] for x in (self.tokens, self.loss_mask, self.sampler_logprobs)))


@dataclass(frozen=True, eq=False)
class Lesson:
    """What one update trains: rollouts as a forest, and their credit; trajectory n is the path of leaf n."""

    forest: Forest
    credit: Credit

    @classmethod
    def of(cls, credit: Credit, rows: Tensor, forest: Forest | None = None) -> Lesson:  # [N] bool
        """The rollouts marked by ``rows``; ``forest`` is that of all, where there is one."""
        batch = credit.rollouts.batch
        tokens, chosen = torch.repeat_interleave(rows, batch.lengths), select(batch, rows)
        columns = credit.rollouts.rows and [credit.rollouts.rows[n] for n in rows.nonzero().squeeze(1).tolist()]
        forest = Forest.from_batch(chosen) if forest is None else forest.prune(rows)
        of_chosen = replace(
            credit,
            advantages=credit.advantages[tokens],
            mask=credit.mask[tokens],
            keep=credit.keep[rows],
            divergences=tuple((term, weight[tokens]) for term, weight in credit.divergences),
            rollouts=Rollouts(chosen, tree=forest.tree, rows=columns),
            rows=None if credit.rows is None else credit.rows[rows],
        )
        return cls(forest, of_chosen)

    @property
    def flat_tokens(self) -> int:
        """Tokens of the rollouts, each with its own copy of what it shares."""
        return self.credit.mask.shape[0]

    def pairs(self) -> tk.HeadInputs:
        """The tree's rows and targets that learn in some rollout."""
        forest, index = self.forest, self.forest.tree.flat_index
        learns = torch.zeros_like(forest.loss_mask).index_fill(0, index[self.credit.mask], True)
        return forest.tree.pairs(forest.tokens, learns)

    def flat(self, pairs: tk.HeadInputs, per_pair: dict[str, Tensor | None]) -> dict[str, Any]:
        """The arguments of the flat rollouts' loss: what is per pair of the tree, repeated, and the credit."""
        credit, tree = self.credit, self.forest.tree
        at = credit.mask.nonzero().squeeze(1)
        number = torch.zeros(tree.num_tokens, dtype=torch.int64)
        number[pairs.tokens] = torch.arange(len(pairs.tokens))
        index = number[tree.flat_index[at]]
        counted = torch.cat((at.new_zeros(1), credit.mask.cumsum(0)))
        repeated = {name: None if x is None else x[index] for name, x in per_pair.items()}
        return repeated | {"cu_seqlens": counted[tree.flat_cu_seqlens], **credit.loss_inputs(at)}

    def units(self, aggregate: str) -> int:
        """What the loss is divided by: the learning tokens, or the rollouts that have one."""
        mask = self.credit.mask
        if not aggregate.startswith("seq_mean"):
            return int(mask.sum())
        counted = torch.cat((mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)))
        return int((counted[self.forest.tree.flat_cu_seqlens].diff() > 0).sum())

    def pieces(self, most: int | None) -> list[Lesson]:
        """Lessons of at most ``most`` tokens that train the same rollouts; a rollout that is longer stands alone."""
        tree = self.forest.tree
        if most is None or tree.num_tokens <= most:
            return [self]
        paths: list[list[int]] = [[] for _ in range(tree.num_leaves)]
        for leaf, node in zip(*(x.tolist() for x in tree.path_nodes), strict=True):
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
        return [Lesson.of(self.credit, flag, self.forest) for flag in flags]
