"""Loads and stores of the lanes that execute them together."""

from __future__ import annotations

import numpy as np

from trajkern.testing.ptx.memory import aligned
from trajkern.testing.ptx.operations import Step
from trajkern.testing.ptx.parser import SIZE, Address, Instruction, Kernel, Vector
from trajkern.testing.ptx.values import Lanes, dtype, source, target

ACCESSES = ("ld", "ldu", "st")
SPACES = ("param", "global", "shared")
HINTS = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1_evict_last", "L1_evict_first", "L1_no_allocate"}


def decode(x: Instruction, kernel: Kernel, number: int) -> Step:
    """A load or a store, its guard left to the caller; ``number``: of the instruction in its kernel."""
    *modifiers, kind = x.modifiers
    space = next((m for m in modifiers if m in SPACES), None)
    wide = {f"v{n}" for n in (2, 4, 8)}
    unknown = [m for m in modifiers if m != space and m not in HINTS | wide]
    address, values = (x.operands[1], x.operands[0]) if x.name != "st" else (x.operands[0], x.operands[1])
    if space is None or unknown or kind not in SIZE or not isinstance(address, Address) or len(x.operands) != 2:
        raise x.unknown()
    names = values if isinstance(values, Vector) else (values,)
    size = SIZE[kind]
    if space == "param":
        if x.name == "st":
            raise x.unknown()
        return _parameter(address, [(k * size, target(v, kind, kernel)) for k, v in enumerate(names)], kind)
    raw = f"b{8 * size}"
    loads = [(k * size, target(v, kind, kernel)) for k, v in enumerate(names)] if x.name != "st" else []
    stores = [(k * size, source(v, raw, kernel)) for k, v in enumerate(names)] if x.name == "st" else []
    wide_base = kernel.is_register(address.base) and SIZE[kernel.type_of(address.base)] == 8
    base = source(address.base, "u64" if space == "global" or wide_base else "u32", kernel)
    loaded, whole, shared = dtype(kind), size * len(names), space == "shared"

    def access(lanes: Lanes) -> None:
        at = base(lanes).astype(np.int64) + address.offset
        if at.size != lanes.count:
            at = np.repeat(at, lanes.count)
        aligned(at, whole)
        running = lanes.running
        block = lanes.index // running.width if shared else at
        for offset, put in loads:
            place = running.shared.place(at + offset, size, block, "reads") if shared else at + offset
            running.note(space, place, size, lanes, number, None)
            memory = running.shared if shared else running.memory
            put(lanes, memory.load(place, size).view(loaded))
        for offset, get in stores:
            value = np.broadcast_to(get(lanes), lanes.count)
            place = running.shared.place(at + offset, size, block, "writes") if shared else at + offset
            running.note(space, place, size, lanes, number, value)
            (running.shared if shared else running.memory).store(place, size, value)

    return access


def _parameter(address: Address, puts: list, kind: str) -> Step:
    width = SIZE[kind]

    def parameter(lanes: Lanes) -> None:
        data = lanes.running.parameters[address.base]
        for offset, put in puts:
            at = address.offset + offset
            put(lanes, data[at : at + width].view(dtype(kind)))

    return parameter
