"""The head's loops over tiles of logits, which the CPU's and the GPU's launchers share.

A tile is the logits of some rows and a slice of the vocabulary. ``fold`` adds one to the rows' running statistics,
``gradient`` turns one into d loss / d logits; both are the backend's kernels, the matrix products are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._tiles.pairs import Head, Pairs, in_range, pairs_of
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


class _Block(NamedTuple):
    """Rows lo:hi of the slots, their hidden states and 1 / temperature, and their pairs."""

    lo: int
    hi: int
    hidden: Tensor  # [R, H]
    scale: Tensor  # [R]
    pairs: slice


def _blocks(tiles: Tiles, pairs: Pairs, rows: int) -> Iterator[_Block]:
    slots = pairs.row.shape[0]
    for lo in range(0, slots, rows):
        hi = min(lo + rows, slots)
        row = pairs.row[lo:hi]
        hidden = tiles.head.hidden[row]
        if pairs.idle is not None:  # what they would read may be NaN
            hidden = hidden.masked_fill(pairs.idle[lo:hi, None], 0)
        yield _Block(lo, hi, hidden, tiles.scale(row), pairs.within(lo, hi))


def part_of(z: Tensor, rows: int, columns: int) -> Tensor:
    """A contiguous tile in the memory of a larger one."""
    return z.view(-1)[: rows * columns].view(rows, columns)


def slices(size: int, columns: int) -> Iterator[slice]:
    for first in range(0, size, columns):
        yield slice(first, min(first + columns, size))


class Folded(NamedTuple):
    """Of a block: per row the maximum and the sums over all but it, see the kernels; per pair the target's logit."""

    state: Tensor  # [R, 4]: max, rest, sum e u, sum e^2
    picked: Tensor  # [pairs]
    total: Tensor | None  # [R] the sum of the logits over the temperature

    @property
    def log_sum(self) -> Tensor:
        return self.state[:, 1].log1p()


def _fold(tiles: Tiles, pairs: Pairs, block: _Block, columns: int, z: Tensor, outputs: int) -> Folded:
    """Statistics of a block's rows; ``z`` keeps the logits where it is wide enough for whole rows."""
    rows = block.hi - block.lo
    state = torch.zeros(rows, 4, dtype=tiles.state_dtype, device=z.device)
    state[:, 0] = -math.inf
    total = state.new_zeros(rows) if outputs & 8 else None
    index = pairs.pair[block.pairs]
    slot = pairs.slot[block.pairs] - block.lo
    local, owned = tiles.local[index], (slot >= 0) & (slot < rows)
    picked = state.new_zeros(index.shape[0])
    for part in slices(tiles.size, columns):
        tile = z[:rows, part] if z.shape[1] == tiles.size else part_of(z, rows, part.stop - part.start)
        tiles.logits(block.hidden, part, tile)
        if total is not None:
            total += tile.sum(1, dtype=state.dtype)
        tiles.restrict(pairs, block.lo, block.hi, part, tile)
        tiles.kernels.fold(tile, block.scale, state, bool(outputs & 3))
        inside = owned & (local >= part.start) & (local < part.stop)
        at = (local - part.start).clamp(0, tile.shape[1] - 1)
        picked = torch.where(inside, tile[slot.clamp(0, rows - 1), at].to(state.dtype), picked)
    if total is not None:
        total *= block.scale
    state, picked, total = tiles.shard.combine(state, block.scale, picked, total)
    state[:, 1] += state[:, 0] - state[:, 0]  # NaN where the maximum is not finite
    return Folded(state, picked, total)


