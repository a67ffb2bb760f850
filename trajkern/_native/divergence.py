"""Launchers of csrc/cpu/divergence.cpp, inside the loops over blocks of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._native import head
from trajkern._tiles import divergence as tiles
from trajkern._tiles.tiles import Narrowing


def rows(
    student: Tensor,  # [R, V]
    teacher: Tensor,  # [R, V]
    scale: Tensor,  # [R] 1 / temperature
    beta: float,
    divergence: Tensor,  # [R]
    saved: Tensor,  # [R, 6]
) -> None:
    _ext.cpu().divergence_rows(
        *_tile(student, teacher), scale.data_ptr(), beta, divergence.data_ptr(), saved.data_ptr()
    )


def gradient(
    grad: Tensor,  # [R, columns], which is student
    student: Tensor,  # [R, columns]
    teacher: Tensor,  # [R, columns]
    scale: Tensor,  # [R]
    beta: float,
    saved: Tensor,  # [R, 6]
    upstream: Tensor,  # [R]
    first: int,  # column
    softcap: float,  # of the student's logits, whose tile then holds the tanh alone; 0: none
    logit_scale: float,  # likewise
    narrowing: Narrowing | None,
) -> None:
    assert grad.data_ptr() == student.data_ptr() and narrowing is None
    _ext.cpu().divergence_gradient(
        *_tile(student, teacher),
        scale.data_ptr(),
        beta,
        saved.data_ptr(),
        upstream.data_ptr(),
        (softcap, logit_scale),
    )


def _tile(student: Tensor, teacher: Tensor) -> tuple[int | bool, ...]:
    double = student.dtype == torch.float64
    return student.data_ptr(), teacher.data_ptr(), double, student.stride(0), teacher.stride(0), *student.shape


_KERNELS = tiles.Kernels(head._KERNELS, rows, gradient)


def linear_divergence(*args: Any) -> list[Tensor]:
    return tiles.linear_divergence(_KERNELS, *args)


def linear_divergence_backward(*args: Any) -> list[Tensor]:
    return tiles.linear_divergence_backward(_KERNELS, *args)
