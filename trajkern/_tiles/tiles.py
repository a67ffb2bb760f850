"""Tiles of the head's logits: their sizes, the products that fill them and use them, the blocks of rows they cover.

A tile is the logits of some rows and a slice of the vocabulary. ``fold`` adds one to the rows' running statistics,
``gradient`` turns one into d loss / d logits; both are the backend's kernels, the matrix products are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._tiles.arguments import Head
from trajkern._tiles.pairs import Pairs, pairs_of
from trajkern._tiles.shards import Shard, shard

# By whether the host may count. A tile's columns do not depend on the workspace: they are the order of the sums.
COLUMNS = {True: 16384, False: 32768}  # of a tile that is dropped once folded
WORKSPACE = {True: 64 << 20, False: 256 << 20}  # bytes for logits, the least by default
SLICE = 65536  # columns at a time of whole rows on a CPU: products of fewer are slow, a tile of more leaves the cache
FOLD_ROWS = 2048  # at most, of tiles that are only folded
ROW_MULTIPLE = 8  # rows of a tile of whole rows, where the workspace holds more
FEW_ROWS, FEW_COLUMNS = 64, 8192  # below, a product's rows are filled up on a CPU, so many columns at a time
FIXED_ROWS = {True: 64, False: 256}  # of every tile, where a row's bits may not depend on how many there are


class Kernels(NamedTuple):
    """A backend's; its launchers say what each does.

    ``host``: whether counting rows and pairs costs nothing, d logits stay wide and products are the CPU's.
    """

    host: bool
    empty: Callable[[Tensor, tuple[int, ...], torch.dtype], Tensor]
    gather: Callable[..., Tensor]
    fold: Callable[..., None]
    write: Callable[..., None]
    terms: Callable[..., BlockTerms]
    gradient: Callable[..., None]
    scatter: Callable[..., None]
    policy_loss: Callable[..., list[Tensor]]


class BlockTerms(NamedTuple):
    """What a block's gradient is made from. Without ``pair`` and ``key`` the values are the block's own, in order."""

    offsets: Tensor  # [R+1] first pair of each row
    pair: Tensor | None  # index of a pair's values
    key: Tensor | None  # [R] index of a row's norm
    targets: Tensor  # [pairs], in the shard
    logprobs: Tensor  # [pairs]
    grad_logprobs: Tensor  # [pairs]
    entropy: Tensor | None  # [pairs], with grad_entropy
    grad_entropy: Tensor | None  # [pairs]
    norm: Tensor  # [keys, 2] max, rest
    factors: Tensor | None  # [keys, 2] what p is multiplied by at the row's targets, and exp(z - max) / (1 + rest) at
    #                         all others; None: the sum of the targets' grad_logprobs, at both


class Narrowing(NamedTuple):
    """What d logits in 16 bits need so that the gradients made from them are exact.

    Rounding breaks the sum of a row's d logits, which is 0, and with it the part that all rows of the weight have in
    common no longer cancels: ``residual`` is what rounding added to the sum, ``common`` that part. fp16 also ends at
    6e-8, so d logits are multiplied by ``gain``, a power of two.
    """

    residual: Tensor  # [R] float32, sums of one block's rows
    common: Tensor  # [H] float32
    gain: Tensor | None  # [] float32

    def undone(self, grad_hidden: Tensor) -> Tensor:
        """The hidden states' gradient [R, H] without what rounding and the gain did to it."""
        exact = torch.addr(grad_hidden, self.residual, self.common, alpha=-1)
        return exact if self.gain is None else exact / self.gain


