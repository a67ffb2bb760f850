"""What the machine can do at most, measured in the same process as the ops, and what machine it is."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from typing import Any

import numpy
import torch

import trajkern as tk
from trajkern._bench.timing import Clock, Summary, race
from trajkern.cli import cpu_name

COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
GEMM = {"cpu": (1024, torch.float32), "cuda": (8192, torch.bfloat16)}


def measure(device: str, clock: Clock, seconds: float) -> dict[str, Any]:
    """Copy bandwidth (bytes read plus bytes written), matrix product rate on random data, the least of a launch, and
    what the clock reads of a call that does nothing."""
    source = torch.ones(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    n, dtype = GEMM[device]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    one = torch.ones(1, device=device)
    calls = {
        "copy": lambda: target.copy_(source),
        "gemm": lambda: a @ b,
        "launch": lambda: one.add_(1),
        "empty": lambda: None,
    }
    samples = race(calls, clock, seconds=seconds, rounds=(5, 50))
    copy, gemm, launch, empty = (Summary.of(samples[name]).median for name in calls)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / copy,
        f"gemm_{n}_{str(dtype)[6:]}_flop_per_second": 2 * n**3 / gemm,
        "launch_seconds": launch,
        "empty_call_seconds": empty,
    }


def best(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The highest rates and the shortest times: a machine that was slow for a while could do more."""
    return {k: (max if k.endswith("_per_second") else min)(x, after[k]) for k, x in before.items()}


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "load_average_before": os.getloadavg()[0],
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "gpu_memory_bytes": gpu.total_memory}
    return facts


def versions() -> dict[str, str | None]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "trajkern": tk.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": triton,
        "numpy": numpy.__version__,
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
