"""Launches executed on a CPU, one after the other, and what they were."""

from __future__ import annotations

from collections import Counter

import numpy as np
from torch import Tensor

from trajkern.testing.ptx.device import Device
from trajkern.testing.ptx.machine import Corner, Launch
from trajkern.testing.ptx.order import Lowest, Random
from trajkern.testing.ptx.program import Program


class Execution:
    """What :func:`compiled` yields.

    Attributes:
        launches: how often each kernel was launched, by its name.
        stats: "launches", "steps", "instructions" and "lane instructions" executed.
    """

    def __init__(self, order: str, seed: int | None) -> None:
        self.order: Lowest = Random(seed or 0) if order == "random" else Lowest()
        self.seed, self.device = seed, Device()
        self.launches: Counter[str] = Counter()
        self.stats: Counter[str] = Counter()

    def address(self, x: Tensor, name: str) -> int:
        return self.device.address(x, name)

    def execute(
        self,
        program: Program,
        grid: Corner,
        block: Corner,
        shared: int,
        parameters: dict[str, np.ndarray],
        repeated: bool,
    ) -> None:
        """One launch, on the tensors whose addresses were asked for."""
        memory = self.device.memory()
        launch = Launch(program, grid, block, shared, parameters, memory, self.order, self.seed, repeated)
        self.stats += launch.run()
        self.launches[program.kernel.name] += 1
        self.device.launched(program.kernel.name)