class Stats(NamedTuple):
    """Results under way, of pairs [P] and, for the backward, of keys; the last one is for idle slots."""

    logprobs: Tensor
    norm: Tensor  # [keys + 1, 2] max, rest
    entropy: Tensor | None
    sum_sq_probs: Tensor | None
    is_top1: Tensor | None
    mean_logit: Tensor | None

    @classmethod
    def zeros(cls, head: Head, outputs: int) -> Stats:
        new, dtype = head.hidden.new_zeros, head.accumulator
        count = head.targets.shape[0]
        kinds = (dtype, dtype, torch.bool, dtype)
        wanted = [new(count, dtype=kind) if outputs >> bit & 1 else None for bit, kind in enumerate(kinds)]
        return cls(new(count, dtype=dtype), new(head.keys + 1, 2, dtype=dtype), *wanted)

    def write(self, tiles: Tiles, pairs: Pairs, block: _Block, folded: Folded) -> None:
        """The block's pairs; those of other blocks stay."""
        state, log_sum = folded.state, folded.log_sum
        slot, index = pairs.slot[block.pairs] - block.lo, pairs.pair[block.pairs]
        mine, slot = (slot >= 0) & (slot < state.shape[0]), slot.clamp(0, state.shape[0] - 1)
        count = 1 + state[:, 1]
        z, top = folded.picked, state[slot, 0]

        def put(into: Tensor | None, values: Callable[[], Tensor]) -> None:
            if into is not None:
                into[index] = torch.where(mine, values().to(into.dtype), into[index])

        put(self.logprobs, lambda: (z - top) * block.scale[slot] - log_sum[slot])
        put(self.entropy, lambda: (log_sum - state[:, 2] / count)[slot])
        put(self.sum_sq_probs, lambda: ((1 + state[:, 3]) / count**2)[slot])
        put(self.is_top1, lambda: (z >= top) & (state[slot, 1] >= 0))
        total = folded.total
        put(self.mean_logit, lambda: (total / tiles.shard.vocabulary)[slot] if total is not None else log_sum)
        self.norm[pairs.key[block.lo : block.hi]] = state[:, :2].to(self.norm.dtype)

    def finish(self, tiles: Tiles) -> list[Tensor]:
        """NaN for a GPU's pairs whose row or target does not exist."""
        head = tiles.head
        if not tiles.cpu:
            wrong = ~in_range(head, tiles.shard.vocabulary)
            if head.mask is not None:
                wrong &= head.mask
            self.logprobs.masked_fill_(wrong, math.nan)
        return [self.logprobs, self.norm[:-1], *(x for x in self[2:] if x is not None)]


def linear_token_stats(kernels: Kernels, *args: Any) -> list[Tensor]:
    """[logprobs, norm, the outputs asked for, and with ``unit`` d logprobs / d hidden]."""
    head, (outputs, unit) = Head(*args[:-2]), args[-2:]
    tiles, stats = Tiles(head, kernels), Stats.zeros(head, outputs)
    pairs = pairs_of(head, tiles.shard.vocabulary, head.mask)
    rows, columns = (tiles.whole_rows if unit else tiles.fold_shape)(pairs.row.shape[0])
    z = tiles.empty(rows, tiles.size if unit else columns)
    grads = Grads.of(tiles, [unit, False, False], 0)
    for block in _blocks(tiles, pairs, rows):
        folded = _fold(tiles, pairs, block, columns, z, outputs)
        stats.write(tiles, pairs, block, folded)
        if unit:
            ones = torch.ones_like(stats.logprobs)
            _chain(tiles, pairs, block, columns, z, stats, ones, None, grads, kept=True)
    return stats.finish(tiles) + ([tiles.shard.sum(grads.hidden[:-1])] if grads.hidden is not None else [])


def _chain(
    tiles: Tiles,
    pairs: Pairs,
    block: _Block,
    columns: int,
    z: Tensor,
    stats: Stats,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    grads: Grads,
    *,
    kept: bool,
) -> None:
    """Adds a block to the gradients. ``kept``: ``z`` holds the block's logits; otherwise it has room for a slice."""
    rows = block.hi - block.lo
    index = pairs.pair[block.pairs]
    offsets = pairs.offsets[block.lo : block.hi + 1] - (pairs.offsets[block.lo] if tiles.cpu else 0)
    entropy = None
    if grad_entropy is not None:
        assert stats.entropy is not None
        entropy, grad_entropy = stats.entropy[index], grad_entropy[index]
    made = (tiles.local[index], stats.logprobs[index], grad_logprobs[index], entropy, grad_entropy)
    norm = stats.norm[pairs.key[block.lo : block.hi]]
    grad_hidden = None if grads.hidden is None else norm.new_zeros(rows, block.hidden.shape[1])
    narrow = None
    if not tiles.cpu and tiles.head.weight.dtype != tiles.dtype:
        narrow = tiles.empty(rows, columns, tiles.head.weight.dtype)
    for part in slices(tiles.size, columns):
        width = part.stop - part.start
        tile = z[:rows, part] if kept else part_of(z, rows, width)
        if not kept:
            tiles.logits(block.hidden, part, tile)
            tiles.restrict(pairs, block.lo, block.hi, part, tile)
        grad = tile if narrow is None else part_of(narrow, rows, width)
        tiles.kernels.gradient(
            grad, tile, part.start, norm, block.scale, offsets, *made, tiles.softcap, tiles.logit_scale
        )
        tiles.chain(grad, block.hidden, part, block.lo == 0, grads, grad_hidden)
    if grads.hidden is not None and grad_hidden is not None:
        home = pairs.row[block.lo : block.hi]
        if pairs.idle is not None:
            home = torch.where(pairs.idle[block.lo : block.hi], grads.hidden.shape[0] - 1, home)
        grads.hidden.index_put_((home,), grad_hidden, accumulate=True)


