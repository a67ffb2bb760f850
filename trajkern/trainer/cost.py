"""What a piece of work costs in time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

REPEATS = 5


def measure(work: Callable[[], None]) -> str:
    """The median time of ``work`` and, where the system tells (Linux), how far it raises the process's memory."""
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    text = f"{1e3 * statistics.median(times):.1f} ms"
    if (extra := _extra_memory(work)) is not None:
        text += f", {extra / 2**20:.0f} MiB at its peak"
    return text


def _extra_memory(work: Callable[[], None]) -> int | None:
    """Bytes by which the resident set's high-water mark exceeds what was resident before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from here
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")
