"""Launchers of csrc/bind/span.cpp, by which csrc/cpu/span.cpp and csrc/cuda/span.cu are called."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern._native._args import call


def _ranges(start: Tensor, end: Tensor) -> tuple[int, int, int]:
    return start.data_ptr(), end.data_ptr(), start.shape[0]


def span_reduce(
    x: Tensor,  # [T]
    start: Tensor,  # [S]
    end: Tensor,  # [S]
    op: int,
) -> Tensor:
    out = x.new_empty(start.shape[0])
    call("span_reduce", x, x.data_ptr(), x.shape[0], _ranges(start, end), op, out.data_ptr())
    return out


def span_reduce_backward(
    grad_out: Tensor,  # [S]
    x: Tensor,  # [T]
    reduced: Tensor,  # [S]
    start: Tensor,  # [S]
    end: Tensor,  # [S]
    op: int,
) -> Tensor:
    grad_x = torch.zeros_like(x)
    call(
        "span_reduce_backward",
        x,
        grad_out.data_ptr(),
        x.data_ptr(),
        reduced.data_ptr(),
        x.shape[0],
        _ranges(start, end),
        op,
        grad_x.data_ptr(),
    )
    return grad_x


def spread(
    values: Tensor,  # [S]
    start: Tensor,  # [S]
    end: Tensor,  # [S]
    tokens: int,
) -> Tensor:
    out = values.new_empty(tokens)
    call("spread", values, values.data_ptr(), tokens, _ranges(start, end), out.data_ptr())
    return out
