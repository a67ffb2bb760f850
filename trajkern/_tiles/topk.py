"""The likeliest tokens' loops over tiles of logits, which the CPU's and the GPU's launchers share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trajkern._tiles import tiles as head_tiles
from trajkern._tiles.arguments import Head
from trajkern._tiles.head import Stats, Upstream, chain
from trajkern._tiles.pairs import Pairs, in_range, pairs_of, repeated
from trajkern._tiles.shards import Shard, shard
from trajkern._tiles.tiles import Grads, Tiles, blocks, part_of, slices


class Kernels(NamedTuple):
    """A backend's: those of its head, and what its launchers say of these."""

    head: head_tiles.Kernels
    pick: Callable[..., None]
    exchange: Callable[..., None]
    fold_rows: Callable[..., None]


class Selection(NamedTuple):
    """Of each slot the k largest logits, the largest first, and the softmax's sums over all others.

    Logits are as tiles hold them, without the temperature and the softcap's factor, which are in ``scale``.
    """

    logits: Tensor  # [U, k]
    ids: Tensor  # [U, k]; where there are fewer tokens, the size of the vocabulary with a logit of -inf
    others: Tensor  # [U, 4] max, rest, and two sums that nobody reads
    scale: Tensor  # [U]
    picked: Tensor | None  # [P'] the targets' logits

    def log_inside(self) -> Tensor:  # [U]
        """log sum exp of the k, measured from the largest; NaN where that is not finite."""
        top = self.logits.double()
        u = (top - top[:, :1]) * self.scale.double()[:, None]
        return u[:, 1:].exp().sum(1).log1p() + (top[:, 0] - top[:, 0])

    def log_outside(self) -> Tensor:  # [U]
        """The same of all others; -inf where none is possible."""
        top, rest = self.others[:, 0].double(), self.others[:, 1].double()
        u = (top - self.logits[:, 0].double()) * self.scale.double() + rest.log1p()
        return torch.where((top == -math.inf) & ~rest.isnan(), -math.inf, u)


def linear_topk(kernels: Kernels, *args: Any) -> list[Tensor]:
    """[log-probs, ids, tail, norm, with_targets: the pairs' log-probs]."""
    head, (k, each, with_targets) = Head.split(args)
    tiles = Tiles(head, kernels.head)
    vocabulary = tiles.shard.vocabulary
    if k > vocabulary:  # of all ranks, which only they know together
        raise ValueError(f"k must be 1 to {vocabulary}, the size of the vocabulary; got {k}")
    pairs = _pairs(tiles, vocabulary)
    found = _combined(_selected(kernels, tiles, pairs, k, with_targets), tiles.shard)
    norm = head.hidden.new_zeros(head.keys + 1, 2, dtype=head.accumulator)
    norm[pairs.key] = _norm(found).to(norm.dtype)
    slot = torch.full_like(head.targets, -1)  # of each pair
    slot[pairs.pair] = torch.where(pairs.slot < pairs.row.shape[0], pairs.slot, -1)
    results = _results(tiles, found, slot[::each], each)
    return [*results, norm[:-1], *([_of_targets(tiles, pairs, found, slot)] if with_targets else [])]


def _pairs(tiles: Tiles, vocabulary: int) -> Pairs:
    """With all rows that exist: a target that does not, which nobody could check, costs its row nothing."""
    if tiles.host:
        return tiles.pairs(tiles.head.mask)
    targets = tiles.head.targets.clamp(0, vocabulary - 1)
    head = tiles.head._replace(targets=targets)
    return pairs_of(head, vocabulary, head.mask, exact=False, multiple=tiles.fixed_rows or 1)


