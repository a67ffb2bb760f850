"""The weights with which the rollouts of a tree add up to an aggregate."""

from __future__ import annotations

import torch
from torch import Tensor


def aggregate_weights(
    counts: Tensor,  # [L]
    aggregate: str,
    max_length: float | None,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """See :meth:`Tree.leaf_weights`; ``normalizer`` stands for N."""
    counted = (counts > 0).double()
    if aggregate in ("token_sum", "token_mean"):
        return counted
    whole = counted.sum().clamp_min(1) if normalizer is None else normalizer
    weights = torch.where(counts > 0, counted / whole, 0)  # where nothing is counted the normalizer may be 0
    if aggregate == "seq_mean_token_mean":
        return weights / counts.clamp_min(1)
    return weights / max_length if max_length and aggregate == "seq_mean_token_sum_norm" else weights
