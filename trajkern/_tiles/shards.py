"""A vocabulary whose rows are spread over the ranks of a process group: what travels is O(rows), never logits."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Shard(NamedTuple):
    """This rank's tokens of the vocabulary, from ``first`` on, and the group that holds the others, if any do."""

    first: int
    vocabulary: int
    widest: int  # shard of the group
    group: dist.ProcessGroup | None

    def sum(self, x: Tensor) -> Tensor:
        """``x`` added up over the ranks, in its own memory."""
        if self.group is not None:
            x = x.contiguous()
            dist.all_reduce(x, group=self.group)
        return x

    def combine(
        self,
        state: Tensor,  # [R, 4]
        scale: Tensor,  # [R]
        picked: Tensor,  # [pairs]
        total: Tensor | None,  # [R]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The whole vocabulary's statistics from each rank's: the maxima, then the sums measured from the largest."""
        if self.group is None:
            return state, picked, total
        ranks = dist.get_world_size(self.group)
        maxima = [torch.empty_like(scale) for _ in range(ranks)]
        dist.all_gather(maxima, state[:, 0].contiguous(), group=self.group)
        largest, owner = torch.stack(maxima).max(0)
        top, rest, eu, ee = state.unbind(1)
        u = torch.where(top == -math.inf, -math.inf, (top - largest) * scale)
        e = u.exp()
        moment = torch.where(e == 0, 0, e * (eu + u * (rest + 1)))
        others = torch.stack((e * (rest + 1), moment, e * e * (ee + 1)))
        mine = owner == dist.get_rank(self.group)
        sums = torch.where(mine, state[:, 1:].t(), others)
        packed = torch.cat([sums.flatten(), picked, *(() if total is None else (total,))])
        dist.all_reduce(packed, group=self.group)
        sums, picked, totals = packed.split([sums.numel(), picked.numel(), 0 if total is None else total.numel()])
        state = torch.cat((largest[:, None], sums.view(3, -1).t()), 1)
        return state, picked, None if total is None else totals


def shard(group: str, weight: Tensor) -> Shard:  # [V, H]
    size, width = weight.shape
    if not group:
        return Shard(0, size, size, None)
    ranks = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    return Shard(*_layout(ranks, size, width, weight.device), ranks)


def _layout(ranks: dist.ProcessGroup, size: int, width: int, device: torch.device) -> tuple[int, int, int]:
    """(first token, vocabulary, widest shard) of this rank; every rank checks every rank's shard.

    Asked in every call, as no rank could tell alone that another one's shard has changed.
    """
    shapes = [torch.empty(2, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(ranks))]
    dist.all_gather(shapes, torch.tensor([size, width], device=device), group=ranks)
    return laid([x.tolist() for x in shapes], dist.get_rank(ranks))


def laid(shapes: list[list[int]], rank: int) -> tuple[int, int, int]:
    """(first token, vocabulary, widest shard) of a rank whose group has weights of these shapes."""
    sizes, widths = zip(*shapes, strict=True)
    if len(set(widths)) > 1:
        raise ValueError(f"weight must have the same H on every rank of process_group; got {list(widths)}")
    if 0 in sizes:
        raise ValueError(f"weight must hold at least one row on every rank of process_group; got {list(sizes)}")
    return sum(sizes[:rank]), sum(sizes), max(sizes)