def _selected(kernels: Kernels, tiles: Tiles, pairs: Pairs, k: int, with_targets: bool) -> Selection:
    """Of this rank's tokens."""
    slots, device = pairs.row.shape[0], pairs.row.device
    rows, columns = tiles.fold_shape(slots)
    z = tiles.empty(rows, columns)
    found = Selection(
        torch.full((slots, k), -math.inf, dtype=z.dtype, device=device),
        torch.full((slots, k), tiles.shard.vocabulary, device=device),
        torch.empty(slots, 4, dtype=tiles.state_dtype, device=device),
        tiles.scale(pairs.row, tiles.unit),
        torch.zeros(pairs.pair.shape, dtype=tiles.state_dtype, device=device) if with_targets else None,
    )
    for block in blocks(tiles, pairs, rows):
        logits, ids, others = (x[block.lo : block.hi] for x in found[:3])
        for part in slices(tiles.size, columns):
            tile = part_of(z, block.hi - block.lo, part.stop - part.start)
            tiles.logits(block.hidden, part, tile)
            if with_targets:
                kernels.pick(tile, part.start, block, found.picked, pairs, tiles.local)
            kernels.exchange(tile, part.start, tiles.shard.first, logits, ids, part.stop == tiles.size)
            kernels.fold_rows(tile, block.scale, others, False, part.start == 0)
    return found


def _combined(found: Selection, of: Shard) -> Selection:
    """The whole vocabulary's from each rank's, the same bits on every one: k logits and ids a row travel."""
    if of.group is None:
        return found
    logits, ids, others = (torch.cat(_of_ranks(x, of), 1) for x in (found.logits, found.ids, found.others[:, :2]))
    order = ids.argsort(dim=1)
    order = order.gather(1, logits.gather(1, order).argsort(dim=1, descending=True, stable=True))
    logits, ids, k = logits.gather(1, order), ids.gather(1, order), found.ids.shape[1]
    lost = logits[:, k:].double()  # to another rank's: these are among the others as well
    tops = torch.cat((lost, others[:, ::2].double()), 1)
    rests = torch.cat((torch.zeros_like(lost), others[:, 1::2].double()), 1)
    largest, at = tops.max(1, keepdim=True)
    u = torch.where(tops == -math.inf, -math.inf, (tops - largest) * found.scale.double()[:, None])
    rest = (u.exp() * (rests + 1)).scatter(1, at, 0).sum(1, keepdim=True) + rests.gather(1, at)
    combined = torch.cat((largest, rest), 1).to(found.others.dtype)
    picked = None if found.picked is None else of.sum(found.picked)
    return Selection(logits[:, :k], ids[:, :k], combined, found.scale, picked)


def _of_ranks(x: Tensor, of: Shard) -> list[Tensor]:
    x = x.contiguous()
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(of.group))]
    dist.all_gather(gathered, x, group=of.group)
    return gathered


def _norm(found: Selection) -> Tensor:
    """(max, rest) of the others [U, 2], such that exp(z - max) is 0 where none is possible."""
    top, rest = found.others[:, 0], found.others[:, 1]
    nothing = found.log_outside() == -math.inf
    return torch.stack((torch.where(nothing, math.inf, top), torch.where(nothing, 0, rest)), 1)


def _results(tiles: Tiles, found: Selection, slot: Tensor, each: int) -> list[Tensor]:
    """[log-probs, ids, tail] of the slots [P], -1 where masked, which gives 0; NaN where a row does not exist."""
    inside, outside = found.log_inside(), found.log_outside()
    top = found.logits[:, :1].double()
    u = (found.logits.double() - top) * found.scale.double()[:, None]
    logprobs = u - torch.logaddexp(inside, outside)[:, None]
    tail = -torch.logaddexp(torch.zeros_like(inside), inside - outside)
    results = [_at(x, slot) for x in (logprobs, found.ids, tail)]
    if not tiles.host:
        head = tiles.head
        wrong = _wrong(head._replace(targets=torch.zeros_like(head.targets)), 1)[::each]
        results[0].masked_fill_(wrong[:, None], math.nan)
        results[2].masked_fill_(wrong, math.nan)
    return [x if x.dtype == torch.int64 else x.to(tiles.head.accumulator) for x in results]


