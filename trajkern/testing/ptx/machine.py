"""A launch: the lanes of many blocks at once, stretches of code that some of them execute together, and their order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from trajkern.testing.ptx.collectives import ALL_LANES, Collective, warp_bits
from trajkern.testing.ptx.faults import BadAccess, KernelFault, Place
from trajkern.testing.ptx.memory import REGION, Global, Shared
from trajkern.testing.ptx.order import WARP, Order
from trajkern.testing.ptx.program import Program, Stretch
from trajkern.testing.ptx.races import BLOCK_BARRIER, AccessLog
from trajkern.testing.ptx.values import Lanes, Registers

LANES_AT_ONCE = 16384
MOST_STEPS = 2_000_000  # of one wave; beyond, the kernel does not end
MOST_SHARED = 227 * 1024  # bytes a block can have, from compute capability 9.0 on
SHARED_SPACE = -1  # in the log of accesses, where a buffer has its number

Corner = tuple[int, int, int]


@dataclass
class Launch:
    """``run`` raises KernelFault at what is wrong with the kernel, and at accesses that race."""

    program: Program
    grid: Corner
    block: Corner
    dynamic_shared: int  # bytes
    parameters: dict[str, np.ndarray]  # name -> bytes
    memory: Global
    order: Order
    seed: int | None = None  # of the approximations' errors; None: exact
    repeated: bool = False  # see AccessLog

    def run(self) -> Counter[str]:
        """Counts of what was executed."""
        self._check()
        threads = int(np.prod(self.block))
        self.width = -(-threads // WARP) * WARP
        log = AccessLog(self.program.granule, self.repeated)
        count = int(np.prod(self.grid))
        blocks, size = self.order.blocks(count), max(1, LANES_AT_ONCE // self.width)
        stats: Counter[str] = Counter(launches=1)
        for a in range(0, count, size):
            stats += Wave(self, blocks[a : a + size], threads, log).run()
        races = log.races(self.width)
        if races:
            first = races[0]
            places = tuple(self.place(number, thread) for number, thread in (first.first, first.second))
            reason = "threads touch the same memory, one of them writes, and nothing orders them"
            if len(races) > 1:
                reason += f" ({len(races)} pairs of instructions; the first of them follows)"
            raise KernelFault(self.program.kernel.name, reason, places, first.address)
        return stats

    def _check(self) -> None:
        shared = self.program.kernel.static_shared + self.dynamic_shared
        threads, grid = int(np.prod(self.block)), self.grid
        legal = 0 < threads <= 1024 and 0 < grid[0] < 2**31 and 0 < grid[1] < 2**16 and 0 < grid[2] < 2**16
        if not legal or shared > MOST_SHARED or self.program.kernel.threads not in (None, threads):
            reason = f"a GPU refuses a launch of {grid} blocks of {self.block} threads with {shared} shared bytes"
            raise KernelFault(self.program.kernel.name, reason)

    def place(self, number: int, thread: int | None = None) -> Place:
        """``thread``: counted over all blocks, each as wide as its warps."""
        x = self.program.instructions[number]
        if thread is None:
            return Place(x.text, x.where)
        block, lane = divmod(thread, self.width)
        return Place(x.text, x.where, _corner(lane, self.block), _corner(block, self.grid))


def _corner(number: int, shape: Corner) -> Corner:
    return number % shape[0], number // shape[0] % shape[1], number // (shape[0] * shape[1])


class Wave:
    """Some blocks of a launch, executed together."""

    def __init__(self, launch: Launch, blocks: np.ndarray, threads: int, log: AccessLog) -> None:
        self.launch, self.program, self.log = launch, launch.program, log
        self.width, self.memory, self.parameters = launch.width, launch.memory, launch.parameters
        self.seed, self.threads = launch.seed, threads
        self.count = blocks.size * self.width
        thread = np.arange(self.count) % self.width
        self.numbers = np.repeat(blocks * self.width, self.width) + thread
        self.shared = Shared(blocks.size, self.program.kernel.static_shared + launch.dynamic_shared)
        self.registers = Registers(self.program.kernel, self.count)
        self.clock = np.zeros(self.count, np.int64)  # see races.py
        self.at = np.where(thread < threads, 0, self.program.end)
        self.lane = thread % WARP
        self.stats: Counter[str] = Counter()
        self._special(np.repeat(blocks, self.width), thread)

    def _special(self, block: np.ndarray, thread: np.ndarray) -> None:
        shape, grid = self.launch.block, self.launch.grid
        for k, axis in enumerate("xyz"):
            below = int(np.prod(shape[:k])), int(np.prod(grid[:k]))
            self.registers[f"%tid.{axis}"] = (thread // below[0] % shape[k]).astype(np.uint32)
            self.registers[f"%ctaid.{axis}"] = (block // below[1] % grid[k]).astype(np.uint32)
            self.registers[f"%ntid.{axis}"] = np.full(self.count, shape[k], np.uint32)
            self.registers[f"%nctaid.{axis}"] = np.full(self.count, grid[k], np.uint32)
        self.registers["%laneid"] = self.lane.astype(np.uint32)

    def note(
        self, space: str, places: np.ndarray, size: int, lanes: Lanes, number: int, values: np.ndarray | None
    ) -> None:
        """An access, for the search for races."""
        thread, clock = self.numbers[lanes.index], self.clock[lanes.index]
        if space == "shared":  # a block's bytes where no other block's are
            places = places % self.shared.stride + thread // self.width * self.shared.stride
            self.log.add(SHARED_SPACE, places, size, thread, clock, number, values)
            return
        region = places >> REGION
        first = int(region[0])
        if (region == first).all():
            self.log.add(first, places, size, thread, clock, number, values)
            return
        for k in np.unique(region).tolist():
            m = region == k
            self.log.add(k, places[m], size, thread[m], clock[m], number, None if values is None else values[m])

    def run(self) -> Counter[str]:
        end, stretches, order = self.program.end, self.program.stretches, self.launch.order
        with np.errstate(all="ignore"):
            for _ in range(MOST_STEPS):
                present = np.flatnonzero(np.bincount(self.at, minlength=end + 1)[:end])
                if present.size == 0:
                    return self.stats
                for k in order.turns(present).tolist():
                    lanes = np.flatnonzero(self.at == k)
                    collective = stretches[k].collective
                    if collective is not None:
                        lanes = self._arrived(collective, stretches[k].first, lanes)
                    if lanes.size:
                        break
                else:
                    self._deadlock()
                if collective is None or not collective.of_block:
                    lanes = order.some(lanes)
                self._execute(k, lanes)
        raise KernelFault(self.program.kernel.name, f"does not end within {MOST_STEPS:,} steps")

    def _execute(self, k: int, index: np.ndarray) -> None:
        """Stretch k and, while nothing parts or stops the lanes, those after it."""
        lanes = Lanes(self, index)
        kept: set[str] = set()
        while True:
            stretch = self.program.stretches[k]
            self._perform(stretch, lanes)
            kept.update(stretch.kept)
            if stretch.branch is not None:
                break
            k += 1
            if k == self.program.end or self.program.stretches[k].is_goal:
                break
            following = self.program.stretches[k].collective
            if following is not None and not self._needs_no_wait(following, lanes) or not self.launch.order.stays():
                break
        for name in kept:
            self.registers[name][index] = lanes[name]
        if stretch.branch is None:
            self.at[index] = k
        elif stretch.branch.guard is None:
            self.at[index] = stretch.goal
        else:
            name, value = stretch.branch.guard
            self.at[index] = np.where(lanes[name] == value, stretch.goal, k + 1)

    def _perform(self, stretch: Stretch, lanes: Lanes) -> None:
        done = 0
        try:
            for step in stretch.steps:
                step(lanes)
                done += 1
            if stretch.collective is not None:
                self._collect(stretch.collective, lanes)
        except BadAccess as bad:
            index = lanes.index if bad.lanes is None else bad.lanes
            place = self.launch.place(stretch.first + done, int(self.numbers[index[bad.position]]))
            raise KernelFault(self.program.kernel.name, bad.reason, (place,), bad.address) from None
        self.stats["steps"] += 1
        self.stats["instructions"] += len(stretch.steps) + 1
        self.stats["lane instructions"] += (len(stretch.steps) + 1) * lanes.count

    def _needs_no_wait(self, collective: Collective, lanes: Lanes) -> bool:
        """Whether the lanes that came here together are all that the collective is about."""
        if collective.of_block or collective.x.guard:
            return False
        mask = collective.mask(lanes)
        return lanes.whole_warps() and bool((mask == ALL_LANES).all())

    def _arrived(self, collective: Collective, number: int, index: np.ndarray) -> np.ndarray:
        """Those of the lanes at a collective whose partners are all there."""
        guard = collective.x.guard
        if guard:
            takes_part = np.broadcast_to(Lanes(self, index)[guard[0]] == guard[1], index.size)
            if not takes_part.all():
                return index[~takes_part]  # they pass by
        here = np.zeros(self.count, bool)
        if collective.of_block:
            here[index] = True
            absent = ~here & (np.arange(self.count) % self.width < self.threads)
            ready = np.logical_not(absent.reshape(-1, self.width).any(axis=1))
            return index[ready[index // self.width]]
        lanes = Lanes(self, index)
        masks = np.broadcast_to(collective.mask(lanes), index.size)
        ready = np.zeros(index.size, bool)
        for mask in np.unique(masks).tolist():
            mine = masks == mask
            outside = ((mask >> self.lane[index[mine]]) & 1) == 0
            if outside.any():
                place = self.launch.place(number, int(self.numbers[index[mine][outside][0]]))
                raise KernelFault(self.program.kernel.name, f"a lane is not in its own mask {mask:#010x}", (place,))
            here[:] = False
            here[index[mine]] = True
            ready |= mine & ((np.uint32(mask) & ~warp_bits(here)) == 0)[index // WARP]
        return index[ready]

    def _collect(self, collective: Collective, lanes: Lanes) -> None:
        guard = collective.x.guard
        if guard and not (lanes[guard[0]] == guard[1]).all():
            return
        if collective.of_block:
            self.clock[lanes.index] += BLOCK_BARRIER
            return
        mask = collective.mask(lanes)
        if collective.orders_memory:  # a part of a warp counts as unordered: too strict, never too lax
            self.clock[lanes.index] += mask == ALL_LANES
        if collective.work is not None:
            collective.work(lanes, mask)

    def _deadlock(self) -> NoReturn:
        """Every lane waits."""
        places, counts = [], []
        for k in np.unique(self.at).tolist():
            who = np.flatnonzero(self.at == k)
            number = int(self.numbers[who[0]])
            if k == self.program.end:
                real = who[who % self.width < self.threads]
                counts += [f"{real.size} have returned"] * bool(real.size)
                continue
            places.append(self.launch.place(self.program.stretches[k].first, number))
            counts.append(f"{who.size} wait at `{places[-1].instruction}`")
        reason = f"lanes wait for others that never come: {', '.join(counts)}"
        raise KernelFault(self.program.kernel.name, reason, tuple(places))
