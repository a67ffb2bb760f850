"""That the ranks which share a model's parameters measure it together, as its forward waits for all of them.

What is asked goes through torch.distributed's store: no collective, whose count a rank that asks alone would upset.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from trajkern.integrations._wrapped import is_fsdp1

T = TypeVar("T")
WAIT = 300.0  # seconds: less than the backends' own limits, whose errors name a collective and no model
_PAUSE = 0.02


def together(model: Any, name: str, what: str, function: Callable[[], T], outcome: Callable[[T], Any]) -> T:
    """``function()``, which runs ``model``, once every rank that holds a shard of it has come to do the same.

    Raises:
        ValueError: another rank did not come, came for something else, or found another ``outcome``.
    """
    ranks = sharing(model)
    if len(ranks) < 2:
        return function()
    _compare(ranks, name, f"to measure {what}")
    try:
        found = function()
    except Exception as error:
        _Meeting(ranks).say(f"{type(error).__name__}: {error}")
        raise
    _compare(ranks, name, f"found {outcome(found)}")
    return found


def sharing(model: Any) -> list[int]:
    """The ranks without which a forward of ``model`` stands still: those that hold shards of its parameters now."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    ranks: set[int] = set()
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    for x in model.parameters():
        if isinstance(x, sharded):
            ranks.update(x.device_mesh.mesh.flatten().tolist())
        elif hasattr(x, "ds_id"):  # DeepSpeed's
            ranks.update(range(dist.get_world_size()))
    for module in filter(is_fsdp1, model.modules()):
        ranks.update(dist.get_process_group_ranks(module.process_group))
    return sorted(ranks)


class _Meeting:
    """One of the exchanges of these ranks, each of a sentence a rank; none begins before the last has ended."""

    def __init__(self, ranks: list[int]) -> None:
        self.store: Any = dist.distributed_c10d._get_default_store()
        self.rank, self.ranks = dist.get_rank(), ranks
        of = f"trajkern/{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}"
        self.ended = f"{of}/ended/{self.rank}"  # counted in the store, as it is the store that may be another one
        turn = self.store.add(self.ended, 0)
        self.keys = {rank: f"{of}/{turn}/{rank}" for rank in ranks}

    def say(self, sentence: str) -> None:
        self.store.set(self.keys[self.rank], sentence)
        self.store.add(self.ended, 1)

    def hear(self, sentence: str) -> dict[int, str]:
        """What each rank said; where some did not come in time, the others alone, and nothing has been said."""
        self.store.set(self.keys[self.rank], sentence)
        end = time.monotonic() + WAIT
        while missing := [rank for rank in self.ranks if not self.store.check([self.keys[rank]])]:
            if time.monotonic() > end:
                self.store.delete_key(self.keys[self.rank])
                return dict.fromkeys((rank for rank in self.ranks if rank not in missing), sentence)
            time.sleep(_PAUSE)
        self.store.add(self.ended, 1)
        return {rank: self.store.get(key).decode() for rank, key in self.keys.items()}


def _compare(ranks: list[int], name: str, sentence: str) -> None:
    said = _Meeting(ranks).hear(sentence)
    if missing := [rank for rank in ranks if rank not in said]:
        raise ValueError(
            f"model must be changed on all the ranks {ranks} that share it, or on none: on rank {dist.get_rank()} the "
            f"hooks, adapters, attention, dtype or autocast of {name} are others than when it was measured, and "
            f"{missing} did not come to measure it again within {WAIT:g} s"
        )
    for rank, other in said.items():
        if other != sentence:
            raise ValueError(
                f"model must be the same on all the ranks {ranks} that share it; of {name} rank {dist.get_rank()} "
                f"came {sentence}, rank {rank} {other}".replace("came found", "found")
            )
