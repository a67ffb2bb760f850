"""Who sees whom in a tree: as a dense mask, or as flex_attention wants it, in memory that grows with the tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BLOCK = 128


def block_mask(visible: Callable[..., Tensor], tokens: int, device: torch.device) -> Any:
    """The ``BlockMask`` of ``visible(batch, head, row, column)`` over ``tokens`` rows and columns."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-tokens // BLOCK)
    some, whole = (torch.zeros(blocks, blocks, dtype=torch.bool, device=device) for _ in range(2))
    column = torch.arange(blocks * BLOCK, device=device).clamp_max(max(tokens - 1, 0))
    real = torch.arange(blocks * BLOCK, device=device) < tokens
    for b in range(blocks):
        rows = slice(b * BLOCK, (b + 1) * BLOCK)
        seen = visible(None, None, column[rows, None], column) & real & real[rows, None]
        seen = seen.view(BLOCK, blocks, BLOCK)
        some[b], whole[b] = seen.any(2).any(0), seen.all(2).all(0)
    partial = some & ~whole

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        count = chosen.sum(1, dtype=torch.int32)
        return count[None, None], chosen.int().argsort(dim=1, descending=True, stable=True).int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(tokens, tokens)
    )


def path_mask(begin: Tensor, end: Tensor, position: Tensor, dense: bool) -> Any:
    """Of tokens ``[T]`` with these ranges of leaves below them and these positions: see ``Tree.attention_mask``."""

    def visible(batch: Any, head: Any, row: Tensor, column: Tensor) -> Tensor:
        """An earlier token on the same path: the leaves below it hold those below the row's."""
        inside = (begin[column] <= begin[row]) & (end[row] <= end[column])
        return inside & (position[column] <= position[row])

    tokens, device = position.shape[0], position.device
    if not dense:
        return block_mask(visible, tokens, device)
    token = torch.arange(tokens, device=device)
    return visible(None, None, token[:, None], token)[None, None]
