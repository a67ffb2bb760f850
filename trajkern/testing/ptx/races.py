"""Accesses that nothing orders: logged while the lanes run, found at the launch's end, in whatever order they ran."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from trajkern.testing.ptx.exact import UNSIGNED

MOST = 20  # places in memory that are reported of one space
BLOCK_BARRIER = 1 << 32  # what a block's barrier adds to a thread's clock; a warp's adds 1


class _Accesses(NamedTuple):
    """Of one instruction, by several threads at once."""

    address: np.ndarray
    size: int
    thread: np.ndarray
    clock: np.ndarray
    instruction: int
    values: np.ndarray | None  # of a store


class _Rows(NamedTuple):
    """One row a granule that a thread touched."""

    granule: np.ndarray
    thread: np.ndarray
    clock: np.ndarray
    instruction: np.ndarray
    store: np.ndarray
    value: np.ndarray

    def where(self, chosen: np.ndarray) -> _Rows:
        return _Rows(*(x[chosen] for x in self))


class Race(NamedTuple):
    """Two accesses, the first a store: (instruction, thread) each, and where the place begins in its space."""

    space: int
    address: int
    first: tuple[int, int]
    second: tuple[int, int]


class AccessLog:
    """Who touched what when.

    Two accesses to a granule by different threads, one of them a store, are a race unless a barrier of their block or
    of their warp lies between.

    ``repeated``: threads of a block may hold copies of one element, as Triton's layouts have them. Then several may
    store one value to one place, and a thread may store where others load by the instruction by which it has loaded
    itself: the copies of a value that is read, changed and written back. (Whether a copy that was loaded too late is
    used, the random order can show.)
    """

    def __init__(self, granule: int, repeated: bool) -> None:
        self.granule, self.repeated = granule, repeated  # granule: bytes of the kernel's smallest store
        self._accesses: dict[int, list[_Accesses]] = {}  # by space: a buffer's number, or -1 for shared memory
        self._stored: set[int] = set()

    def add(
        self,
        space: int,
        address: np.ndarray,
        size: int,
        thread: np.ndarray,
        clock: np.ndarray,
        instruction: int,
        values: np.ndarray | None,
    ) -> None:
        self._accesses.setdefault(space, []).append(_Accesses(address, size, thread, clock, instruction, values))
        if values is not None:
            self._stored.add(space)

    def races(self, threads_per_block: int) -> list[Race]:
        """One a pair of instructions that race."""
        found: dict[tuple[int, int], Race] = {}
        for space in self._stored:
            rows = self._disputed_rows(space)
            block, warp, since = rows.thread // threads_per_block, rows.thread // 32, rows.clock >> 32
            for keys, who in (
                ((rows.granule,), block),
                ((rows.granule, block, since), warp),
                ((rows.granule, warp, rows.clock), rows.thread),
            ):
                for i, j in self._pairs(rows, keys, who):
                    pair = int(rows.instruction[i]), int(rows.instruction[j])
                    accesses = (pair[0], int(rows.thread[i])), (pair[1], int(rows.thread[j]))
                    found.setdefault(pair, Race(space, int(rows.granule[i]) * self.granule, *accesses))
        return list(found.values())

    def _disputed_rows(self, space: int) -> _Rows:
        """The rows of granules that several threads touched and one stored to."""
        columns = [self._columns(a) for a in self._accesses[space]]
        lowest = min(int(c.granule.min()) for c in columns)
        granules = max(int(c.granule.max()) for c in columns) - lowest + 1
        owner, stored, several = np.zeros(granules, np.int64), np.zeros(granules, bool), np.zeros(granules, bool)
        for c in columns:
            owner[c.granule - lowest] = c.thread
            stored[(c.granule - lowest)[c.store]] = True
        for c in columns:
            several[(c.granule - lowest)[owner[c.granule - lowest] != c.thread]] = True
        disputed = several & stored
        return _Rows(*map(np.concatenate, zip(*(c.where(disputed[c.granule - lowest]) for c in columns), strict=True)))

    def _columns(self, a: _Accesses) -> _Rows:
        granule, thread, clock = a.address // self.granule, a.thread, a.clock
        parts = max(a.size // self.granule, 1)
        if parts > 1:
            granule = (granule[:, None] + np.arange(parts)).reshape(-1)
            thread, clock = np.repeat(thread, parts), np.repeat(clock, parts)
        count = granule.size
        value = np.zeros(count, np.uint64)
        if a.values is not None:
            value = np.ascontiguousarray(a.values).view(UNSIGNED[min(self.granule, a.size)]).astype(np.uint64)
        number, store = np.full(count, a.instruction), np.full(count, a.values is not None)
        return _Rows(granule, thread, clock, number, store, value)

    def _pairs(self, rows: _Rows, keys: tuple[np.ndarray, ...], who: np.ndarray) -> list[tuple[int, int]]:
        """(store, other access) of equal keys by different threads, warps or blocks."""
        if not who.size:
            return []
        order = np.lexsort(keys[::-1])
        new = np.zeros(order.size, bool)
        new[0] = True
        for key in keys:
            new[1:] |= key[order][1:] != key[order][:-1]
        place = np.cumsum(new) - 1
        if self.repeated and len(keys) > 1:
            kept = ~_repeated_loads(rows.where(order), place)
            order, place = order[kept], place[kept]
            if not order.size:
                return []
        begin = np.flatnonzero(np.diff(place, prepend=-1))
        several = np.minimum.reduceat(who[order], begin) != np.maximum.reduceat(who[order], begin)
        several &= np.logical_or.reduceat(rows.store[order], begin)
        if self.repeated:
            value = rows.value[order]
            same = np.minimum.reduceat(value, begin) == np.maximum.reduceat(value, begin)
            several &= ~(same & np.logical_and.reduceat(rows.store[order], begin))
        end = np.append(begin[1:], order.size)
        pairs = []
        for k in np.flatnonzero(several)[:MOST]:
            at = order[begin[k] : end[k]]
            for i in at[rows.store[at]][:8]:
                others = at[who[at] != who[i]]
                pairs += [(int(i), int(others[j])) for j in np.unique(rows.instruction[others], return_index=True)[1]]
        return pairs


def _repeated_loads(rows: _Rows, place: np.ndarray) -> np.ndarray:
    """Which rows load by an instruction by which every thread that stores to the same place has loaded it, too."""
    threads = int(rows.thread.max()) + 1
    by = place * threads + rows.thread
    storing = np.unique(by[rows.store])
    storers = np.bincount(storing // threads, minlength=int(place[-1]) + 1)
    instructions = int(rows.instruction.max()) + 1
    load = place * instructions + rows.instruction
    own = ~rows.store & np.isin(by, storing)
    loaded, count = np.unique(np.unique(load[own] * threads + rows.thread[own]) // threads, return_counts=True)
    by_all = loaded[count == storers[loaded // instructions]]
    return ~rows.store & np.isin(load, by_all)
