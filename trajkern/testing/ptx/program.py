"""A kernel's code as stretches that lanes execute without a branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from trajkern.testing.ptx import accesses, operations
from trajkern.testing.ptx.collectives import COLLECTIVES, Collective
from trajkern.testing.ptx.faults import BadAccess
from trajkern.testing.ptx.parser import SIZE, Instruction, Kernel
from trajkern.testing.ptx.values import Lanes

BRANCHES = ("bra", "ret", "exit")
SET_NOTHING = ("st", *BRANCHES, "bar", "barrier")


@dataclass
class Stretch:
    """Instructions without a branch between them, or one collective; then a branch or the next stretch."""

    first: int
    is_goal: bool  # a label stands before it
    steps: list[operations.Step] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # registers that are set and that another stretch reads
    branch: Instruction | None = None
    collective: Collective | None = None
    goal: int = 0  # where the branch leads


@dataclass
class Program:
    """A kernel decoded. Stretch number len(stretches) is the end."""

    kernel: Kernel
    instructions: list[Instruction]
    stretches: list[Stretch]
    granule: int  # bytes of the smallest store

    @property
    def end(self) -> int:
        return len(self.stretches)


def decode(kernel: Kernel) -> Program:
    """Raises NotImplementedError with the instruction that has no execution on a CPU."""
    code, labels = kernel.code
    cuts = {0, len(code), *labels.values()}
    for i, x in enumerate(code):
        if x.name in BRANCHES:
            cuts.add(i + 1)
        elif x.name in COLLECTIVES:
            cuts |= {i, i + 1}
    begins = sorted(cuts)
    number = {i: k for k, i in enumerate(begins)}
    goals = set(labels.values())
    spans = list(zip(begins, begins[1:], strict=False))
    stretches = []
    for a, b in spans:
        stretch = Stretch(a, a in goals)
        for i in range(a, b):
            x = code[i]
            if x.name == "bra":
                stretch.branch, stretch.goal = x, number[labels[_label(x)]]
            elif x.name in BRANCHES:
                stretch.branch, stretch.goal = x, len(spans)
            elif x.name in COLLECTIVES:
                stretch.collective = Collective(x, kernel, i)
            else:
                stretch.steps.append(_step(x, kernel, i))
        stretches.append(stretch)
    for stretch, kept in zip(stretches, _kept(code, spans), strict=True):
        stretch.kept = kept
    stores = [SIZE[x.type] for x in code if x.name == "st"]
    return Program(kernel, code, stretches, min([4, *stores]))


def _label(x: Instruction) -> str:
    label = x.operands[-1]
    if set(x.modifiers) - {"uni"} or not isinstance(label, str):
        raise x.unknown()
    return label


def _kept(code: list[Instruction], spans: list[tuple[int, int]]) -> list[list[str]]:
    """Of each stretch, the registers it sets but those that it alone names, and sets before it reads them."""
    homes: dict[str, set[int]] = {}
    for k, (a, b) in enumerate(spans):
        for x in code[a:b]:
            for name in x.registers():
                homes.setdefault(name, set()).add(k)
    kept = []
    for a, b in spans:
        read_first: set[str] = set()
        sets: set[str] = set()
        for x in code[a:b]:
            results = results_of(x)
            reads = {n for n in x.registers() if n not in results or x.guard or _is_read(x, n)}
            read_first |= reads - sets
            sets |= set(results)
        kept.append([n for n in sets if len(homes[n]) > 1 or n in read_first])
    return kept


def results_of(x: Instruction) -> list[str]:
    """The registers that an instruction sets."""
    if x.name in SET_NOTHING:
        return []
    first = x.operands[0]
    return [first] if isinstance(first, str) else [n for n in first if isinstance(n, str) and n != "_"]


def _is_read(x: Instruction, name: str) -> bool:
    return any(name == o or (isinstance(o, tuple) and name in o) for o in x.operands[1:])


def _step(x: Instruction, kernel: Kernel, number: int) -> operations.Step:
    try:
        step = accesses.decode(x, kernel, number) if x.name in accesses.ACCESSES else operations.decode(x, kernel)
    except (KeyError, IndexError, ValueError) as error:  # a type or a number of operands that no table has
        raise x.unknown(repr(error)) from error
    return _guarded(step, x) if x.guard else step


def _guarded(step: operations.Step, x: Instruction) -> Callable[[Lanes], None]:
    """The step for the lanes whose predicate says so."""
    assert x.guard is not None
    name, value = x.guard
    results = results_of(x)

    def guarded(lanes: Lanes) -> None:
        mask = np.broadcast_to(lanes[name] == value, lanes.count)
        if mask.all():
            return step(lanes)
        some = lanes.part(mask)
        if some.count:
            try:
                step(some)
            except BadAccess as bad:
                bad.lanes = some.index
                raise
        for r in results:
            merged = np.array(np.broadcast_to(lanes[r], lanes.count))
            if some.count:
                merged[mask] = some[r]
            lanes[r] = merged

    return guarded
