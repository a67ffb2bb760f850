"""Sizes at the edge of int32: more tokens than a layout counts are refused before any memory is asked for.

The tensors repeat one element, so that nothing here is large."""

import pytest
import torch

import trajkern as tk
from trajkern.layouts._given import MOST_TOKENS

TOO_MANY = MOST_TOKENS + 6


def repeated(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype).expand(count)


def batch_of(length: int, dtype: torch.dtype = torch.int32) -> tk.PackedBatch:
    """One trajectory."""
    bounds = torch.tensor([0, length], dtype=dtype)
    return tk.PackedBatch(torch.zeros(length).int(), bounds, torch.zeros(length).bool(), torch.zeros(1).int())


def chain(nodes: int) -> tk.Tree:
    """A token a node, each below the one before it."""
    return tk.Tree(torch.arange(-1, nodes - 1), torch.ones(nodes, dtype=torch.int64))


def test_a_batch_counts_its_tokens_in_int32():
    mask, bounds = repeated(TOO_MANY, torch.bool), torch.tensor([0, TOO_MANY])
    with pytest.raises(ValueError, match=f"^tokens must be at most {MOST_TOKENS} tokens, got {TOO_MANY}$"):
        tk.PackedBatch(repeated(TOO_MANY, torch.int32), bounds, mask, torch.tensor([0]))
    with pytest.raises(ValueError, match="^loss_mask must be at most"):
        tk.Spans.turns(mask, bounds)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_what_is_taken_more_than_once_is_counted_first(dtype):
    batch, index = batch_of(5000, dtype), repeated(1_000_000, torch.int64)
    for take in (
        batch.__getitem__,
        batch.tokens_of,
        lambda x: tk.Spans.turns(batch.loss_mask, batch.bounds).taken(batch, x),
    ):
        with pytest.raises(ValueError, match=f"^index must be at most {MOST_TOKENS} tokens, got 5000000000$"):
            take(index)
    assert batch[index[:3]].num_tokens == 15_000


def test_batches_end_to_end_are_counted_first():
    batch = batch_of(1 << 20)
    with pytest.raises(ValueError, match=f"^batches must be at most {MOST_TOKENS} tokens, got {1 << 31}$"):
        tk.PackedBatch.concatenate([batch] * (1 << 11), groups="shared")


def test_the_keys_of_a_trees_segments_are_counted_first():
    """Their boundaries are int32, as flash attention reads them, and would wrap around."""
    keys = 100_000 * 100_001 // 2
    tree = chain(100_000)
    with pytest.raises(ValueError, match=f"^attention_segments, .* must be at most {MOST_TOKENS} tokens, got {keys}$"):
        tree.attention_segments  # noqa: B018
    assert tree.flat_lengths.tolist() == [100_000]
    assert chain(1000).attention_segments.keys.shape == (500_500,)