class Tiles:
    """Tiles of one call: their sizes, the products that fill and use them, the kernels on them.

    ``size``: of the vocabulary, where the weight's rows from there on stand for no token.
    """

    def __init__(self, head: Head, kernels: Kernels, size: int | None = None) -> None:
        self.head, self.kernels, self.host = head, kernels, kernels.host
        self.temperature, self.softcap, self.logit_scale = head.scales
        narrow, self.workspace, invariant = head.options[:3]
        self.fixed_rows = FIXED_ROWS[self.host] if invariant else None
        half = head.hidden.dtype in (torch.bfloat16, torch.float16)
        self.dtype = head.hidden.dtype if half and narrow else head.accumulator
        self.size = head.weight.shape[0] if size is None else size
        self.shard: Shard = shard(head.group, head.weight if size is None else head.weight[:size])
        first = self.shard.first
        self.local = head.targets - first if first else head.targets
        self.state_dtype = torch.float64 if self.host else head.accumulator

    def pairs(self, keep: Tensor | None) -> Pairs:
        """Those that are kept, in slots that fill the tiles."""
        return pairs_of(self.head, self.shard.vocabulary, keep, exact=self.host, multiple=self.fixed_rows or 1)

    @property
    def narrows(self) -> bool:
        """Whether the products take d logits in the weight's 16 bits; float16's gain would depend on other rows."""
        invariant = self.fixed_rows is not None and self.head.weight.dtype == torch.float16
        return not self.host and not invariant and self.head.weight.dtype.itemsize < self.head.accumulator.itemsize

    def empty(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.kernels.empty(self.head.hidden, (rows, columns), dtype or self.dtype)

    @property
    def writes_weight_itself(self) -> bool:
        """Whether a product may write d weight in its own precision; float16 would lose what a loss scaler saves."""
        return self.narrows and self.head.weight.dtype == torch.bfloat16

    def _bytes(self, slots: int, writes_weight: bool) -> int:
        """For logits: as asked for; else as many as d weight's sum over blocks takes, which one block does without."""
        if self.workspace or not writes_weight:
            return self.workspace or WORKSPACE[self.host]
        total = self.shard.widest * self.head.weight.shape[1] * self.head.accumulator.itemsize
        if self.writes_weight_itself and slots * self.shard.widest * self.dtype.itemsize <= 2 * total:
            total *= 2
        return max(total, WORKSPACE[self.host])

    def fold_shape(self, slots: int, writes_weight: bool = False) -> tuple[int, int]:
        """(rows, columns) of a tile that is dropped once folded, or recomputed to be a gradient.

        Ranks fold a block together, so that the widest shard decides about its rows.
        """
        columns, widest = (min(COLUMNS[self.host], size) for size in (self.size, self.shard.widest))
        if self.fixed_rows is not None:
            return self.fixed_rows, columns
        rows = self._bytes(slots, writes_weight) // (widest * self.dtype.itemsize)
        return max(1, min(slots, rows if writes_weight else min(rows, FOLD_ROWS))), columns

    def whole_rows(self, slots: int, writes_weight: bool = False) -> tuple[int, int]:
        """(rows, columns of a slice) of a tile of whole rows. The widest shard decides, so that ranks keep step."""
        columns = min(SLICE, self.size) if self.host else self.size
        if self.fixed_rows is not None:
            return self.fixed_rows, columns
        rows = self._bytes(slots, writes_weight) // (self.shard.widest * self.dtype.itemsize)
        if ROW_MULTIPLE <= rows < slots:  # as many in every block
            each = -(-slots // -(-slots // (rows // ROW_MULTIPLE * ROW_MULTIPLE)))
            rows = -(-each // ROW_MULTIPLE) * ROW_MULTIPLE
        return max(1, min(slots, rows)), columns

    def scale(self, row: Tensor, unit: float = 1.0) -> Tensor:
        """``unit`` / temperature of each row."""
        if self.head.temperatures is None:
            return torch.full(row.shape, unit / self.temperature, dtype=self.state_dtype, device=row.device)
        temperatures = self.head.temperatures[row].to(self.state_dtype)
        return unit / torch.where((temperatures > 0) & (temperatures < torch.inf), temperatures, torch.nan)

    @property
    def unit(self) -> float:
        """What a softcap's tanh is multiplied by; 1 without one."""
        return self.softcap or 1.0

    def logits(self, hidden: Tensor, columns: slice, out: Tensor, *, capped: bool = False) -> None:
        """logit_scale (h w + bias), or the softcap's tanh of it, times the softcap only if ``capped``.

        Its slope is 1 - tanh^2, of what was rounded once. The temperature is left to the kernels.
        """
        _product(hidden, self.head.weight[columns].t(), out)
        if self.head.bias is not None:
            out += self.head.bias[columns]
        if self.logit_scale != 1:
            out *= self.logit_scale
        if self.softcap:
            out.div_(self.softcap).tanh_()
            if capped:
                out.mul_(self.softcap)

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
        width = z.shape[1] + 1
        keep = torch.zeros((hi - lo) * width, dtype=torch.bool, device=z.device)
        place = torch.where(inside, (slot - lo) * width + (at - columns.start), width - 1)
        keep.index_fill_(0, place, True)
        z.masked_fill_(~keep.view(hi - lo, width)[:, :-1], -torch.inf)

    def gradient_of(self, tile: Tensor) -> Tensor:
        """Where a tile's gradient is written: in its own memory, narrow in the first half of each row."""
        if not self.narrows or tile.dtype == self.head.weight.dtype:
            return tile
        return tile.view(self.head.weight.dtype)[:, : tile.shape[1]]

    def narrowing(self, scale: Tensor, offsets: Tensor | None, *upstream: Tensor | None) -> Narrowing | None:
        """For rows of 1 / temperature ``scale`` whose pairs, between ``offsets``, have these gradients."""
        weight, gain = self.head.weight, None
        if not self.narrows:
            return None
        if weight.dtype == torch.float16:
            sizes = [x.abs().nan_to_num(0.0).amax() for x in upstream if x is not None]  # a NaN is its own row's alone
            largest = torch.stack(sizes).amax()
            if offsets is not None:
                largest = largest * offsets.diff().amax()
            gain = _power_of_two(largest * scale.amax() * abs(self.logit_scale))
        residual = weight.new_empty(scale.shape, dtype=torch.float32)
        return Narrowing(residual, self._common, gain)

    @cached_property
    def _common(self) -> Tensor:
        sample = self.head.weight[: self.size : max(1, self.size // COMMON_ROWS)]
        return sample.mean(0, dtype=torch.float32)

    def chain(
        self,
        grad: Tensor,
        hidden: Tensor,
        columns: slice,
        into: Grads,
        grad_hidden: Tensor | None,
        first_block: bool,
        narrowing: Narrowing | None,
    ) -> None:
        """Adds a tile of d logits to the gradients of what the logits were made of."""
        weight = self.head.weight[columns]
        if grad_hidden is not None:
            is_first = columns.start == 0
            if self.host and grad.shape[0] < FEW_ROWS:
                _add_few(grad, weight, grad_hidden.zero_() if is_first else grad_hidden)
            else:
                _product(grad, weight, grad_hidden, fresh=is_first)
        gain = None if narrowing is None else narrowing.gain
        if into.weight is not None:
            total = into.weight[columns]
            if gain is not None and not first_block:
                total *= gain
            _product(grad.t(), hidden, total, fresh=first_block)
            if gain is not None:
                total /= gain
        if into.bias is not None:
            sums = grad.sum(0, dtype=into.bias.dtype)
            into.bias[columns] += sums if gain is None else sums / gain


COMMON_ROWS = 1024  # of the weight, whose mean stands for what all of them have in common
GAIN = 8  # of fp16: the largest d logits lie below 2^8


def _power_of_two(largest: Tensor) -> Tensor:
    """That brings ``largest`` to between half of 2^GAIN and 2^GAIN."""
    exponent = torch.frexp(largest.float().clamp(2.0**-100, 2.0**100))[1]
    return ((127 + GAIN - exponent) << 23).view(torch.float32)  # its bits; exp2 need not be exact on a GPU


def _product(a: Tensor, b: Tensor, out: Tensor, fresh: bool = True) -> None:
    """out (+)= a @ b, added up in out's precision or better; narrower matrices are multiplied as they are."""
    if a.is_cpu and a.dtype != out.dtype or a.dtype != b.dtype:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if fresh else torch.addmm(out, a, b, out=out)
    elif fresh:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _add_few(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b with as many rows as give every thread a whole block of them.

    MKL adds up one by one, onto what is there already, where a thread has fewer than four (seen on AMD's processors):
    ten times the error for sums as long as a vocabulary.
    """
    count, multiple = a.shape[0], 8 * torch.get_num_threads()
    filled = torch.zeros(-(-count // multiple) * multiple, min(a.shape[1], FEW_COLUMNS), dtype=out.dtype, device="cpu")
    for part in slices(a.shape[1], FEW_COLUMNS):
        rows = filled[:, : part.stop - part.start]
        rows[:count] = a[:, part]
        out += torch.mm(rows, b[part].to(out.dtype))[:count]


class Grads(NamedTuple):
    """Gradients under way; what is not needed is None."""

    hidden: Tensor | None  # [T+1, H], in its own precision where each row is written once; the last for idle slots
    weight: Tensor | None  # [V, H], in its own where one block writes it
    bias: Tensor | None  # [V]
    keeps_wide: bool

    @classmethod
    def of(
        cls, tiles: Tiles, needs: Any, blocks: int, *, keeps_wide: bool = False, writes_rows_once: bool = False
    ) -> Grads:
        """For sums over ``blocks``, of which the first writes the weight's; zero if there is none.

        ``keeps_wide``: whether what fp16 could not hold waits for the upstream factor.
        """
        head, (hidden, weight, bias) = tiles.head, needs
        tokens, width = head.hidden.shape
        keeps_wide = keeps_wide and head.weight.dtype == torch.float16
        new, into_weight = head.hidden.new_zeros, None
        narrow = tiles.narrows and writes_rows_once and tiles.shard.group is None and not keeps_wide
        if weight:
            direct = tiles.writes_weight_itself and blocks == 1
            dtype = head.weight.dtype if direct else head.accumulator
            into_weight = head.weight.new_empty((head.weight.shape[0], width), dtype=dtype)
            written = tiles.size if blocks else 0
            if written < into_weight.shape[0]:
                into_weight[written:].zero_()
        return cls(
            new((tokens + 1, width), dtype=head.hidden.dtype if narrow else head.accumulator) if hidden else None,
            into_weight,
            new(head.weight.shape[0], dtype=torch.float64) if bias else None,
            keeps_wide,
        )

    def finish(self, head: Head, of: Shard) -> list[Tensor]:
        """In the parameters' dtypes, or wide; the hidden states' is summed over the vocabulary's shards."""
        dtype = head.accumulator if self.keeps_wide else head.hidden.dtype
        done = []
        if self.hidden is not None:
            done.append(of.sum(self.hidden[:-1]).to(dtype))
        return done + [x.to(dtype) for x in (self.weight, self.bias) if x is not None]


class Block(NamedTuple):
    """Rows lo:hi of the slots, their hidden states and unit / temperature."""

    lo: int
    hi: int
    hidden: Tensor  # [R, H]
    scale: Tensor  # [R]


def blocks(tiles: Tiles, pairs: Pairs, rows: int) -> Iterator[Block]:
    slots = pairs.row.shape[0]
    scale = tiles.scale(pairs.row, tiles.unit)
    for lo in range(0, slots, rows):
        hi = min(lo + rows, slots)
        idle = None if pairs.idle is None else pairs.idle[lo:hi]
        yield Block(lo, hi, tiles.kernels.gather(tiles.head.hidden, pairs.row[lo:hi], idle), scale[lo:hi])


def part_of(z: Tensor, rows: int, columns: int) -> Tensor:
    """A contiguous tile in the memory of a larger one."""
    return z.view(-1)[: rows * columns].view(rows, columns)


def slices(size: int, columns: int) -> Iterator[slice]:
    for first in range(0, size, columns):
        yield slice(first, min(first + columns, size))
