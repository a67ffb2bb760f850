"""Launchers of csrc/cpu/head.cpp, inside the head's loops over tiles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._native._args import DTYPE, pointer
from trajkern._native.policy_loss import policy_loss
from trajkern._tiles import head as tiles
from trajkern._tiles.arguments import Head
from trajkern._tiles.head import Folded, Stats
from trajkern._tiles.pairs import Pairs
from trajkern._tiles.shards import shard
from trajkern._tiles.tiles import Block, BlockTerms, Kernels, Narrowing
from trajkern._values import check_cu_seqlens, check_pairs, check_temperatures


def gather(
    hidden: Tensor,  # [T, H]
    row: Tensor,  # [R]
    idle: Tensor | None,  # [R]
) -> Tensor:
    """The rows' hidden states [R, H], 0 for idle ones: what they would read may be NaN."""
    states = hidden[row]
    return states if idle is None else states.masked_fill_(idle[:, None], 0)


def _of_block(pairs: Pairs, block: Block) -> slice:
    return slice(int(pairs.offsets[block.lo]), int(pairs.offsets[block.hi]))


def fold(
    z: Tensor,  # [R, columns]
    first: int,  # column of the shard; 0: the state is written, else added to
    block: Block,
    state: Tensor,  # [R, 4] max; over all but one place of it: sum e, sum e u, sum e^2
    picked: Tensor,  # [P'] the targets' logits
    pairs: Pairs,
    local: Tensor,  # [P] targets in the shard
    moments: bool,
) -> None:
    fold_rows(z, block.scale, state, moments, first == 0)
    pick(z, first, block, picked, pairs, local)


def fold_rows(
    z: Tensor,  # [R, columns]
    scale: Tensor,  # [R] 1 / temperature
    state: Tensor,  # [R, 4]
    moments: bool,
    is_first: bool,
) -> None:
    """Adds a tile to the state of its rows, or begins it."""
    if is_first:
        state.zero_()
        state[:, 0] = -math.inf
    _ext.cpu().head_fold(
        z.data_ptr(), DTYPE[z.dtype], z.stride(0), *z.shape, scale.data_ptr(), moments, state.data_ptr()
    )


def pick(
    z: Tensor,  # [R, columns]
    first: int,
    block: Block,
    picked: Tensor,  # [P']
    pairs: Pairs,
    local: Tensor,  # [P]
) -> None:
    """The logits of the block's targets, of those in this tile."""
    some = _of_block(pairs, block)
    column = local[pairs.pair[some]] - first
    inside = (column >= 0) & (column < z.shape[1])
    logit = z[pairs.slot[some] - block.lo, column.clamp(0, z.shape[1] - 1)].to(picked.dtype)
    picked[some] = torch.where(inside, logit, picked[some])


def write(stats: Stats, pairs: Pairs, block: Block, folded: Folded, vocabulary: int) -> None:
    """The results of the block's pairs, and its rows' norms."""
    some = _of_block(pairs, block)
    slot, index = pairs.slot[some] - block.lo, pairs.pair[some]
    top, rest, eu, ee = folded.state.unbind(1)
    rest = rest + (top - top)  # NaN where the maximum is not finite
    log_sum, z = rest.log1p(), folded.picked[some]

    def put(into: Tensor | None, values: Callable[[], Tensor]) -> None:
        if into is not None:
            into[index] = values().to(into.dtype)

    put(stats.logprobs, lambda: (z - top[slot]) * block.scale[slot] - log_sum[slot])
    put(stats.entropy, lambda: (log_sum - eu / (1 + rest))[slot])
    put(stats.sum_sq_probs, lambda: ((1 + ee) / (1 + rest) ** 2)[slot])
    put(stats.is_top1, lambda: (z >= top[slot]) & (rest[slot] >= 0))
    if folded.total is not None:
        mean = folded.total / vocabulary
        put(stats.mean_logit, lambda: mean[slot])
    stats.norm[pairs.key[block.lo : block.hi]] = torch.stack((top, rest), 1).to(stats.norm.dtype)


def terms(
    local: Tensor,  # [P]
    stats: Stats,
    pairs: Pairs,
    block: Block,
    grad_logprobs: Tensor,  # [P]
    grad_entropy: Tensor | None,  # [P]
    factors: Tensor | None,  # [keys + 1, 2]
) -> BlockTerms:
    some = _of_block(pairs, block)
    index = pairs.pair[some]
    entropy = None
    if grad_entropy is not None:
        assert stats.entropy is not None
        entropy, grad_entropy = stats.entropy[index], grad_entropy[index]
    return BlockTerms(
        pairs.offsets[block.lo : block.hi + 1] - some.start,
        None,
        None,
        local[index],
        stats.logprobs[index],
        grad_logprobs[index],
        entropy,
        grad_entropy,
        stats.norm[pairs.key[block.lo : block.hi]],
        None if factors is None else factors[pairs.key[block.lo : block.hi]],
    )


def gradient(
    grad: Tensor,  # [R, columns], which is z
    z: Tensor,  # [R, columns]
    first: int,  # column of the shard
    scale: Tensor,  # [R] 1 / temperature
    terms: BlockTerms,
    softcap: float,
    logit_scale: float,
    narrowing: Narrowing | None,
) -> None:
    assert grad.data_ptr() == z.data_ptr() and narrowing is None
    of_pairs = (terms.offsets, terms.targets - first, *terms[4:8], terms.factors)
    _ext.cpu().head_gradient(
        z.data_ptr(),
        DTYPE[z.dtype],
        z.stride(0),
        *z.shape,
        terms.norm.data_ptr(),
        scale.data_ptr(),
        [pointer(x) for x in of_pairs],
        softcap,
        logit_scale,
    )


def scatter(
    hidden: Tensor,  # [T+1, H]
    grad: Tensor,  # [R, H]
    pairs: Pairs,
    block: Block,
    narrowing: Narrowing | None,
) -> None:
    """Adds the block's gradients to those of its hidden states."""
    assert narrowing is None
    home = pairs.row[block.lo : block.hi]
    if pairs.idle is not None:
        home = torch.where(pairs.idle[block.lo : block.hi], hidden.shape[0] - 1, home)
    hidden.index_put_((home,), grad, accumulate=True)


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = like.new_empty(shape, dtype=dtype)
    _ext.cpu().prefer_huge_pages(x.data_ptr(), x.nbytes)
    return x


_KERNELS = Kernels(True, empty, gather, fold, write, terms, gradient, scatter, policy_loss)


def _check(args: tuple[Any, ...]) -> None:
    """What a graph could not read when it was traced; else it has been checked."""
    head, _ = Head.split(args)
    if not any(head.options[3:]):
        return
    support = None
    if head.support_ids is not None and head.support_offsets is not None:
        support = head.support_ids, head.support_offsets
    vocabulary = shard(head.group, head.weight).vocabulary
    check_pairs(head.targets, vocabulary, head.rows, head.hidden.shape[0], head.mask, support)
    if head.temperatures is not None:
        check_temperatures(head.temperatures, head.accumulator)


def linear_token_stats(*args: Any) -> list[Tensor]:
    _check(args)
    return tiles.linear_token_stats(_KERNELS, *args)


def linear_token_stats_backward(*args: Any) -> list[Tensor]:
    return tiles.linear_token_stats_backward(_KERNELS, *args)


def linear_policy_loss(*args: Any) -> list[Tensor]:
    _check(args)
    head, (_, _, cu_seqlens, *_) = Head.split(args)
    if any(head.options[3:]):
        check_cu_seqlens(cu_seqlens, head.targets.shape[0])
    return tiles.linear_policy_loss(_KERNELS, *args)
