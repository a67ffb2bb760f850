"""The head's ops as loops over tiles of logits, which the CPU's and the GPU's launchers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._tiles.arguments import Head
from trajkern._tiles.pairs import Pairs, in_range, pairs_of
from trajkern._tiles.tiles import Block, Grads, Kernels, PairTerms, Tiles, blocks, part_of, slices
from trajkern.losses.inputs import LossInputs


class Folded(NamedTuple):
    """Of a block: per row the maximum and the sums over all but it, see the kernels; per pair the target's logit."""

    state: Tensor  # [R, 4]: max, rest, sum e u, sum e^2
    picked: Tensor  # [pairs]
    total: Tensor | None  # [R] the sum of the logits over the temperature

    @property
    def log_sum(self) -> Tensor:
        return self.state[:, 1].log1p()


def _fold(tiles: Tiles, pairs: Pairs, block: Block, columns: int, z: Tensor, outputs: int) -> Folded:
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

    def write(self, tiles: Tiles, pairs: Pairs, block: Block, folded: Folded) -> None:
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
    head, (outputs, unit) = Head.split(args)
    tiles, stats = Tiles(head, kernels), Stats.zeros(head, outputs)
    pairs = pairs_of(head, tiles.shard.vocabulary, head.mask)
    rows, columns = (tiles.whole_rows if unit else tiles.fold_shape)(pairs.row.shape[0])
    z = tiles.empty(rows, tiles.size if unit else columns)
    grads = Grads.of(tiles, [unit, False, False], 0)
    for block in blocks(tiles, pairs, rows):
        folded = _fold(tiles, pairs, block, columns, z, outputs)
        stats.write(tiles, pairs, block, folded)
        if unit:
            ones = torch.ones_like(stats.logprobs)
            _chain(tiles, pairs, block, columns, z, stats, ones, None, grads, has_logits=True)
    return stats.finish(tiles) + ([tiles.shard.sum(grads.hidden[:-1])] if grads.hidden is not None else [])


def _chain(
    tiles: Tiles,
    pairs: Pairs,
    block: Block,
    columns: int,
    z: Tensor,
    stats: Stats,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
    grads: Grads,
    *,
    has_logits: bool,
) -> None:
    """Adds a block to the gradients. ``has_logits``: ``z`` holds the block's logits; else it has room for a slice."""
    rows = block.hi - block.lo
    index = pairs.pair[block.pairs]
    offsets = pairs.offsets[block.lo : block.hi + 1] - (pairs.offsets[block.lo] if tiles.cpu else 0)
    entropy = None
    if grad_entropy is not None:
        assert stats.entropy is not None
        entropy, grad_entropy = stats.entropy[index], grad_entropy[index]
    terms = PairTerms(tiles.local[index], stats.logprobs[index], grad_logprobs[index], entropy, grad_entropy)
    norm = stats.norm[pairs.key[block.lo : block.hi]]
    grad_hidden = None if grads.hidden is None else norm.new_zeros(rows, block.hidden.shape[1])
    narrow = None
    if not tiles.cpu and tiles.head.weight.dtype != tiles.dtype:
        narrow = tiles.empty(rows, columns, tiles.head.weight.dtype)
    for part in slices(tiles.size, columns):
        width = part.stop - part.start
        tile = z[:rows, part] if has_logits else part_of(z, rows, width)
        if not has_logits:
            tiles.logits(block.hidden, part, tile)
            tiles.restrict(pairs, block.lo, block.hi, part, tile)
        grad = tile if narrow is None else part_of(narrow, rows, width)
        tiles.kernels.gradient(
            grad, tile, part.start, norm, block.scale, offsets, terms, tiles.softcap, tiles.logit_scale
        )
        tiles.chain(grad, block.hidden, part, block.lo == 0, grads, grad_hidden)
    if grads.hidden is not None and grad_hidden is not None:
        home = pairs.row[block.lo : block.hi]
        if pairs.idle is not None:
            home = torch.where(pairs.idle[block.lo : block.hi], grads.hidden.shape[0] - 1, home)
        grads.hidden.index_put_((home,), grad_hidden, accumulate=True)


