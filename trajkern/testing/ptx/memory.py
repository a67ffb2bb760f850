"""Global and shared memory with checks: bounds, alignment, and values that were never written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trajkern.testing.ptx.exact import UNSIGNED
from trajkern.testing.ptx.faults import BadAccess

REGION = 40  # a buffer's addresses have its number above these bits, so that no overrun can reach another buffer


@dataclass
class Buffer:
    """Bytes that a kernel may touch."""

    name: str
    bytes: np.ndarray
    begin: int  # address of the first byte within the region
    written: np.ndarray | None = None  # which of the bytes hold a value; None: all
    stored: bool = False  # whether a kernel stored to it


class Global:
    """Buffer k's addresses are k << REGION and on."""

    def __init__(self, buffers: dict[int, Buffer]) -> None:
        self.buffers = buffers

    def _parts(self, addresses: np.ndarray, size: int, does: str) -> Iterator[tuple[Buffer, np.ndarray, np.ndarray]]:
        """Per buffer: (it, the positions of its addresses, their offsets in bytes)."""
        aligned(addresses, size)
        region = addresses >> REGION
        first = int(region[0])
        one = bool((region == first).all())
        everything = np.arange(addresses.size) if not one else _ALL
        for number in [first] if one else np.unique(region).tolist():
            at = everything if one else np.flatnonzero(region == number)
            if number not in self.buffers:
                position = 0 if one else int(at[0])
                raise BadAccess(f"{does} where no tensor is", position, int(addresses[position]))
            buffer = self.buffers[number]
            offsets = addresses[at] - ((number << REGION) + buffer.begin)
            if int(offsets.min()) < 0 or int(offsets.max()) + size > buffer.bytes.size:
                bad = np.flatnonzero((offsets < 0) | (offsets + size > buffer.bytes.size))[0]
                begin = int(offsets[bad])
                position = int(bad) if one else int(at[bad])
                reason = f"{does} bytes {begin} to {begin + size - 1} of {buffer.name}, which has {buffer.bytes.size}"
                raise BadAccess(reason, position, int(addresses[position]))
            yield buffer, at, offsets

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        out = np.empty(addresses.size, UNSIGNED[size])
        for buffer, at, offsets in self._parts(addresses, size, "reads"):
            if buffer.written is not None:
                known = _gather(buffer.written.view(np.uint8), offsets, size) == _WRITTEN[size]
                if not known.all():
                    bad = int(np.flatnonzero(~known)[0])
                    position = bad if at is _ALL else int(at[bad])
                    reason = f"reads byte {int(offsets[bad])} of {buffer.name}, which nothing has written"
                    raise BadAccess(reason, position, int(addresses[position]))
            out[at] = _gather(buffer.bytes, offsets, size)
        return out

    def store(self, addresses: np.ndarray, size: int, values: np.ndarray) -> None:
        for buffer, at, offsets in self._parts(addresses, size, "writes"):
            _scatter(buffer.bytes, offsets, size, values[at])
            buffer.stored = True
            if buffer.written is not None:
                buffer.written[offsets[:, None] + np.arange(size)] = True


class Shared:
    """The shared memory of several blocks, one after the other; ``size`` bytes each."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.stride = -(-size // 16) * 16
        self.bytes = np.full(blocks * self.stride, 0xFF, np.uint8)
        self.written = np.zeros(blocks * self.stride, bool)

    def place(self, addresses: np.ndarray, size: int, block: np.ndarray, does: str) -> np.ndarray:
        """Where a block's addresses stand among all blocks' bytes."""
        aligned(addresses, size)
        if int(addresses.min()) < 0 or int(addresses.max()) + size > self.size:
            bad = int(np.flatnonzero((addresses < 0) | (addresses + size > self.size))[0])
            begin = int(addresses[bad])
            reason = f"{does} bytes {begin} to {begin + size - 1} of shared memory, of which the launch has {self.size}"
            raise BadAccess(reason, bad, begin)
        return addresses + block * self.stride

    def load(self, places: np.ndarray, size: int) -> np.ndarray:
        known = _gather(self.written.view(np.uint8), places, size) == _WRITTEN[size]
        if not known.all():
            bad = int(np.flatnonzero(~known)[0])
            address = int(places[bad]) % self.stride
            raise BadAccess(f"reads byte {address} of shared memory, which nothing has written", bad, address)
        return _gather(self.bytes, places, size)

    def store(self, places: np.ndarray, size: int, values: np.ndarray) -> None:
        _scatter(self.bytes, places, size, values)
        self.written[places[:, None] + np.arange(size)] = True


_WRITTEN = {size: 0x0101010101010101 & (1 << 8 * size) - 1 for size in UNSIGNED}  # that many bytes of True
_ALL: np.ndarray = slice(None)  # type: ignore[assignment]


def aligned(addresses: np.ndarray, size: int) -> None:
    """Raises where an address is no multiple of the bytes that are moved."""
    odd = addresses & (size - 1)
    if odd.any():
        bad = int(np.flatnonzero(odd)[0])
        raise BadAccess(f"moves {size} bytes at an address that is no multiple of {size}", bad, int(addresses[bad]))


def _gather(memory: np.ndarray, offsets: np.ndarray, size: int) -> np.ndarray:
    if memory.ctypes.data % size == 0 and not (offsets & (size - 1)).any():
        whole = memory[: memory.size // size * size]
        return whole.view(UNSIGNED[size])[offsets // size]
    return np.ascontiguousarray(memory[offsets[:, None] + np.arange(size)]).view(UNSIGNED[size])[:, 0]


def _scatter(memory: np.ndarray, offsets: np.ndarray, size: int, values: np.ndarray) -> None:
    if memory.ctypes.data % size == 0 and not (offsets & (size - 1)).any():
        whole = memory[: memory.size // size * size]
        whole.view(UNSIGNED[size])[offsets // size] = values
    else:
        memory[offsets[:, None] + np.arange(size)] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