def linear_token_stats_backward(kernels: Kernels, *args: Any) -> list[Tensor]:
    """The gradients that ``needs`` asks for, the logits computed again."""
    head, (grad_logprobs, grad_entropy, logprobs, norm, entropy, needs) = Head(*args[:-6]), args[-6:]
    tiles = Tiles(head, kernels)
    idle = torch.cat((norm, norm.new_zeros(1, 2)))
    stats = Stats(logprobs, idle, entropy, None, None, None)
    pairs = pairs_of(head, tiles.shard.vocabulary, head.mask)
    rows, columns = tiles.fold_shape(pairs.row.shape[0])
    z, grads = tiles.empty(rows, columns), Grads.of(tiles, needs, pairs.row.shape[0])
    for block in _blocks(tiles, pairs, rows):
        _chain(tiles, pairs, block, columns, z, stats, grad_logprobs, grad_entropy, grads, kept=False)
    return grads.finish(head, tiles.shard)


def linear_policy_loss(kernels: Kernels, *args: Any) -> list[Tensor]:
    """[loss, metrics, logprobs, the gradients asked for]: logits once, gradients formed block by block."""
    head, rest = Head(*args[:12]), args[12:]
    old, advantages, cu_seqlens, ref, sampler, normalizer, options, params, outputs, needs = rest
    tiles, stats, has_entropy_term = Tiles(head, kernels), Stats.zeros(head, outputs), params[4] != 0
    if old is None:
        old = stats.logprobs
    else:
        stats.logprobs.copy_(old)  # of pairs not yet computed: finite, and in no sum until the last call

    def policy(form_grads: bool) -> list[Tensor]:
        return kernels.policy_loss(
            stats.logprobs,
            old,
            advantages,
            cu_seqlens,
            head.mask,
            ref,
            sampler,
            stats.entropy,
            None,
            normalizer,
            [*options, int(form_grads), int(form_grads and has_entropy_term)],
            params,
        )

    live = _live(head, advantages, cu_seqlens, options, params)
    pairs = pairs_of(head, tiles.shard.vocabulary, live)
    rows, columns = tiles.whole_rows(pairs.row.shape[0])
    z, grads = tiles.empty(rows, tiles.size), Grads.of(tiles, needs, pairs.row.shape[0])
    for block in _blocks(tiles, pairs, rows):
        stats.write(tiles, pairs, block, _fold(tiles, pairs, block, columns, z, outputs))
        grad_logprobs, *grad_entropy = policy(True)[2:]
        _chain(
            tiles,
            pairs,
            block,
            columns,
            z,
            stats,
            grad_logprobs,
            grad_entropy[0] if grad_entropy else None,
            grads,
            kept=True,
        )
    if live is not head.mask and live is not None:  # no gradient: folded in small tiles
        others = pairs_of(head, tiles.shard.vocabulary, ~live if head.mask is None else head.mask & ~live)
        rows, columns = tiles.fold_shape(others.row.shape[0])
        z = tiles.empty(rows, columns)
        for block in _blocks(tiles, others, rows):
            stats.write(tiles, others, block, _fold(tiles, others, block, columns, z, outputs))
    stats.finish(tiles)
    if head.mask is not None:
        stats.logprobs.masked_fill_(~head.mask, 0)
    return [*policy(False), stats.logprobs, *grads.finish(head, tiles.shard)]


def _live(head: Head, advantages: Tensor, cu_seqlens: Tensor, options: list[int], params: list[float]) -> Tensor | None:
    """The pairs with a gradient; only on a CPU, where asking costs nothing, fewer than the unmasked ones."""
    *_, per_token = options
    kl_coef, entropy_coef = params[3:5]
    if kl_coef or entropy_coef or not head.hidden.is_cpu:
        return head.mask
    live = advantages != 0  # a NaN is
    if live.ndim == 2:  # a branch: sums over positive and over negative advantages, and more
        live = live[0] | live[1]
    if not per_token:
        live = live.repeat_interleave(cu_seqlens.diff(), output_size=head.targets.shape[0])
    if bool(live.all()):
        return head.mask
    return live if head.mask is None else head.mask & live
