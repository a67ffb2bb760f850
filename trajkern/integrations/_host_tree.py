"""What a host's trees of rollouts become: the tree of what they share, and the rollouts that it is exact for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import trajkern as tk


class TreeRollouts(NamedTuple):
    """Rollouts of a host and the tree of what they share; leaf n of the tree ends rollout n.

    The model runs each of the tree's T tokens once. Its log-probs ``x[tree.flat_index]`` are those of the F tokens of
    the rollouts, of which each has a mask, an old log-prob and an advantage of its own, so that any loss is exact::

        logprobs = log_probs(model, rollouts.tree, rollouts.tokens, rollouts.loss_mask)[rollouts.tree.flat_index]
        batch = rollouts.batch
        loss, metrics = tk.policy_loss(
            logprobs, batch.old_logprobs, rollouts.advantages, batch.cu_seqlens, mask=batch.loss_mask, per_token=True,
            config=config)
    """

    tree: tk.Tree  # without group ids: rollouts of several prompts may share a root
    batch: tk.PackedBatch  # the rollouts, each whole: F tokens, their loss masks and log-probs; group ids [N]
    tokens: Tensor  # [T]
    advantages: Tensor  # [F]

    @property
    def loss_mask(self) -> Tensor:
        """The tree's tokens that some rollout learns, bool ``[T]``."""
        learnt = torch.zeros_like(self.tokens, dtype=torch.bool)
        learnt[self.tree.flat_index[self.batch.loss_mask]] = True
        return learnt
