"""What the ranks of a group must call alike, which they tell one another before anything else travels.

Ranks that differ would add up numbers of different computations, wait for one another for ever, or be ended by gloo,
which aborts a process where sizes differ. So every function over a group begins with the same exchange, as many
integers whatever it is, and where something differs all ranks raise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trajkern._checks import describe, readable, resolved
from trajkern.losses.config import PolicyLoss

WIDTH = 48  # integers that a rank tells: its own, and a digest of the function and of each argument


def agreed(
    function: str,
    ranks: dist.ProcessGroup,
    group: str,
    shared: Mapping[str, Any],
    own: Sequence[int] = (),
    *,
    device: torch.device,
) -> list[list[int]]:
    """Raises on every rank where the function or what all must share differs; else what each rank tells of its own.

    Values of tensors are compared where reading them costs nothing, of others their shapes.

    Args:
        function: whose arguments these are.
        group: under which name it was given ``ranks``.
        shared: the same names on every rank that calls the function.
        own: as many numbers on every rank that calls it.
        device: by way of which the numbers travel where the group has no way from host to host, which waits for it.
    """
    digests = [_digest(function), *map(_digest, shared.values())]
    mine = torch.tensor([*digests, *own, *[0] * (WIDTH - len(digests) - len(own))], device="cpu")
    mine = mine if has_host_way(ranks) else mine.to(device)
    of_ranks = [mine.clone() for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(of_ranks, mine, group=ranks)
    told = torch.stack(of_ranks).tolist()
    here = dist.get_rank(ranks)
    for at, name in enumerate(("", *shared)):
        others = [rank for rank, x in enumerate(told) if x[at] != told[here][at]]
        if others and not name:
            raise ValueError(
                f"{group} must be given to the same function on every rank; here it is {function}, "
                f"on rank {others[0]} another"
            )
        if others:
            raise ValueError(
                f"{name} must be the same on every rank of {group}; here it is {describe(shared[name])}, "
                f"on rank {others[0]} another"
            )
    return [x[len(digests) : len(digests) + len(own)] for x in told]


def has_host_way(ranks: dist.ProcessGroup) -> bool:
    """Whether numbers go from host to host, and no GPU is waited for."""
    return "cpu:" in dist.get_backend_config(ranks)


def _digest(value: Any) -> int:
    """64 bits of what is alike on two ranks where they are given the same."""
    return int.from_bytes(hashlib.blake2b(_words(value), digest_size=8).digest(), "little", signed=True)


def _words(value: Any) -> bytes:
    if isinstance(value, Tensor):
        return repr(tuple(value.shape)).encode() + (_bytes(value.detach()) if readable(value) else b"")
    if isinstance(value, PolicyLoss):
        return repr((value.kernel_options, value.kernel_params)).encode()
    if isinstance(value, (tuple, list)):
        return b"(" + b",".join(map(_words, value)) + b")"
    if isinstance(value, (bool, int, float)):
        return repr(float(value) + 0.0).encode()  # of -0.0 as well
    plain = value is None or isinstance(value, (str, torch.dtype))
    return repr(value).encode() if plain else type(value).__name__.encode()


def _bytes(x: Tensor) -> bytes:
    """Of the values whatever their dtype; -0.0 and every NaN count as one."""
    wide = resolved(x).to(torch.float64 if x.is_floating_point() else torch.int64)
    if wide.is_floating_point():
        wide = (wide + 0.0).masked_fill(wide.isnan(), torch.nan)
    return wide.contiguous().numpy().tobytes()
