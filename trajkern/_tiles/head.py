"""The head's ops as loops over tiles of logits, which the CPU's and the GPU's launchers share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._tiles.arguments import Head
from trajkern._tiles.pairs import Pairs, in_range
from trajkern._tiles.tiles import Block, Grads, Kernels, Tiles, blocks, part_of, slices
from trajkern.losses.inputs import LossInputs, joined


class Folded(NamedTuple):
    """Of a block: per row the maximum and the sums over all but it, see the kernels; per pair the target's logit."""

    state: Tensor  # [R, 4]: max, rest, sum e u, sum e^2
    picked: Tensor  # [P'], of the block's own pairs
    total: Tensor | None  # [R] the sum of the logits over the temperature


def _fold(tiles: Tiles, pairs: Pairs, block: Block, columns: int, z: Tensor, outputs: int) -> Folded:
    """Statistics of a block's rows; ``z`` keeps the logits where it is wide enough for whole rows."""
    rows = block.hi - block.lo
    state = torch.empty(rows, 4, dtype=tiles.state_dtype, device=z.device)
    total = state.new_zeros(rows) if outputs & 8 else None
    picked = state.new_zeros(pairs.pair.shape) if tiles.shard.group else state.new_empty(pairs.pair.shape)
    for part in slices(tiles.size, columns):
        tile = z[:rows, part] if z.shape[1] == tiles.size else part_of(z, rows, part.stop - part.start)
        tiles.logits(block.hidden, part, tile)
        if total is not None:
            total += tile.sum(1, dtype=state.dtype)
        tiles.restrict(pairs, block.lo, block.hi, part, tile)
        tiles.kernels.fold(tile, part.start, block, state, picked, pairs, tiles.local, bool(outputs & 3))
    if total is not None:
        total *= block.scale
    return Folded(*tiles.shard.combine(state, block.scale, picked, total))


class Upstream(NamedTuple):
    """What reaches the pairs [P] of a loss."""

    grad_logprobs: Tensor
    grad_entropy: Tensor | None = None
    factors: Tensor | None = None  # [keys + 1, 2], see the gradient kernels


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

    def finish(self, tiles: Tiles) -> list[Tensor]:
        """NaN for pairs whose row or target does not exist, where nobody could check them."""
        head = tiles.head
        if not tiles.host:
            wrong = ~in_range(head, tiles.shard.vocabulary)
            if head.mask is not None:
                wrong &= head.mask
            self.logprobs.masked_fill_(wrong, math.nan)
        return [self.logprobs, self.norm[:-1], *(x for x in self[2:] if x is not None)]


def linear_token_stats(kernels: Kernels, *args: Any) -> list[Tensor]:
    """[logprobs, norm, the outputs asked for, and with ``unit`` d logprobs / d hidden]."""
    head, (outputs, unit) = Head.split(args)
    tiles, stats = Tiles(head, kernels), Stats.zeros(head, outputs)
    pairs = tiles.pairs(head.mask)
    rows, columns = (tiles.whole_rows if unit else tiles.fold_shape)(pairs.row.shape[0])
    z = tiles.empty(rows, tiles.size if unit else columns)
    grads = Grads.of(tiles, [unit, False, False], 0)
    for block in blocks(tiles, pairs, rows):
        kernels.write(stats, pairs, block, _fold(tiles, pairs, block, columns, z, outputs), tiles.shard.vocabulary)
        if unit:
            upstream = Upstream(torch.ones_like(stats.logprobs))
            chain(tiles, pairs, block, columns, z, stats, upstream, grads, has_logits=True)
    return stats.finish(tiles) + ([tiles.shard.sum(grads.hidden[:-1])] if grads.hidden is not None else [])


def chain(
    tiles: Tiles,
    pairs: Pairs,
    block: Block,
    columns: int,
    z: Tensor,
    stats: Stats,
    upstream: Upstream,
    grads: Grads,
    *,
    has_logits: bool,
) -> None:
    """Adds a block to the gradients. ``has_logits``: ``z`` holds the block's logits; else it has room for a slice."""
    rows = block.hi - block.lo
    terms = tiles.kernels.terms(tiles.local, stats, pairs, block, *upstream)
    grad_hidden = None if grads.hidden is None else terms.norm.new_empty(rows, block.hidden.shape[1])
    softcap, slope = 1.0 if tiles.softcap else 0.0, tiles.logit_scale / tiles.unit  # of the tanh that a tile holds
    narrowing = tiles.narrowing(block.scale / tiles.unit if softcap else block.scale, terms.offsets, *upstream)
    for part in slices(tiles.size, columns):
        tile = z[:rows, part] if has_logits else part_of(z, rows, part.stop - part.start)
        if not has_logits:
            tiles.logits(block.hidden, part, tile)
            tiles.restrict(pairs, block.lo, block.hi, part, tile)
        grad = tiles.gradient_of(tile)
        tiles.kernels.gradient(grad, tile, part.start, block.scale, terms, softcap, slope, narrowing)
        tiles.chain(grad, block.hidden, part, grads, grad_hidden, block.lo == 0, narrowing)
    if grads.hidden is not None:
        tiles.kernels.scatter(grads.hidden, grad_hidden, pairs, block, narrowing)


