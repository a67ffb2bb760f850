"""Tiles of the head's logits: their sizes, the products that fill them and use them, the blocks of rows they cover.

A tile is the logits of some rows and a slice of the vocabulary. ``fold`` adds one to the rows' running statistics,
``gradient`` turns one into d loss / d logits; both are the backend's kernels, the matrix products are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._tiles.arguments import Head
from trajkern._tiles.pairs import Pairs
from trajkern._tiles.shards import Shard, shard

# A tile's columns do not depend on the workspace: they are the order of the sums.
COLUMNS = {"cpu": 16384, "cuda": 32768}  # of a tile that is dropped once folded
SLICE = 65536  # columns at a time of whole rows on a CPU: products of fewer are slow, a tile of more leaves the cache
FOLD_ROWS = 2048  # at most
ROW_MULTIPLE = 8  # rows of a tile of whole rows, where the workspace holds more


class Kernels(NamedTuple):
    """A backend's: empty(like, shape, dtype), fold and gradient (see their launchers), and the policy loss."""

    empty: Callable[[Tensor, tuple[int, ...], torch.dtype], Tensor]
    fold: Callable[..., None]
    gradient: Callable[..., None]
    policy_loss: Callable[..., list[Tensor]]


class PairTerms(NamedTuple):
    """Of a block's pairs: their targets in the shard, and what each has of d loss; entropies where they have any."""

    targets: Tensor  # [pairs]
    logprobs: Tensor  # [pairs]
    grad_logprobs: Tensor  # [pairs]
    entropy: Tensor | None  # [pairs]
    grad_entropy: Tensor | None  # [pairs]


