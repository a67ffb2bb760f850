"""Torch's CPU tensors as the memory of a GPU that is not there: their addresses, and what of them holds a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from trajkern.testing.ptx.exact import UNSIGNED
from trajkern.testing.ptx.faults import KernelFault
from trajkern.testing.ptx.memory import REGION, Buffer, Global

# of an element, by its bytes: as a float a NaN that no arithmetic makes, as an integer nothing likely
POISON = {1: 0xA5, 2: 0x7FA5, 4: 0x7FE5A5A5, 8: 0x7FF5A5A5A5A5A5A5}
ALIGNMENT = 16  # a storage keeps its place within so many bytes, of which compilers make use; on a GPU it is 0
MIDDLE = 1 << (REGION - 1)  # of a region, where storages begin: an access before one is still the storage's
ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


@dataclass
class _Fresh:
    """A storage that torch made without values."""

    reference: StorageWeakRef
    item: int  # bytes of an element
    described: str
    needed: np.ndarray  # bytes that belong to an element
    written: np.ndarray
    kernel: str = ""  # the last that stored to it

    def update(self, whole: np.ndarray) -> None:
        """What is no longer poison was written by someone who is not watched: torch, numpy, a library."""
        if not self.written.all():
            elements = whole[: whole.size // self.item * self.item].view(UNSIGNED[self.item])
            self.written[: elements.size * self.item] |= np.repeat(elements != POISON[self.item], self.item)


@dataclass
class _Extent:
    """What a launch may touch of a storage: from the first byte of any of its tensors to the last."""

    number: int
    storage: torch.UntypedStorage  # kept alive
    begin: int
    end: int
    name: str


class Device:
    """Which tensors the next launch was given, and what nothing has written yet."""

    def __init__(self) -> None:
        self._fresh: dict[int, _Fresh] = {}  # by a storage's identity, as the next
        self._extents: dict[int, _Extent] = {}
        self._buffers: dict[int, Buffer] = {}

    def allocated(self, x: Any) -> None:
        """Fill a new tensor with poison."""
        if type(x) is not Tensor or not x.is_cpu or x.layout != torch.strided or x.element_size() > 8 or not x.numel():
            return
        storage = x.untyped_storage()
        whole = _bytes(storage)
        item = x.element_size()
        whole[: whole.size // item * item].view(UNSIGNED[item])[:] = POISON[item]
        needed = np.zeros(whole.size, bool)
        _elements(needed, x)[...] = True
        if len(self._fresh) > 1000:
            self._fresh = {k: f for k, f in self._fresh.items() if not f.reference.expired()}
        fresh = _Fresh(StorageWeakRef(storage), item, _described(x), needed, np.zeros(whole.size, bool))
        self._fresh[storage._cdata] = fresh

    def address(self, x: Tensor, name: str = "") -> int:
        """Where the next launch finds a tensor: in a region of its own storage, so that no overrun meets another."""
        if not x.is_cpu:
            raise ValueError(f"kernels that a CPU executes take CPU tensors, got {name or 'one'} on {x.device}")
        if not x.numel():
            return 0
        storage = x.untyped_storage()
        start = storage.data_ptr()
        begin = int(x.storage_offset()) * x.element_size()
        end = begin + x.element_size() * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)))
        extent = self._extents.get(storage._cdata)
        if extent is None:
            described = f"`{name}`, {_described(x)}" if name else _described(x)
            extent = _Extent(len(self._extents) + 1, storage, begin, end, described)
            self._extents[storage._cdata] = extent
        extent.begin, extent.end = min(begin, extent.begin), max(end, extent.end)
        return (extent.number << REGION) + MIDDLE + start % ALIGNMENT + int(begin)

    def memory(self) -> Global:
        """What the launch may touch."""
        self._buffers = {}
        for key, extent in self._extents.items():
            whole, part = _bytes(extent.storage), slice(extent.begin, extent.end)
            written = None
            fresh = self._known(key)
            if fresh is not None:
                fresh.update(whole)
                written = None if fresh.written[part].all() else fresh.written[part]
            begin = MIDDLE + extent.storage.data_ptr() % ALIGNMENT + extent.begin
            self._buffers[extent.number] = Buffer(extent.name, whole[part], begin, written)
        return Global(self._buffers)

    def launched(self, kernel: str) -> None:
        """Take note of what a launch stored to."""
        for key, extent in self._extents.items():
            fresh = self._known(key)
            if fresh is not None and self._buffers[extent.number].stored:
                fresh.kernel = kernel

    def forget(self) -> None:
        """The next launch has other tensors."""
        self._extents.clear()
        self._buffers = {}

    def _known(self, key: int) -> _Fresh | None:
        fresh = self._fresh.get(key)
        if fresh is not None and fresh.reference.expired():  # another storage stands there now
            del self._fresh[key]
            return None
        return fresh

    def check_written(self, results: Any) -> None:
        """Every element of an op's results must hold a value."""
        for x in results if isinstance(results, list | tuple) else [results]:
            fresh = self._known(x.untyped_storage()._cdata) if isinstance(x, Tensor) and x.numel() else None
            if fresh is not None:
                fresh.update(_bytes(x.untyped_storage()))
                written = np.zeros(fresh.written.size, bool)
                _elements(written, x)[...] = True
                self._complain(fresh, written & ~fresh.written)

    def check_all_written(self) -> None:
        """Nothing that a kernel stored to and that is still there may be left in parts."""
        for fresh in self._fresh.values():
            if fresh.kernel and not fresh.reference.expired():
                storage = torch.UntypedStorage._new_with_weak_ptr(fresh.reference.cdata)
                if storage is not None:
                    fresh.update(_bytes(storage))
                    self._complain(fresh, fresh.needed & ~fresh.written)

    def _complain(self, fresh: _Fresh, lacking: np.ndarray) -> None:
        if lacking.any():
            first, count = int(np.flatnonzero(lacking)[0]) // fresh.item, int(lacking.sum()) // fresh.item
            reason = f"{count} elements of an output, {fresh.described}, are left unwritten, the first of them {first}"
            raise KernelFault(fresh.kernel or "no kernel", reason)


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    """A storage's memory, seen by no mode."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()


def _elements(whole: np.ndarray, x: Tensor) -> np.ndarray:
    """The bytes of x's elements, of an array with one entry a byte of its storage."""
    item = x.element_size()
    strides = (*(s * item for s in x.stride()), 1)
    return np.lib.stride_tricks.as_strided(whole[x.storage_offset() * item :], (*x.shape, item), strides)


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


class Watch(TorchDispatchMode):
    """Tells the device of tensors without values."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.device.allocated(out)
        return out


class Pointers(TorchFunctionMode):
    """Inside the block Tensor.data_ptr gives the device's addresses; the tensors are forgotten after it."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.data_ptr:
            return self.device.address(args[0])
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        self.device.forget()
        super().__exit__(*error)