def linear_token_stats_backward(kernels: Kernels, *args: Any) -> list[Tensor]:
    """The gradients that ``needs`` asks for, the logits computed again."""
    head, (grad_logprobs, grad_entropy, logprobs, norm, entropy, needs) = Head.split(args)
    tiles = Tiles(head, kernels)
    idle = torch.cat((norm, norm.new_zeros(1, 2)))
    stats = Stats(logprobs, idle, entropy, None, None, None)
    pairs = tiles.pairs(head.mask)
    slots = pairs.row.shape[0]
    rows, columns = tiles.fold_shape(slots, writes_weight=needs[1])
    z = tiles.empty(rows, columns)
    grads = Grads.of(tiles, needs, -(-slots // rows), writes_rows_once=pairs.distinct_rows)
    for block in blocks(tiles, pairs, rows):
        upstream = Upstream(grad_logprobs, grad_entropy)
        chain(tiles, pairs, block, columns, z, stats, upstream, grads, has_logits=False)
    return grads.finish(head, tiles.shard)


def linear_policy_loss(kernels: Kernels, *args: Any) -> list[Tensor]:
    """[loss, metrics, logprobs, the gradients asked for]: logits once, gradients formed block by block."""
    head, others = Head.split(args)
    loss_inputs, (outputs, needs) = LossInputs(*others[:-2]), others[-2:]
    if not loss_inputs.has_streams:
        loss_inputs = loss_inputs._replace(mask=head.mask)
    tiles, stats = Tiles(head, kernels), Stats.zeros(head, outputs)
    if loss_inputs.old_logprobs is None:
        loss_inputs = loss_inputs._replace(old_logprobs=stats.logprobs)
    else:  # of pairs not yet computed: finite, in no sum until the last call
        stats.logprobs.copy_(loss_inputs.old_logprobs)

    def policy(form_grads: bool) -> list[Tensor]:
        forms_entropy = form_grads and loss_inputs.parameter("entropy_coef") != 0
        options = [*loss_inputs.options, int(form_grads), int(forms_entropy)]
        return kernels.policy_loss(stats.logprobs, stats.entropy, None, *loss_inputs._replace(options=options))

    live = _live(head, loss_inputs, tiles.host)
    pairs = tiles.pairs(live)
    slots = pairs.row.shape[0]
    rows, columns = tiles.whole_rows(slots, writes_weight=needs[1])
    z, count = tiles.empty(rows, tiles.size), -(-slots // rows)
    grads = Grads.of(tiles, needs, count, keeps_wide=True, writes_rows_once=pairs.distinct_rows)
    for block in blocks(tiles, pairs, rows):
        kernels.write(stats, pairs, block, _fold(tiles, pairs, block, columns, z, outputs), tiles.shard.vocabulary)
        grad_logprobs, *grad_entropy = policy(True)[2:]
        upstream = Upstream(grad_logprobs, *grad_entropy)
        chain(tiles, pairs, block, columns, z, stats, upstream, grads, has_logits=True)
    if live is not head.mask and live is not None:  # no gradient: folded in small tiles
        others_live = ~live if head.mask is None else head.mask & ~live
        _fold_all(tiles, tiles.pairs(others_live), stats, outputs)
    stats.finish(tiles)
    if head.mask is not None:
        stats.logprobs.masked_fill_(~head.mask, 0)
    return [*policy(False), stats.logprobs, *grads.finish(head, tiles.shard)]


def _fold_all(tiles: Tiles, pairs: Pairs, stats: Stats, outputs: int) -> None:
    """The statistics of pairs whose logits nothing reads again."""
    rows, columns = tiles.fold_shape(pairs.row.shape[0])
    z = tiles.empty(rows, columns)
    for block in blocks(tiles, pairs, rows):
        folded = _fold(tiles, pairs, block, columns, z, outputs)
        tiles.kernels.write(stats, pairs, block, folded, tiles.shard.vocabulary)


def _live(head: Head, inputs: LossInputs, host: bool) -> Tensor | None:
    """The pairs with a gradient; only where asking costs nothing fewer than the unmasked ones."""
    has_kl = inputs.parameter("kl_coef") != 0 and inputs.kl_weights is None
    if has_kl or inputs.parameter("entropy_coef") or not host:
        return head.mask
    live = inputs.advantages != 0  # a NaN is
    if live.ndim == 2:  # a branch: sums over positive and over negative advantages, and more
        live = live[0] | live[1]
    if not inputs.per_token:
        live = live.repeat_interleave(inputs.cu_seqlens.diff(), output_size=head.targets.shape[0])
    if bool(live.all()):
        return head.mask
    live = live if inputs.mask is None else inputs.mask & live
    return joined(live, inputs.supervised_weights, inputs.kl_weights)
