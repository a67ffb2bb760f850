"""The largest logits of rows, met tile by tile, by torch's own selection: no kernel of ours would be faster.

A logit and its id make one whole number, larger where the logit is or, of equal ones, where the id is lower: no two are
equal, so that what torch selects does not depend on how. Only the groups of columns with the largest maxima are looked
at: what is among the k largest lies in a group whose maximum is among the k largest, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern._tiles import topk as tiles

from . import head

GROUP = 32  # columns that share a maximum
_LOW = (1 << 32) - 1  # the bits of an id


def keys_of(logits: Tensor, ids: Tensor) -> Tensor:
    """int64 in the order of logits, float32, and of equal ones (0 and -0 are) the other way round of ids."""
    bits = (logits + 0.0).view(torch.int32)
    return (_ordered(bits).to(torch.int64) << 32) + (_LOW - ids)


def logits_of(keys: Tensor) -> Tensor:
    return _ordered((keys >> 32).to(torch.int32)).view(torch.float32)


def ids_of(keys: Tensor) -> Tensor:
    return _LOW - (keys & _LOW)


def _ordered(bits: Tensor) -> Tensor:
    """A float's bits as a whole number in the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def largest(z: Tensor, k: int) -> Tensor:
    """Keys of the k largest of each row, largest first, ids counted from the tile's first column."""
    rows, columns = z.shape
    groups, left = divmod(columns, GROUP)
    maxima = z[:, : groups * GROUP].unflatten(1, (groups, GROUP)).amax(2) if groups else z[:, :0]
    if left:
        maxima = torch.cat((maxima, z[:, groups * GROUP :].amax(1, keepdim=True)), 1)
    number = torch.arange(maxima.shape[1], device=z.device)
    chosen = ids_of(keys_of(maxima, number).topk(min(k, maxima.shape[1]), dim=1, sorted=False).values)
    column = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=z.device)).flatten(1)
    inside = column < columns
    keys = keys_of(z.gather(1, column.clamp_max(columns - 1)), column)
    return torch.where(inside, keys, torch.iinfo(torch.int64).min).topk(k, dim=1).values


def exchange(
    z: Tensor,  # [R, columns]
    first: int,
    shard_first: int,
    logits: Tensor,  # [R, k]
    ids: Tensor,  # [R, k]
    is_last: bool,
) -> None:
    """See trajkern/_native/topk.py; largest first after every tile."""
    k = logits.shape[1]
    count = min(k, z.shape[1])
    found = largest(z, count)
    column, of_tile = ids_of(found), found - (shard_first + first)
    before = keys_of(logits, ids)
    after = torch.cat((before, of_tile), 1).topk(k, dim=1).values
    displaced = logits.flip(1)[:, :count]  # the j-th that enters takes the place of the j-th smallest
    z.scatter_(1, column, torch.where(of_tile >= after[:, -1:], displaced, logits_of(found)))
    logits.copy_(logits_of(after))
    ids.copy_(ids_of(after))


_KERNELS = tiles.Kernels(head._KERNELS, head.pick, exchange, head.fold_rows)


def linear_topk(*args: Any) -> list[Tensor]:
    return tiles.linear_topk(_KERNELS, *args)


def linear_topk_backward(*args: Any) -> list[Tensor]:
    return tiles.linear_topk_backward(head._KERNELS, *args)