def _of_targets(tiles: Tiles, pairs: Pairs, found: Selection, slot: Tensor) -> Tensor:
    """Log-probs of the targets, [P']."""
    assert found.picked is not None
    picked = torch.zeros(slot.shape, dtype=torch.float64, device=slot.device)
    picked[pairs.pair] = found.picked.double()
    log_sum = torch.logaddexp(found.log_inside(), found.log_outside())
    of_slot = torch.stack((found.logits[:, 0].double(), found.scale.double(), log_sum), 1)
    top, scale, log_sum = _at(of_slot, slot).unbind(1)
    logprobs = torch.where(slot < 0, 0, (picked - top) * scale - log_sum)
    if not tiles.host:
        logprobs = logprobs.masked_fill(_wrong(tiles.head, tiles.shard.vocabulary), math.nan)
    return logprobs.to(tiles.head.accumulator)


def _at(x: Tensor, slot: Tensor) -> Tensor:
    """The rows ``slot`` of ``x``, zeros for -1."""
    return torch.cat((x, x.new_zeros(1, *x.shape[1:])))[slot]


def _wrong(head: Head, vocabulary: int) -> Tensor:
    wrong = ~in_range(head, vocabulary)
    return wrong if head.mask is None else wrong & head.mask


class Saved(NamedTuple):
    """What the backward is given besides the head, whose pairs are ``each`` a result."""

    each: int
    logprobs: Tensor  # [P, k]
    ids: Tensor  # [P, k]
    tail: Tensor  # [P]
    norm: Tensor  # [T, 2]
    target_logprobs: Tensor | None  # [P']
    grad_logprobs: Tensor | None  # [P, k]
    grad_tail: Tensor | None  # [P]
    grad_target_logprobs: Tensor | None  # [P']
    needs: list[bool]


class _Upstream(NamedTuple):
    """Every token with a log-prob as a target of its row, the k of each result first, and what reaches them."""

    head: Head
    logprobs: Tensor  # [P (k + M)]
    grads: Tensor  # [P (k + M)] float64, as what follows; 0 where masked or wrong
    grad_tail: Tensor  # [P]
    row: Tensor  # [P], T where masked or wrong

    @classmethod
    def of(cls, head: Head, saved: Saved, host: bool) -> _Upstream:
        (count, k), each = saved.ids.shape, saved.each
        rows = torch.arange(head.targets.shape[0], device=head.targets.device) if head.rows is None else head.rows
        repeats = [repeated(rows[::each], k)]
        targets, logprobs = saved.ids.flatten(), saved.logprobs.flatten()
        grads = (torch.zeros_like(saved.logprobs) if saved.grad_logprobs is None else saved.grad_logprobs).flatten()
        if saved.grad_target_logprobs is not None and saved.target_logprobs is not None:
            targets, repeats = torch.cat((targets, head.targets)), [*repeats, rows]
            logprobs = torch.cat((logprobs, saved.target_logprobs))
            grads = torch.cat((grads, saved.grad_target_logprobs.flatten()))
        of_every = torch.cat(repeats)
        every = head._replace(targets=targets, rows=of_every, mask=None)
        keep = torch.ones_like(targets, dtype=torch.bool)
        if not host:
            keep = in_range(every, shard(head.group, head.weight).vocabulary)
        if head.mask is not None:
            masks = repeated(head.mask[::each], k), head.mask
            keep = keep & torch.cat(masks[: len(repeats)])
        grads = torch.where(keep, grads.double(), 0)
        found = cls(every._replace(mask=keep), logprobs, grads, grads.new_zeros(count), of_every[: count * k : k])
        found = found._replace(row=torch.where(keep[: count * k : k], found.row, head.hidden.shape[0]))
        if saved.grad_tail is None:
            return found
        has_tail = keep[: count * k : k] & (saved.tail != -math.inf)
        return found._replace(grad_tail=torch.where(has_tail, saved.grad_tail.double(), 0))

    def sums(self, x: Tensor, k: int) -> Tensor:  # [P (k + M)] -> [P]
        count = self.row.shape[0]
        total = x[: count * k].view(count, k).sum(1)
        return total if x.shape[0] == count * k else total + x[count * k :].view(count, -1).sum(1)

    def by_row(self, x: Tensor, adds: bool = True) -> Tensor:  # [P] -> [T + 1]
        return x.new_zeros(self.head.hidden.shape[0] + 1).index_put((self.row,), x, accumulate=adds)


