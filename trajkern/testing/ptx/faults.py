"""What is wrong with a kernel that was executed: where, and by whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class BadAccess(Exception):
    """What one lane may not do.

    ``position``: of the lane among those that execute the instruction together; ``lanes``: these, where a predicate
    keeps some of them from it.
    """

    def __init__(self, reason: str, position: int, address: int | None = None) -> None:
        super().__init__(reason, position, address)
        self.reason, self.position, self.address = reason, position, address
        self.lanes: np.ndarray | None = None

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Place:
    """An instruction, and the thread and block (x, y, z) that executed it."""

    instruction: str
    source: str  # file:line, "" where the compiler said none
    thread: tuple[int, int, int] | None = None
    block: tuple[int, int, int] | None = None

    def __str__(self) -> str:
        text = f"`{self.instruction}`"
        if self.source:
            text += f" ({self.source})"
        if self.thread is not None and self.block is not None:
            text += f", thread {_corner(self.thread)} of block {_corner(self.block)}"
        return text


class KernelFault(RuntimeError):
    """A compiled kernel did what the GPU would refuse, or what has no defined result.

    Attributes:
        kernel: its name.
        reason: what is wrong.
        places: the instructions concerned, with the lane that executed each; two of them for a race.
        address: of the first byte concerned, None where it is not about memory.
    """

    def __init__(self, kernel: str, reason: str, places: tuple[Place, ...] = (), address: int | None = None) -> None:
        self.kernel, self.reason, self.places, self.address = kernel, reason, places, address
        lines = [f"{kernel}: {reason}"] + [f"  {'at' if k == 0 else 'and'} {place}" for k, place in enumerate(places)]
        if address is not None:
            lines.append(f"  address {address:#x}")
        self._words = "\n".join(lines)
        super().__init__(kernel, reason, places, address)

    def __str__(self) -> str:
        return self._words


KernelFault.__module__ = "trajkern.testing"  # where users find it, for tracebacks


def _corner(x: tuple[int, int, int]) -> str:
    """(5, 0, 0) as 5."""
    return str(x[0]) if x[1:] == (0, 0) else str(x)
