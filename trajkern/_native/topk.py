"""Launchers of csrc/cpu/topk.cpp, inside the loops over tiles."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trajkern import _ext
from trajkern._native import head
from trajkern._native._args import DTYPE
from trajkern._tiles import topk as tiles


def exchange(
    z: Tensor,  # [R, columns]
    first: int,  # column of the shard
    shard_first: int,  # token of the vocabulary
    logits: Tensor,  # [R, k] the largest so far, -inf where there are none; written
    ids: Tensor,  # [R, k] of the whole vocabulary; written
    is_last: bool,
) -> None:
    """The largest of both become ``logits``, and the tile holds all others: it is written.

    Largest first once ``is_last``, in some order of its own before that.
    """
    _ext.cpu().topk_exchange(
        *(z.data_ptr(), DTYPE[z.dtype], z.stride(0), *z.shape),
        *(first, shard_first, logits.data_ptr(), ids.data_ptr(), logits.shape[1], is_last),
    )


_KERNELS = tiles.Kernels(head._KERNELS, head.pick, exchange, head.fold_rows)


def linear_topk(*args: Any) -> list[Tensor]:
    head._check(args)
    return tiles.linear_topk(_KERNELS, *args)


def linear_topk_backward(*args: Any) -> list[Tensor]:
    return tiles.linear_topk_backward(head._KERNELS, *args)
