"""How tokens see each other: inside packed trajectories, along the paths of a packed tree, and through a cache."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import trajkern as tk
from trajkern.trainer.models.blocks import Layout, blocks

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v [.., heads, head_dim] -> like q
KEY_COST = 16  # fetching the keys of a block costs as much as this many of its queries


def packed_attention(layout: Layout, head_dim: int) -> PackedAttention | TreeAttention:
    return (TreeAttention if isinstance(layout, tk.Tree) else PackedAttention)(layout, head_dim)  # type: ignore[arg-type]


class PackedAttention:
    """Causal attention inside each trajectory of a pack: padded to ``[N, longest]`` for two batched products."""

    def __init__(self, cu_seqlens: Tensor, head_dim: int) -> None:
        self.blocks = blocks(cu_seqlens)
        self.positions = self.blocks.positions
        self.hidden, self.scale = ~self.blocks.visible, 1 / math.sqrt(head_dim)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [T, heads, head_dim] each
        q, k, v = self.blocks.pad(torch.stack((q, k, v), 1)).permute(2, 0, 3, 1, 4)
        scores = (q * self.scale) @ k.transpose(-1, -2)  # padding comes after every real key, so causal hides it
        out = scores.masked_fill_(self.hidden, -torch.inf).softmax(-1) @ v
        return self.blocks.unpad(out.transpose(1, 2))


class TreeAttention:
    """Attention of a packed tree along its paths.

    Each node is cut into pieces of at most ``size`` tokens; a piece's queries meet the keys of the path down to its
    end, so the work grows with tokens times depth, as it does for the flat rollouts, and not with the square of a tree.
    """

    def __init__(self, tree: tk.Tree, head_dim: int) -> None:
        self.positions, self.scale = tree.positions, 1 / math.sqrt(head_dim)
        lengths = tree.node_lengths.long()
        size = _piece_size(lengths)
        pieces = -(-lengths // size)
        node = torch.repeat_interleave(torch.arange(tree.num_nodes), pieces)  # of each piece
        within = torch.arange(tree.num_tokens) - tree.node_offsets[tree.token_node]
        first = pieces.cumsum(0) - pieces
        self.slot = (first[tree.token_node] + within // size) * size + within % size  # [T] among the padded queries
        self.shape = (len(node), size)
        position = torch.zeros(len(node) * size, dtype=torch.int64).index_copy(0, self.slot, self.positions)
        longest = int(position.max()) + 1 if len(position) else 0
        begin = tree.flat_cu_seqlens[tree.leaf_order[tree.leaf_range[0][node]]]  # of one rollout through the piece
        column = torch.arange(longest)
        last = max(tree.flat_index.shape[0] - 1, 0)
        self.path = tree.flat_index[(begin[:, None] + column).clamp_max(last)]  # [pieces, longest] token at a position
        self.hidden = column > position.view(-1, 1, size, 1)  # [pieces, 1, size, longest]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [T, heads, head_dim] each
        heads = q.shape[1:]
        padded = q.new_zeros(self.shape[0] * self.shape[1], *heads).index_copy(0, self.slot, q * self.scale)
        q = padded.view(*self.shape, *heads).transpose(1, 2)
        # an embedding's backward sums the rows of one token in a fixed order, by all threads
        keys = F.embedding(self.path, torch.stack((k, v), 1).flatten(1))
        k, v = keys.unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        out = (q @ k.transpose(-1, -2)).masked_fill_(self.hidden, -torch.inf).softmax(-1) @ v
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.slot)


def _piece_size(lengths: Tensor) -> int:  # [M]
    """The size of pieces that makes padded queries and fetched keys fewest."""
    sizes = [2**i for i in range(2, 11)]
    return min(sizes, key=lambda size: int((-(-lengths // size)).sum()) * (size + KEY_COST))


class Cache:
    """Keys and values of the tokens sampled so far, one row a sequence, one column a position of the padded batch."""

    def __init__(self, keys: Tensor, values: Tensor, keep: Tensor, length: int = 0) -> None:
        self.keys, self.values = keys, values  # [layers, N, heads, room, head_dim]
        self.keep = keep  # [N, room] False on padding
        self.length = length  # columns filled

    def repeat(self, copies: Tensor) -> Cache:  # [N]
        """Row n ``copies[n]`` times, copies adjacent."""
        keys, values = (x.repeat_interleave(copies, 1) for x in (self.keys, self.values))
        return Cache(keys, values, self.keep.repeat_interleave(copies, 0), self.length)

    def select(self, rows: Tensor) -> Cache:  # [R]
        """These rows alone."""
        return Cache(self.keys[:, rows], self.values[:, rows], self.keep[rows], self.length)

    def branch(self, rows: Tensor, ends: Tensor, room: int) -> Cache:  # [R], [R]
        """Row ``rows[i]`` up to its column ``ends[i]``, what lies behind hidden, with ``room`` more columns."""
        keys, values = (F.pad(x[:, rows, :, : self.length], (0, 0, 0, room)) for x in (self.keys, self.values))
        keep = self.keep[rows, : self.length] & (torch.arange(self.length) < ends[:, None])
        return Cache(keys, values, F.pad(keep, (0, room)), self.length)

    def join(self, other: Cache) -> Cache:
        """The rows of both, with as many columns as the longer has."""
        room = max(self.keep.shape[1], other.keep.shape[1])
        parts = [
            [F.pad(x, (0, 0, 0, room - x.shape[3])) for x in (cache.keys, cache.values)]
            + [F.pad(cache.keep, (0, room - cache.keep.shape[1]))]
            for cache in (self, other)
        ]
        keys, values, keep = (torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), (1, 1, 0), strict=True))
        return Cache(keys, values, keep, max(self.length, other.length))


class CachedAttention:
    """Attention of the columns ``begin:end`` over everything cached, which it extends by them."""

    def __init__(self, cache: Cache, begin: int, end: int, head_dim: int) -> None:
        self.cache, self.begin, self.end, self.scale = cache, begin, end, 1 / math.sqrt(head_dim)
        column = torch.arange(end, device=cache.keep.device)
        causal = column <= column[begin:, None]
        # A padded query sees only padding; a finite bias keeps its unused row free of NaN.
        visible = causal & cache.keep[:, None, None, :end]  # [N, 1, S, end]
        bias = torch.zeros(visible.shape, dtype=cache.keys.dtype, device=visible.device)
        self.bias = bias.masked_fill(~visible, torch.finfo(bias.dtype).min)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [N, S, heads, head_dim] each
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[:, :, self.begin : self.end], values[:, :, self.begin : self.end] = k, v
        scores = (q * self.scale) @ keys[:, :, : self.end].transpose(-1, -2) + self.bias
        return (scores.softmax(-1) @ values[:, :, : self.end]).transpose(1, 2)
