"""A pack as rows of equal length, each holding tokens that see only one another: a trajectory, or a whole tree."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import trajkern as tk

Layout = Tensor | tk.Tree  # whose tokens a pack holds: trajectories by their cu_seqlens [N+1], or a tree


class Blocks(NamedTuple):
    """Where each token stands in the padded rows, and what it sees there."""

    positions: Tensor  # [T] position ids
    slot: Tensor  # [T] place in the padded [rows * length]
    rows: int
    length: int
    visible: Tensor  # [length, length] or [rows, 1, length, length] bool

    def pad(self, x: Tensor) -> Tensor:  # [T, ..] -> [rows, length, ..]
        padded = x.new_zeros(self.rows * self.length, *x.shape[1:]).index_copy(0, self.slot, x)
        return padded.view(self.rows, self.length, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:  # [rows, length, ..] -> [T, ..]
        return x.flatten(0, 1).index_select(0, self.slot)


def blocks(layout: Layout) -> Blocks:
    """A row a trajectory, or a row a root with all that is below it."""
    return _of_tree(layout) if isinstance(layout, tk.Tree) else _of_trajectories(layout)


def _of_trajectories(cu_seqlens: Tensor) -> Blocks:
    lengths = cu_seqlens.diff().long()
    count = lengths.numel()
    longest = int(lengths.max()) if count else 0
    trajectory = torch.repeat_interleave(torch.arange(count, device=lengths.device), lengths)
    positions = torch.arange(trajectory.numel(), device=lengths.device) - cu_seqlens.long()[trajectory]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=lengths.device).tril()
    return Blocks(positions, trajectory * longest + positions, count, longest, causal)


def _of_tree(tree: tk.Tree) -> Blocks:
    root = tree.node_root[tree.token_node]  # [T]
    sizes = torch.bincount(root, minlength=tree.num_roots)
    longest = int(sizes.max()) if len(sizes) else 0
    order = root.argsort(stable=True)
    column = torch.empty_like(root)
    column[order] = torch.arange(len(root)) - (sizes.cumsum(0) - sizes)[root[order]]
    rows = Blocks(tree.positions, root * longest + column, tree.num_roots, longest, torch.empty(0))
    begin, end = (x[tree.token_node] for x in tree.leaf_range)
    # what is padded has an empty range of leaves, which no token's path goes through
    begin, end, position = rows.pad(torch.stack((begin, end, tree.positions + 1), 1)).unbind(-1)
    above = (begin[:, None] <= begin[:, :, None]) & (end[:, :, None] <= end[:, None])
    visible = above & (position[:, None] <= position[:, :, None])  # [roots, row, column]
    return rows._replace(visible=visible[:, None])
