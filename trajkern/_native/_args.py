"""Tensors as the plain numbers that the native modules take, and the call of a kernel that both modules have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from trajkern import _ext

_NO_ROOM = 0, 0, 0  # pointer, doubles, stream
DTYPE = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

_of_cpu_tensors: Callable[[], ModuleType] = _ext.cpu


@contextmanager
def kernels_from(module: Any) -> Iterator[None]:
    """Inside the block, kernels of CPU tensors are ``module``'s: the CUDA ones, where a CPU executes them."""
    global _of_cpu_tensors
    before, _of_cpu_tensors = _of_cpu_tensors, lambda: module
    try:
        yield
    finally:
        _of_cpu_tensors = before


def call(name: str, x: Tensor, *args: Any, scratch: tuple[Any, ...] = ()) -> Any:
    """The kernel of x's device and dtype; a CUDA kernel runs on torch's current stream there.

    ``scratch``: the function by which the module tells how many doubles the kernel keeps between its launches, and the
    function's arguments.
    """
    if x.is_cpu:
        if _of_cpu_tensors is _ext.cpu:  # whose kernels keep nothing
            return getattr(_ext.cpu(), name)(DTYPE[x.dtype], *args, _NO_ROOM)
        return _run(_of_cpu_tensors(), 0, name, x, args, scratch)
    with torch.cuda.device(x.device):
        try:
            return _run(_ext.cuda(), torch.cuda.current_stream().cuda_stream, name, x, args, scratch)
        except RuntimeError as error:
            if "no kernel image" not in str(error):
                raise
            major, minor = torch.cuda.get_device_capability()
            raise RuntimeError(
                f"trajkern._C_cuda has no kernels for {torch.cuda.get_device_name()}, compute capability "
                f"{major}.{minor}: build it there, or with `TRAJKERN_CUDA={major}{minor} pip install .` {_ext.SOURCE}"
            ) from error


def _run(module: ModuleType, stream: int, name: str, x: Tensor, args: Any, scratch: tuple[Any, ...]) -> Any:
    doubles = getattr(module, scratch[0])(*scratch[1:]) if scratch else 0
    room = x.new_empty(doubles, dtype=torch.float64) if doubles else None
    return getattr(module, name)(DTYPE[x.dtype], *args, (pointer(room), doubles, stream))


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