def linear_token_stats_backward(kernels: Kernels, *args: Any) -> list[Tensor]:
    """The gradients that ``needs`` asks for, the logits computed again."""
    head, (grad_logprobs, grad_entropy, logprobs, norm, entropy, needs) = Head.split(args)
    tiles = Tiles(head, kernels)
    idle = torch.cat((norm, norm.new_zeros(1, 2)))
    stats = Stats(logprobs, idle, entropy, None, None, None)
    pairs = pairs_of(head, tiles.shard.vocabulary, head.mask)
    rows, columns = tiles.fold_shape(pairs.row.shape[0])
    z, grads = tiles.empty(rows, columns), Grads.of(tiles, needs, pairs.row.shape[0])
    for block in blocks(tiles, pairs, rows):
        _chain(tiles, pairs, block, columns, z, stats, grad_logprobs, grad_entropy, grads, has_logits=False)
    return grads.finish(head, tiles.shard)


def linear_policy_loss(kernels: Kernels, *args: Any) -> list[Tensor]:
    """[loss, metrics, logprobs, the gradients asked for]: logits once, gradients formed block by block."""
    head, others = Head.split(args)
    *inputs, outputs, needs = others
    loss_inputs = LossInputs(*inputs)._replace(mask=head.mask)
    tiles, stats = Tiles(head, kernels), Stats.zeros(head, outputs)
    if loss_inputs.old_logprobs is None:
        loss_inputs = loss_inputs._replace(old_logprobs=stats.logprobs)
    else:
        stats.logprobs.copy_(
            loss_inputs.old_logprobs
        )  # of pairs not yet computed: finite, in no sum until the last call

    def policy(form_grads: bool) -> list[Tensor]:
        forms_entropy = form_grads and loss_inputs.parameter("entropy_coef") != 0
        options = [*loss_inputs.options, int(form_grads), int(forms_entropy)]
        return kernels.policy_loss(stats.logprobs, stats.entropy, None, *loss_inputs._replace(options=options))

    live = _live(head, loss_inputs)
    pairs = pairs_of(head, tiles.shard.vocabulary, live)
    rows, columns = tiles.whole_rows(pairs.row.shape[0])
    z, grads = tiles.empty(rows, tiles.size), Grads.of(tiles, needs, pairs.row.shape[0])
    for block in blocks(tiles, pairs, rows):
        stats.write(tiles, pairs, block, _fold(tiles, pairs, block, columns, z, outputs))
        grad_logprobs, *grad_entropy = policy(True)[2:]
        upstream = grad_logprobs, grad_entropy[0] if grad_entropy else None
        _chain(tiles, pairs, block, columns, z, stats, *upstream, grads, has_logits=True)
    if live is not head.mask and live is not None:  # no gradient: folded in small tiles
        others_live = ~live if head.mask is None else head.mask & ~live
        _fold_all(tiles, pairs_of(head, tiles.shard.vocabulary, others_live), stats, outputs)
    stats.finish(tiles)
    if head.mask is not None:
        stats.logprobs.masked_fill_(~head.mask, 0)
    return [*policy(False), stats.logprobs, *grads.finish(head, tiles.shard)]


def _fold_all(tiles: Tiles, pairs: Pairs, stats: Stats, outputs: int) -> None:
    """The statistics of pairs whose logits nothing reads again."""
    rows, columns = tiles.fold_shape(pairs.row.shape[0])
    z = tiles.empty(rows, columns)
    for block in blocks(tiles, pairs, rows):
        stats.write(tiles, pairs, block, _fold(tiles, pairs, block, columns, z, outputs))


def _live(head: Head, inputs: LossInputs) -> Tensor | None:
    """The pairs with a gradient; only on a CPU, where asking costs nothing, fewer than the unmasked ones."""
    if inputs.parameter("kl_coef") or inputs.parameter("entropy_coef") or not head.hidden.is_cpu:
        return head.mask
    live = inputs.advantages != 0  # a NaN is
    if live.ndim == 2:  # a branch: sums over positive and over negative advantages, and more
        live = live[0] | live[1]
    if not inputs.per_token:
        live = live.repeat_interleave(inputs.cu_seqlens.diff(), output_size=head.targets.shape[0])
    if bool(live.all()):
        return head.mask
    return live if head.mask is None else head.mask & live
