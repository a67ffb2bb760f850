"""Registers of the lanes that execute together, and an instruction's operands as arrays of one element a lane.

What is the same in every lane may have length 1.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Protocol

import numpy as np

from trajkern.testing.ptx.exact import SIGNED, UNSIGNED, to_bfloat16
from trajkern.testing.ptx.memory import Global, Shared
from trajkern.testing.ptx.parser import SIZE, Kernel, Operand

FLOAT = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
SPECIAL = {"%laneid", *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz")}
POISON = {"pred": True, "f32": np.nan, "f64": np.nan}  # what a register holds before it is set; else 0xa5a5...


def dtype(kind: str) -> np.dtype:
    """Of a register or an operand; bfloat16 is computed as float32, by :func:`source` and :func:`target`."""
    if kind == "pred":
        return np.dtype(bool)
    table = SIGNED if kind[0] == "s" else UNSIGNED
    return np.dtype(FLOAT.get(kind) or table[SIZE[kind]])


class Registers(dict[str, np.ndarray]):
    """Of all lanes; one that no lane has set holds poison."""

    def __init__(self, kernel: Kernel, count: int) -> None:
        super().__init__()
        self.kernel, self.count = kernel, count

    def __missing__(self, name: str) -> np.ndarray:
        kind = self.kernel.type_of(name)
        poison = POISON.get(kind, 0xA5A5A5A5A5A5A5A5 & (1 << 8 * SIZE[kind]) - 1)
        self[name] = values = np.full(self.count, poison, dtype(kind))
        return values


class Running(Protocol):
    """What an instruction sees of the blocks that execute together."""

    count: int
    width: int  # lanes a block
    lane: np.ndarray  # of each thread, in its warp
    registers: Registers
    memory: Global
    shared: Shared
    parameters: dict[str, np.ndarray]  # name -> bytes
    seed: int | None  # of the approximations' errors

    def note(
        self, space: str, places: np.ndarray, size: int, lanes: Lanes, number: int, values: np.ndarray | None
    ) -> None: ...


class Lanes(dict[str, np.ndarray]):
    """Registers of the lanes that execute together, fetched as they are asked for."""

    def __init__(self, running: Running, index: np.ndarray) -> None:
        super().__init__()
        self.running, self.index, self.count = running, index, index.size
        self.all = index.size == running.count

    def __missing__(self, name: str) -> np.ndarray:
        values = self.running.registers[name]
        self[name] = values = values.copy() if self.all else values.take(self.index)
        return values

    def whole_warps(self) -> bool:
        """Whether every warp that is here is here with all its lanes."""
        if self.all:
            return True
        if self.count % 32:
            return False
        ends = self.index.reshape(-1, 32)
        return bool(((ends[:, 0] & 31 == 0) & (ends[:, 31] - ends[:, 0] == 31)).all())

    def part(self, mask: np.ndarray) -> Lanes:
        return _Part(self, mask)


class _Part(Lanes):
    """Those of the lanes whose predicate lets them."""

    def __init__(self, parent: Lanes, mask: np.ndarray) -> None:
        super().__init__(parent.running, parent.index[mask])
        self.parent, self.mask = parent, mask

    def __missing__(self, name: str) -> np.ndarray:
        values = self.parent[name]
        self[name] = values = values[self.mask] if values.size == self.mask.size else values
        return values


Source = Callable[[Lanes], np.ndarray]
Target = Callable[[Lanes, np.ndarray], None]


def immediate(text: str, kind: str, symbols: dict[str, int]) -> np.ndarray:
    """A number, or the address of a shared array, as an array of length 1."""
    if text[:2].lower() in ("0f", "0d"):
        return np.array([int(text[2:], 16)], np.uint32 if text[1] in "fF" else np.uint64).view(dtype(kind))
    try:
        value = symbols[text] if text in symbols else int(text.rstrip("U"), 0)
    except ValueError:
        raise NotImplementedError(f"no execution on a CPU knows the operand {text}") from None
    if kind == "pred":
        return np.array([value != 0])
    return np.array([value & (1 << 8 * SIZE[kind]) - 1], UNSIGNED[SIZE[kind]]).view(dtype(kind))


def source(operand: Operand, kind: str, kernel: Kernel) -> Source:
    """Lanes -> the operand as an array of this type."""
    if not isinstance(operand, str):
        raise NotImplementedError(f"no execution on a CPU reads the operand {operand}")
    name = operand
    if not kernel.is_register(name):
        value = immediate(name, kind, kernel.shared)
        return lambda lanes: value
    if name not in SPECIAL and name.rstrip("0123456789") not in kernel.types:
        raise NotImplementedError(f"no execution on a CPU has the special register {name}")
    have = dtype(kernel.type_of(name))
    if kind == "bf16":
        return lambda lanes: (lanes[name].view(UNSIGNED[have.itemsize]).astype(np.uint32) << np.uint32(16)).view(
            np.float32
        )
    want = dtype(kind)
    if have == want:
        return itemgetter(name)
    if have.itemsize == want.itemsize:
        return lambda lanes: lanes[name].view(want)
    raw, narrow = UNSIGNED[have.itemsize], UNSIGNED[want.itemsize]
    return lambda lanes: lanes[name].view(raw).astype(narrow).view(want)


def target(operand: Operand, kind: str, kernel: Kernel) -> Target:
    """(lanes, array of this type) -> the register set, extended as the type's sign says where it is wider."""
    if not isinstance(operand, str):
        raise NotImplementedError(f"no execution on a CPU sets the operand {operand}")
    name = operand
    if name == "_":
        return lambda lanes, value: None
    have = dtype(kernel.type_of(name))
    if kind == "bf16":
        raw = UNSIGNED[have.itemsize]
        return lambda lanes, value: lanes.__setitem__(name, to_bfloat16(value).astype(raw).view(have))
    given = dtype(kind)
    if have == given:
        return lambda lanes, value: lanes.__setitem__(name, value)
    if have.itemsize == given.itemsize:
        return lambda lanes, value: lanes.__setitem__(name, value.view(have))
    wide = SIGNED[have.itemsize] if kind[0] == "s" else UNSIGNED[have.itemsize]
    bits = given if kind[0] in "su" else np.dtype(UNSIGNED[given.itemsize])
    return lambda lanes, value: lanes.__setitem__(name, value.view(bits).astype(wide).view(have))
