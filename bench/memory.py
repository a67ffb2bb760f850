"""The most memory a call holds beyond what is there before it."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """On a GPU what torch allocates; on the CPU the resident memory, whoever allocates it (Linux only)."""
    gc.collect()  # what is given back during the call would hide what the call takes
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
