"""Triton's kernels: its own compiler for the architecture, and a driver that hands every launch to a CPU's execution.

The driver is Triton's extension point for devices, so that specialisation, caches, heuristics and autotuning are its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from trajkern.testing.ptx.execution import Execution
from trajkern.testing.ptx.machine import MOST_SHARED
from trajkern.testing.ptx.parser import parse
from trajkern.testing.ptx.program import Program, decode

FLOATS = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}


@cache
def _program(hash: str, file_name: str) -> Program:
    """The kernel that Triton compiled, from its cache."""
    group = get_cache_manager(hash).get_group(f"{file_name}.json") or {}
    (path,) = (path for name, path in group.items() if name.endswith(".ptx"))
    (kernel,) = parse(Path(path).read_text()).values()
    return decode(kernel)


class _Utils:
    """What Triton asks of a driver when it loads a kernel."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: Any) -> tuple[Any, Any, int, int, int]:
        return self, name, 0, 0, 1024

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {
            "max_shared_mem": MOST_SHARED,
            "multiprocessor_count": 1,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }


class _Launcher:
    """Called by Triton in the place of its own for a GPU, once a launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, *args: Any) -> None:
        current = driver.active
        if not isinstance(current, PtxDriver):
            raise RuntimeError("the kernel was loaded for a CPU's execution, which is over")
        enter, leave, bound = args[4], args[5], args[6:]
        program = _program(self.metadata.hash, self.source.name[:150])
        parameters = [p.name for p in program.kernel.parameters]
        sizes = [p.size for p in program.kernel.parameters]
        values = [
            packed(kind, value, name, current.execution) for kind, value, name in _flat(self.source.signature, bound)
        ]
        # Triton's own scratch stands last: a null pointer each
        values += [np.uint64(0)] * (len(sizes) - len(values))
        as_bytes = [np.frombuffer(v.tobytes(), np.uint8) for v in values]
        if self.metadata.global_scratch_size or any(len(b) < n for b, n in zip(as_bytes, sizes, strict=True)):
            raise NotImplementedError(f"no execution on a CPU of {self.source.name}: it needs a scratch of Triton's")
        given = {name: b[:n] for name, b, n in zip(parameters, as_bytes, sizes, strict=True)}
        if enter is not None:
            enter(args[3])
        threads = 32 * self.metadata.num_warps
        try:
            current.execution.execute(program, (x, y, z), (threads, 1, 1), self.metadata.shared, given, True)
        finally:
            current.execution.device.forget()
        if leave is not None:
            leave(args[3])


def _flat(signature: dict[str, Any], values: tuple[Any, ...]) -> Iterator[tuple[str, Any, str]]:
    """(type, value, name) of every parameter that the kernel has at run time; a tuple's elements one by one."""

    def parts(kind: Any, value: Any, name: str) -> Iterator[tuple[str, Any, str]]:
        if isinstance(kind, tuple):
            names = getattr(value, "_fields", range(len(value)))
            for k, v, n in zip(kind, value, names, strict=True):
                yield from parts(k, v, f"{name}.{n}")
        elif kind != "constexpr":
            yield kind, value, name

    for (name, kind), value in zip(signature.items(), values, strict=True):
        yield from parts(kind, value, name)


def packed(kind: str, value: Any, name: str, execution: Execution) -> Any:
    """A value as the kernel's parameter, by Triton's name of its type."""
    if kind.startswith("*"):
        return np.uint64(execution.address(value, name) if isinstance(value, Tensor) else int(value))
    if kind in FLOATS:
        return FLOATS[kind](value)
    if kind[:1] in ("i", "u") and kind[1:].isdigit():
        return np.uint64(int(value) & (1 << 64) - 1)
    raise NotImplementedError(f"no execution on a CPU of a kernel with a parameter of type {kind}: {name}")


class PtxDriver(DriverBase):
    """A GPU of one architecture whose kernels ``execution`` runs."""

    launcher_cls = _Launcher

    def __init__(self, capability: int, execution: Execution) -> None:
        self.target, self.execution, self.utils = GPUTarget("cuda", capability, 32), execution, _Utils()

    @classmethod
    def is_active(cls) -> bool:
        return False  # Triton must not choose it by itself

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("a kernel that a CPU executes has no launcher in C++")

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        """The key of Triton's caches, which no GPU's may equal."""
        return f"ptx sm_{self.target.arch}"

    def get_current_stream(self, device: Any) -> int:
        return 0

    def set_current_device(self, device: Any) -> None: ...

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Runs every configuration once, so that each is checked; all take as long, so that the first is chosen."""

        def benchmark(call: Callable[[], Any], quantiles: Any = (), **_: Any) -> list[float]:
            call()
            return [1.0] * max(1, len(quantiles or ()))

        return benchmark


@contextmanager
def driven(capability: int, execution: Execution) -> Iterator[None]:
    """Inside the block Triton's launches go to ``execution``."""
    state = vars(driver)
    before = state.get("_active", state.get("active"))
    driver.set_active(PtxDriver(capability, execution))
    try:
        yield
    finally:
        driver.set_active(before)
