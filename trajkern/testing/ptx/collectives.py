"""What the lanes of a warp or a block do together: a lane waits until all that it names are there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trajkern.testing.ptx.faults import BadAccess
from trajkern.testing.ptx.order import WARP
from trajkern.testing.ptx.parser import Address, Instruction, Kernel, Pair, Vector
from trajkern.testing.ptx.values import Lanes, source, target

COLLECTIVES = ("shfl", "vote", "bar", "barrier", "redux", "ldmatrix")
ALL_LANES = np.uint32(0xFFFFFFFF)
Work = Callable[[Lanes, np.ndarray], None]  # of lanes, and of the mask of each

REDUCE = {"max": np.maximum, "min": np.minimum, "add": np.add, "and": np.bitwise_and, "or": np.bitwise_or}


class Collective:
    """A decoded one."""

    def __init__(self, x: Instruction, kernel: Kernel, number: int) -> None:
        self.x = x
        warp_barrier = x.name in ("bar", "barrier") and "warp" in x.modifiers
        self.of_block = x.name in ("bar", "barrier") and not warp_barrier  # all the threads of a block wait
        self.orders_memory = warp_barrier  # among the lanes of the warp; a shuffle or a vote promises nothing of it
        self.work: Work | None = None
        self._mask = None
        if self.of_block:
            _check_block_barrier(x)
        elif x.name == "ldmatrix":
            self.work = _load_matrices(x, kernel, number)
        else:
            self._mask = source(x.operands[-1], "u32", kernel)
            if not warp_barrier:
                self.work = {"shfl": _shuffle, "vote": _vote, "redux": _reduction}[x.name](x, kernel)

    def mask(self, lanes: Lanes) -> np.ndarray:
        """The lanes that each of these names: one array for all, or of length 1."""
        return np.array([ALL_LANES]) if self._mask is None else self._mask(lanes)


def _check_block_barrier(x: Instruction) -> None:
    barrier, *threads = x.operands
    plain = x.modifiers in (("sync",), ("sync", "aligned"), ("cta", "sync"), ("cta", "sync", "aligned"))
    if not plain or barrier != "0" or threads:
        raise x.unknown("only barrier 0 of all threads is known")


def _shuffle(x: Instruction, kernel: Kernel) -> Work:
    if x.modifiers[0] != "sync" or x.modifiers[1] not in ("up", "down", "bfly", "idx") or x.modifiers[2:] != ("b32",):
        raise x.unknown()
    result, value, by, limits = x.operands[:4]
    how = x.modifiers[1]
    get, get_by, get_limits = (source(o, "u32", kernel) for o in (value, by, limits))
    register, predicate = result if isinstance(result, Pair) else (result, "_")
    put, put_inside = target(register, "u32", kernel), target(predicate, "pred", kernel)
    plan: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # (by, limits) -> whence each lane reads

    def whence(lane: np.ndarray, by: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        by, limits = by.astype(np.int64) & 31, limits.astype(np.int64)
        clamp, segment = limits & 31, limits >> 8 & 31
        lowest = lane & segment
        highest = lowest | clamp & ~segment
        of = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | by & ~segment}[how]
        inside = of >= highest if how == "up" else of <= highest
        return np.where(inside, of, lane), inside

    def whole(lanes: Lanes, by: np.ndarray, limits: np.ndarray) -> None:
        """Complete warps, one distance: a column of each warp's row."""
        key = int(by[0]), int(limits[0])
        if key not in plan:
            plan[key] = whence(np.arange(WARP), by, limits)
        of, inside = plan[key]
        values = np.broadcast_to(get(lanes), lanes.count).reshape(-1, WARP)
        put(lanes, values[:, of].reshape(-1))
        if predicate != "_":
            put_inside(lanes, np.tile(inside, lanes.count // WARP))

    def shuffle(lanes: Lanes, mask: np.ndarray) -> None:
        by, limits = get_by(lanes), get_limits(lanes)
        if by.size == limits.size == mask.size == 1 and mask[0] == ALL_LANES and lanes.whole_warps():
            return whole(lanes, by, limits)
        lane = lanes.running.lane[lanes.index]
        of, inside = whence(lane, by, limits)
        absent = ~((mask.astype(np.int64) >> of) & 1).astype(bool)
        if absent.any():
            bad = int(np.flatnonzero(absent)[0])
            raise BadAccess(f"reads lane {int(of[bad])}, which is not in its mask", bad)
        sources = np.empty(lanes.running.count, np.uint32)
        sources[lanes.index] = get(lanes)
        put(lanes, sources[lanes.index - lane + of])
        put_inside(lanes, inside)

    return shuffle


def _vote(x: Instruction, kernel: Kernel) -> Work:
    how = x.modifiers[1]
    if x.modifiers[0] != "sync" or how not in ("ballot", "any", "all", "uni"):
        raise x.unknown()
    get = source(x.operands[1], "pred", kernel)
    put = target(x.operands[0], "u32" if how == "ballot" else "pred", kernel)

    def vote(lanes: Lanes, mask: np.ndarray) -> None:
        votes = np.zeros(lanes.running.count, bool)
        votes[lanes.index] = get(lanes)
        bits = warp_bits(votes)[lanes.index // WARP] & mask
        results = {"any": bits != 0, "all": bits == mask, "uni": (bits == mask) | (bits == 0)}
        put(lanes, bits if how == "ballot" else results[how])

    return vote


def _reduction(x: Instruction, kernel: Kernel) -> Work:
    if x.modifiers[0] != "sync" or x.modifiers[1] not in REDUCE or len(x.modifiers) != 3 or x.type[0] == "f":
        raise x.unknown()
    reduce = REDUCE[x.modifiers[1]]
    get, put = source(x.operands[1], x.type, kernel), target(x.operands[0], x.type, kernel)

    def reduction(lanes: Lanes, mask: np.ndarray) -> None:
        if (mask != ALL_LANES).any():
            raise x.unknown("of a part of a warp")
        values = np.broadcast_to(get(lanes), lanes.count).reshape(-1, WARP)
        put(lanes, np.repeat(reduce.reduce(values, axis=1, dtype=values.dtype), WARP))

    return reduction


def _load_matrices(x: Instruction, kernel: Kernel, number: int) -> Work:
    """8x8 of 16 bits each: lane 8 j + r says where row r of matrix j is; lane l gets the l-th 4 bytes of every one."""
    registers, address = x.operands
    if not {"sync", "aligned", "m8n8", "shared", "b16"} >= set(x.modifiers) - {"x1", "x2", "x4"}:
        raise x.unknown()
    if x.guard or not isinstance(registers, Vector) or not isinstance(address, Address):
        raise x.unknown()
    get, puts = source(address.base, "u32", kernel), [target(r, "b32", kernel) for r in registers]

    def load(lanes: Lanes, mask: np.ndarray) -> None:
        running = lanes.running
        base = np.broadcast_to(get(lanes).astype(np.int64) + address.offset, lanes.count).reshape(-1, WARP)
        lane = running.lane[lanes.index].reshape(-1, WARP)
        for j, put in enumerate(puts):
            at = np.take_along_axis(base, 8 * j + lane // 4, 1) + 4 * (lane % 4)
            place = running.shared.place(at.reshape(-1), 4, lanes.index // running.width, "reads")
            running.note("shared", place, 4, lanes, number, None)
            put(lanes, running.shared.load(place, 4))

    return load


def warp_bits(present: np.ndarray) -> np.ndarray:
    """Of each warp, its lanes' truth values as bits."""
    return np.packbits(present.reshape(-1, WARP), axis=1, bitorder="little").view("<u4")[:, 0]
