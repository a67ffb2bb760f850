"""The most memory a call holds beyond what is there before it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGE = 32 << 20  # glibc maps larger blocks anew in any case


def hold() -> None:
    """Have the C library keep freed blocks that are not large (glibc only).

    It would give some back to the system, and pay for their pages again in the next call, by how the blocks happen to
    lie: the same call took 2 ms in one process and 15 in another.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(MMAP_THRESHOLD, LARGE)


def give_back() -> None:
    """What is free now, however it is kept."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """On a GPU what torch allocates; on the CPU the resident memory, whoever allocates it (Linux only)."""
    give_back()  # what is kept now, or given back during the call, would hide what the call takes
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    (PROCESS / "clear_refs").write_text("5")  # the high-water mark starts again from now
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.M)
    if found is None:
        raise OSError(f"{PROCESS / 'status'} has no {name}")
    return 1024 * int(found[1])