class Tiles:
    """Tiles of one call: their sizes, the products that fill and use them, the kernels on them."""

    def __init__(self, head: Head, kernels: Kernels) -> None:
        self.head, self.kernels = head, kernels
        self.temperature, self.softcap, self.logit_scale = head.scales
        narrow, self.workspace = head.options
        half = head.hidden.dtype in (torch.bfloat16, torch.float16)
        self.cpu = head.hidden.is_cpu
        self.dtype = head.hidden.dtype if half and narrow else head.accumulator
        self.shard: Shard = shard(head.group, head.weight)
        self.local = head.targets - self.shard.first
        self.state_dtype = torch.float64 if self.cpu else head.accumulator

    @property
    def size(self) -> int:
        return self.head.weight.shape[0]

    def empty(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.kernels.empty(self.head.hidden, (rows, columns), dtype or self.dtype)

    def fold_shape(self, slots: int) -> tuple[int, int]:
        """(rows, columns) of a tile that is dropped once folded, or recomputed to be a gradient."""
        columns = min(COLUMNS[self.head.hidden.device.type], self.size)
        rows = min(slots, FOLD_ROWS, self.workspace // (columns * self.dtype.itemsize))
        return max(rows, 1), columns

    def whole_rows(self, slots: int) -> tuple[int, int]:
        """(rows, columns of a slice) of a tile of whole rows. The widest shard decides, so that ranks keep step."""
        rows = self.workspace // (self.shard.widest * self.dtype.itemsize)
        if ROW_MULTIPLE <= rows < slots:  # as many in every block
            each = -(-slots // -(-slots // (rows // ROW_MULTIPLE * ROW_MULTIPLE)))
            rows = -(-each // ROW_MULTIPLE) * ROW_MULTIPLE
        return max(1, min(slots, rows)), min(SLICE, self.size) if self.cpu else self.size

    def scale(self, row: Tensor) -> Tensor:
        """1 / temperature of each row."""
        if self.head.temperatures is None:
            return torch.full(row.shape, 1 / self.temperature, dtype=self.state_dtype, device=row.device)
        return 1 / self.head.temperatures[row].to(self.state_dtype)

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> None:
        """softcap(logit_scale (h w + bias)); the temperature is left to the kernels."""
        weight = self.head.weight[columns]
        if self.dtype == weight.dtype:
            torch.mm(hidden, weight.t(), out=out)
        elif self.cpu:
            torch.mm(hidden.to(self.dtype), weight.to(self.dtype).t(), out=out)
        else:
            torch.mm(hidden, weight.t(), out_dtype=self.dtype, out=out)
        if self.head.bias is not None:
            out += self.head.bias[columns]
        if self.logit_scale != 1:
            out *= self.logit_scale
        if self.softcap:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def restrict(self, pairs: Pairs, lo: int, hi: int, columns: slice, z: Tensor) -> None:
        """-inf for what a row's token was not sampled from."""
        ids, offsets = self.head.support_ids, self.head.support_offsets
        if ids is None or offsets is None:
            return
        entry = torch.searchsorted(offsets, torch.arange(ids.shape[0], device=ids.device), right=True) - 1
        slot_of = torch.full((self.head.targets.shape[0],), -1, device=ids.device)
        slot_of[pairs.pair] = pairs.slot
        slot, at = slot_of[entry], ids - self.shard.first
        inside = (slot >= lo) & (slot < hi) & (at >= columns.start) & (at < columns.stop)
        keep = torch.zeros(hi - lo, z.shape[1] + 1, dtype=torch.bool, device=z.device)
        keep[torch.where(inside, slot - lo, 0), torch.where(inside, at - columns.start, z.shape[1])] = True
        z.masked_fill_(~keep[:, :-1], -math.inf)

    def chain(self, grad: Tensor, hidden: Tensor, columns: slice, first: bool, into: Grads, grad_hidden: Any) -> None:
        """Adds a tile of d logits to the gradients of what the logits were made of."""
        weight = self.head.weight[columns]
        if grad_hidden is not None:
            _add_product(grad_hidden, grad, weight, self.cpu)
        if into.weight is not None:
            _add_product(into.weight[columns], grad.t(), hidden, self.cpu, fresh=first)
        if into.bias is not None:
            into.bias[columns] += grad.sum(0, dtype=into.bias.dtype)


def _add_product(into: Tensor, a: Tensor, b: Tensor, cpu: bool, fresh: bool = False) -> None:
    """into (+)= a @ b, in into's precision."""
    if a.dtype != b.dtype or cpu:
        a, b = a.to(into.dtype), b.to(into.dtype)
    if a.dtype != into.dtype:
        torch.addmm(into, a, b, out_dtype=into.dtype, beta=0 if fresh else 1, out=into)
    else:
        torch.addmm(into, a, b, beta=0 if fresh else 1, out=into)


class Grads(NamedTuple):
    """Gradients under way, in the accumulator's precision; what is not needed is None."""

    hidden: Tensor | None  # [T+1, H], the last row for idle slots
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]

    @classmethod
    def of(cls, tiles: Tiles, needs: list[bool], blocks: int) -> Grads:
        """For sums over ``blocks``, of which the first writes the weight's; zero if there is none."""
        head, (hidden, weight, bias) = tiles.head, needs
        tokens, width = head.hidden.shape
        new, into_weight = head.hidden.new_zeros, None
        if weight:
            into_weight = tiles.empty(head.weight.shape[0], width, head.accumulator)
            if not blocks:
                into_weight.zero_()
        return cls(
            new((tokens + 1, width), dtype=head.accumulator) if hidden else None,
            into_weight,
            new(head.weight.shape[0], dtype=torch.float64) if bias else None,
        )

    def finish(self, head: Head, of: Shard) -> list[Tensor]:
        """In the parameters' dtypes; the hidden states' is summed over the vocabulary's shards."""
        done = []
        if self.hidden is not None:
            done.append(of.sum(self.hidden[:-1]).to(head.hidden.dtype))
        done += [x.to(head.weight.dtype) for x in (self.weight, self.bias) if x is not None]
        return done


class Block(NamedTuple):
    """Rows lo:hi of the slots, their hidden states and 1 / temperature, and their pairs."""

    lo: int
    hi: int
    hidden: Tensor  # [R, H]
    scale: Tensor  # [R]
    pairs: slice


def blocks(tiles: Tiles, pairs: Pairs, rows: int) -> Iterator[Block]:
    slots = pairs.row.shape[0]
    for lo in range(0, slots, rows):
        hi = min(lo + rows, slots)
        row = pairs.row[lo:hi]
        hidden = tiles.head.hidden[row]
        if pairs.idle is not None:  # what they would read may be NaN
            hidden = hidden.masked_fill(pairs.idle[lo:hi, None], 0)
        yield Block(lo, hi, hidden, tiles.scale(row), pairs.within(lo, hi))


def part_of(z: Tensor, rows: int, columns: int) -> Tensor:
    """A contiguous tile in the memory of a larger one."""
    return z.view(-1)[: rows * columns].view(rows, columns)


def slices(size: int, columns: int) -> Iterator[slice]:
    for first in range(0, size, columns):
        yield slice(first, min(first + columns, size))
