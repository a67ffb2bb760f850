"""What functions return on the ranks of a group of processes, which gloo joins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def over_ranks(ranks: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """``work(rank, *args)`` of every rank, by a process each; files go into ``folder``."""
    if sys.platform == "win32":
        pytest.skip("gloo's file store")
    mp.start_processes(_rank, (ranks, work, str(folder), *args), ranks, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, work: Callable[..., Any], folder: str, *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    dist.barrier()  # who is through first would close its connections while others still read
    dist.destroy_process_group()
