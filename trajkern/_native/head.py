"""Launchers of csrc/cpu/head.cpp, inside the head's loops over tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._native._args import DTYPE, pointer
from trajkern._native.policy_loss import policy_loss
from trajkern._tiles import head as tiles
from trajkern._tiles.tiles import Kernels, PairTerms


def fold(
    z: Tensor,  # [R, columns]
    scale: Tensor,  # [R] 1 / temperature
    state: Tensor,  # [R, 4] max; over all but one place of it: sum e, sum e u, sum e^2
    moments: bool,
) -> None:
    _ext.cpu().head_fold(
        z.data_ptr(), DTYPE[z.dtype], z.stride(0), *z.shape, scale.data_ptr(), moments, state.data_ptr()
    )


def gradient(
    grad: Tensor,  # [R, columns], which is z
    z: Tensor,  # [R, columns]
    first: int,  # column of the shard
    norm: Tensor,  # [R, 2] max, sum e
    scale: Tensor,  # [R]
    offsets: Tensor,  # [R+1]
    terms: PairTerms,
    softcap: float,
    logit_scale: float,
) -> None:
    assert grad.data_ptr() == z.data_ptr()
    targets = terms.targets - first
    _ext.cpu().head_gradient(
        z.data_ptr(),
        DTYPE[z.dtype],
        z.stride(0),
        *z.shape,
        norm.data_ptr(),
        scale.data_ptr(),
        [pointer(x) for x in (offsets, targets, *terms[1:])],
        softcap,
        logit_scale,
    )


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = like.new_empty(shape, dtype=dtype)
    _ext.cpu().prefer_huge_pages(x.data_ptr(), x.nbytes)
    return x


_KERNELS = Kernels(empty, fold, gradient, policy_loss)


def linear_token_stats(*args: Any) -> list[Tensor]:
    return tiles.linear_token_stats(_KERNELS, *args)


def linear_token_stats_backward(*args: Any) -> list[Tensor]:
    return tiles.linear_token_stats_backward(_KERNELS, *args)


def linear_policy_loss(*args: Any) -> list[Tensor]:
    return tiles.linear_policy_loss(_KERNELS, *args)
