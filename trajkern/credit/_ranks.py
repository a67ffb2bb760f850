"""Rows of all ranks for statistics, and back to the rank's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trajkern.ops._agreement import agreed


@dataclass(frozen=True, eq=False)
class Ranks:
    """How many rollouts, trees and spans of each name every rank has, so that gathering them asks nobody again."""

    group: Any = None
    counts: dict[str, list[int]] | None = None
    rank: int = 0
    split_groups: bool = False  # whether a group is on several ranks

    @classmethod
    def of(cls, group: Any, counts: dict[str, int], group_ids: Tensor, dtypes: dict[str, str]) -> Ranks:
        """Exchanges the counts, which waits for all ranks, and what must be alike on all of them."""
        if group is None:
            return cls()
        agreed("credit.Rollouts", group, "process_group", {}, device=group_ids.device)
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, (counts, dtypes, group_ids.unique().tolist()), group=group)
        for rank, theirs in enumerate(every):
            for what, mine, others in (("spans", counts, theirs[0]), ("rewards", dtypes, theirs[1])):
                if mine.keys() != others.keys():
                    differ = sorted(mine.keys() ^ others.keys())
                    raise ValueError(f"{what} must have the same names on every rank; rank {rank} differs in {differ}")
            if theirs[1] != dtypes:
                raise ValueError(
                    f"rewards must have the same dtypes on every rank; got {dtypes}, rank {rank} {theirs[1]}"
                )
        groups = [number for theirs in every for number in theirs[2]]
        columns = {name: [theirs[0][name] for theirs in every] for name in counts}
        return cls(group, columns, dist.get_rank(group), len(groups) != len(set(groups)))

    def gather(self, x: Tensor, of: str = "rollouts") -> Tensor:
        """The rows of all ranks, one rank's after another's."""
        if self.counts is None:
            return x
        sizes = self.counts[of]
        padded = torch.nn.functional.pad(x.byte() if x.dtype == torch.bool else x, (0, max(sizes) - x.shape[0]))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(x.dtype)

    def gather_packed(self, x: Tensor, lengths: Tensor) -> Tensor:  # [P], [N of all ranks]
        """The entries of all ranks' rollouts, ``lengths`` of each; reads how many there are."""
        if self.counts is None:
            return x
        sizes = [int(part.sum()) for part in lengths.split(self.counts["rollouts"])]
        return Ranks(self.group, {"entries": sizes}, self.rank).gather(x, "entries")

    def own(self, x: Tensor, of: str = "rollouts") -> Tensor:
        """This rank's rows of gathered ones."""
        if self.counts is None:
            return x
        begin = self.begin(of)
        return x[begin : begin + self.counts[of][self.rank]]

    def over_all(self, statistic: Callable[..., Tensor], *rows: Tensor, of: str = "rollouts") -> Tensor:
        """What a statistic of all ranks' rows gives this rank's."""
        return self.own(statistic(*(self.gather(x, of) for x in rows)), of)

    def begin(self, of: str) -> int:
        """How many the ranks before this one have."""
        return 0 if self.counts is None else sum(self.counts[of][: self.rank])