def linear_topk_backward(kernels: head_tiles.Kernels, *args: Any) -> list[Tensor]:
    """The gradients that ``needs`` asks for: those of log-probs of several targets a row, and of the mass outside."""
    head, others = Head.split(args)
    saved = Saved(*others)
    given, k = _Upstream.of(head, saved, kernels.host), saved.ids.shape[1]
    if kernels.host:  # only results with a gradient
        given = given._replace(head=given.head._replace(mask=_with_gradient(given, k)))
    tiles = Tiles(given.head, kernels)
    pairs = tiles.pairs(given.head.mask)
    tails = given.by_row(saved.tail.double(), adds=False)
    own, of_tails = given.by_row(given.sums(given.grads, k)), given.by_row(given.grad_tail)
    # what p is multiplied by in the gradient of the k and the targets, and the others' mass in that of the others
    factors = torch.stack((own + of_tails, tails.exp() * own + tails.expm1() * of_tails), 1).to(head.accumulator)
    grads = given.grads
    if saved.grad_tail is not None and given.grads.shape[0] > saved.ids.numel():
        grads = grads + _of_targets_outside(given, pairs, tails, of_tails, saved.ids.numel())
    stats = Stats(given.logprobs, torch.cat((saved.norm, saved.norm.new_zeros(1, 2))), None, None, None, None)
    slots = pairs.row.shape[0]
    rows, columns = tiles.fold_shape(slots, writes_weight=saved.needs[1])
    z, upstream = tiles.empty(rows, columns), Upstream(grads.to(head.accumulator), None, factors)
    into = Grads.of(tiles, saved.needs, -(-slots // rows), writes_rows_once=pairs.distinct_rows)
    for block in blocks(tiles, pairs, rows):
        chain(tiles, pairs, block, columns, z, stats, upstream, into, has_logits=False)
    return into.finish(head, tiles.shard)


def _with_gradient(given: _Upstream, k: int) -> Tensor:
    """The mask without results that nothing reaches."""
    live, mask = (given.sums(given.grads.abs(), k) != 0) | (given.grad_tail != 0), given.head.mask  # a NaN is
    assert mask is not None
    each = mask.shape[0] // max(live.shape[0], 1) - k  # targets of a result
    return mask & torch.cat((repeated(live, k), repeated(live, max(each, 0))))


def _of_targets_outside(given: _Upstream, pairs: Pairs, tails: Tensor, of_tails: Tensor, among: int) -> Tensor:
    """What the tail adds to a target that is none of its row's k, at the first of the pairs that name it.

    Pairs are ordered by slot and target, and where they agree as they came: the k, of which there are ``among``, first.
    """
    assert given.head.rows is not None
    target, key = given.head.targets[pairs.pair], given.head.rows[pairs.pair].clamp(0, tails.shape[0] - 1)
    first = torch.ones_like(target, dtype=torch.bool)
    first[1:] = (target[1:] != target[:-1]) | (pairs.slot[1:] != pairs.slot[:-1])
    share = (given.logprobs[pairs.pair].double() - tails[key]).exp() * of_tails[key]
    share = torch.where(first & (pairs.pair >= among) & (of_tails[key] != 0), share, 0)
    return torch.zeros_like(given.grads).index_put((pairs.pair,), share)
