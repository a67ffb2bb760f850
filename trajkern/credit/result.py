"""What a credit returns, and how the losses read it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajkern._checks import check_divisor, check_instance, check_places
from trajkern._results import Branch
from trajkern.credit.rollouts import Rollouts
from trajkern.layouts._leaf_weights import aggregate_weights
from trajkern.layouts.tree import Tree
from trajkern.losses.config import PolicyLoss
from trajkern.ops.span import spread
from trajkern.ops.tree_loss import Paths


@dataclass(frozen=True, eq=False, repr=False)
class Credit:
    """The advantage of each token, and who learns.

    Attributes:
        advantages: ``[T]`` float32 (float64 where something that was read is), 0 where ``mask`` is False.
        mask: bool ``[T]``, the tokens that learn: of the loss mask, those of a term that reaches them in a rollout that
            it keeps.
        keep: bool ``[N]``: the rollouts that some term keeps. The others are in no statistic of a gated term, and their
            tokens not in ``mask``, so they count in no normaliser.
        metrics: tensors without dimensions on the device, this rank's: each term's mean and deviation over the tokens
            that it reaches, before any weight, and the shares of rollouts ``kept`` and of learning tokens that are
            ``positive``.
        reached: of each term of ``metrics``, how many tokens it reaches: what several ranks' are pooled by.
        divergences: (term, weight of each token ``[T]``) of every :func:`trajkern.credit.divergence`: terms of the loss
            that need the policy's logits.
    """

    advantages: Tensor
    mask: Tensor
    keep: Tensor
    metrics: dict[str, Tensor]
    reached: dict[str, Tensor]
    divergences: tuple[tuple[Any, Tensor], ...]
    rollouts: Rollouts
    rows: Tensor | None  # [N], the rollouts' own advantages where every term is a rollout's and reaches all its tokens

    def __repr__(self) -> str:
        """Its sizes and metrics' names, in a line."""
        tokens, rollouts = self.mask.shape[0], self.keep.shape[0]
        return f"Credit(tokens={tokens}, rollouts={rollouts}, metrics={[*self.metrics]}, on {self.mask.device})"

    def loss_inputs(self, at: Tensor | None = None) -> dict[str, Any]:
        """Arguments of :func:`trajkern.policy_loss`: advantages, mask, per_token.

        Args:
            at: int64 ``[P]``: the tokens that the log-probs belong to, such as ``batch.head_inputs().tokens``; None:
                all of the pack.
        """
        advantages, mask = self.advantages, self.mask
        if at is not None:
            check_places("at", at, mask.shape[0], device=mask.device)
            advantages, mask = advantages[at], mask[at]
        return {"advantages": advantages, "mask": mask, "per_token": True}

    def fits_tree(self, config: PolicyLoss) -> bool:
        """Whether :meth:`tree_inputs` gives this loss exactly; the others read the flat rollouts."""
        check_instance("config", config, PolicyLoss)
        reads_rollouts = config.resolved_ratio_level == "sequence" or config.sampler_correction == "sequence_mask"
        return config.exact_in_tree and (self.rows is not None or not reads_rollouts)

    def tree_inputs(
        self, config: PolicyLoss, at: Tensor | None = None, normalizer: float | Tensor | None = None
    ) -> dict[str, Any]:
        """Arguments of :func:`trajkern.policy_loss` for log-probs of the packed tree's tokens, each prefix once.

        Gives advantages (None), branch, mask, per_token, config and normalizer. The loss and its gradient are those of
        the flat rollouts.

        Args:
            config: of the loss.
            at: the tree's tokens that the log-probs belong to, such as ``tree.pairs(...).tokens``; None: all of them.
            normalizer: what the loss is divided by, as in :func:`trajkern.policy_loss`: of a micro-batch, what all of
                them count together. None: what these rollouts count.

        Raises:
            ValueError: the rollouts have no tree; or this loss is not exact on one with these advantages: train the
                flat rollouts, ``logprobs[tree.flat_index]`` with :meth:`loss_inputs`.
        """
        tree = self.rollouts.tree
        if tree is None:
            raise ValueError("tree_inputs needs rollouts with a tree; these have none")
        if at is not None:
            check_places("at", at, tree.num_tokens, device=self.mask.device)
        check_divisor("normalizer", normalizer, self.mask.device)
        if not self.fits_tree(config):
            what = "whole rollouts, and these advantages differ inside of one" if config.exact_in_tree else "flat rows"
            raise ValueError(
                f"kind {config.kind!r} (ratio level {config.resolved_ratio_level!r}, sampler correction "
                f"{config.sampler_correction!r}) reads {what}; take logprobs[tree.flat_index] and loss_inputs()"
            )
        learns = packed_any(self.mask, tree)
        inputs = {"advantages": None, "mask": learns if at is None else learns[at], "normalizer": normalizer}
        if self.rows is not None:
            return inputs | {"branch": Paths(tree, self.rows, self.keep), "per_token": None, "config": config}
        branch, summed = token_branch(self.advantages, self.mask, tree, config, normalizer)
        if at is not None:
            branch = Branch(*(x[at] for x in branch))
        if summed is not config:
            inputs["normalizer"] = None  # it is in the branch's weights
        return inputs | {"branch": branch, "per_token": True, "config": summed}


def packed_any(flat: Tensor, tree: Tree) -> Tensor:  # [T of the flat rollouts] bool
    """Whether some rollout marks a token of the packed tree, bool ``[T]``."""
    marked = torch.zeros(tree.num_tokens, dtype=torch.int32, device=flat.device)
    return marked.index_add(0, tree.flat_index, flat.int()) > 0


def token_branch(
    advantages: Tensor,  # [T of the flat rollouts]
    mask: Tensor,
    tree: Tree,
    config: PolicyLoss,
    normalizer: float | Tensor | None = None,
) -> tuple[Branch, PolicyLoss]:
    """Sums per packed token of flat advantages and masks, and the loss that reads them.

    A rollout's tokens have the weight that the aggregation gives them, times whether they learn.
    """
    aggregate, index = config.resolved_aggregate, tree.flat_index
    owner = torch.repeat_interleave(
        torch.arange(tree.num_leaves, device=mask.device), tree.flat_lengths, output_size=index.shape[0]
    )
    counts = torch.zeros(tree.num_leaves, dtype=torch.int64, device=mask.device).index_add(0, owner, mask.long())
    weights = aggregate_weights(counts, aggregate, config.max_length, normalizer)[owner] * mask
    if aggregate.startswith("seq_mean"):
        config = dataclasses.replace(config, aggregate="token_sum")
    parts = Branch.of(advantages.double(), weights, mask.double())
    sums = torch.zeros(tree.num_tokens, len(parts), dtype=torch.float64, device=mask.device)
    sums = sums.index_put((index,), torch.stack(parts, 1), accumulate=True)  # sorted on a GPU: the order is fixed
    return Branch(*sums.to(advantages.dtype).unbind(1)), config


def to_tokens(rows: Tensor, rollouts: Rollouts) -> Tensor:  # [N]
    """Each token's rollout's value, ``[T]``."""
    return spread(rows, rollouts.whole)
