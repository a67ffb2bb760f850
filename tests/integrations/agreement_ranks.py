"""Two ranks of gloo whose models change after they were measured, on both or on one alone; written for the test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.wrapped_ranks import RANKS, fsdp1, packed, sharded, tiny
from trajkern.integrations import _agreement
from trajkern.integrations.transformers import log_probs


def seen(layer: Any, inputs: Any, output: Any) -> None:
    """A hook that only looks."""


def copied(layer: Any, inputs: Any) -> Any:
    """A hook before the head, to which the backbone's states come as a copy."""
    return (inputs[0].clone(),)


def attempt(model: Any, rank: int) -> Any:
    """Log-probs, or what they were refused with."""
    try:
        return log_probs(model, packed(rank)).detach()
    except ValueError as error:
        return str(error)


def by_both(model: Any, rank: int) -> list[Any]:
    model.lm_head.register_forward_hook(seen)
    return [attempt(model, rank)]


def by_one(model: Any, rank: int) -> list[Any]:
    """The other waits in the model's forward meanwhile, for the call that this rank makes once the hook is gone."""
    found = []
    if rank == 0:
        handle = model.lm_head.register_forward_hook(seen)
        found = [attempt(model, rank), attempt(model, rank)]
        handle.remove()
    return [*found, attempt(model, rank), *by_both(model, rank)]


def by_both_unlike(model: Any, rank: int) -> list[Any]:
    head = model.lm_head
    handle = head.register_forward_pre_hook(copied) if rank == 0 else head.register_forward_hook(seen)
    found = attempt(model, rank)
    handle.remove()
    return [found, attempt(model, rank)]


def by_one_of_replicas(model: Any, rank: int) -> list[Any]:
    if rank == 0:
        model.module.lm_head.register_forward_hook(seen)
    return [attempt(model, rank), attempt(model, rank)]


CASES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, int], list[Any]]]] = {
    "both": (sharded, by_both),
    "one": (sharded, by_one),
    "one, resharded": (lambda m: sharded(m, reshard_after_forward=True), by_one),
    "one, fsdp1": (fsdp1, by_one),
    "unlike": (sharded, by_both_unlike),
    "replicas": (DistributedDataParallel, by_one_of_replicas),
}


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    _agreement.WAIT, found = 2.0, {}
    for name, (wrap, change) in CASES.items():
        model = wrap(tiny())
        found[name] = [attempt(model, rank), *change(model, rank)]
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    mp.start_processes(main, (sys.argv[1],), nprocs=RANKS, start_method="fork")
