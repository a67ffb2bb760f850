"""Tensors as the plain numbers that the native modules take."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def rows(x: Tensor) -> tuple[int, int, int, int]:
    """(outer, inner, stride_outer, stride_inner) of the leading dimensions, in elements; the last is contiguous."""
    if x.ndim == 1:
        return 1, 1, 0, 0
    if x.ndim == 2:
        return 1, x.shape[0], 0, x.stride(0)
    return x.shape[0], x.shape[1], x.stride(0), x.stride(1)


def as_rows(x: Tensor) -> Tensor:
    """``x`` with at most two leading dimensions and a contiguous last one; a copy only where strides force it."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    return x if x.ndim <= 3 else x.flatten(0, -3)
