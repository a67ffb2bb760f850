"""Group statistics of trajectories that are spread over ranks: a group's moments travel, never its rewards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trajkern._checks import readable
from trajkern._dtypes import accumulator
from trajkern.ops._agreement import agreed


def group_advantages(
    rewards: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    *,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    singleton: str,
    gate: Tensor | None,  # [N]
    weights: Tensor | None,  # [N]
    ranks: dist.ProcessGroup,
) -> Tensor:
    """As :func:`trajkern.group_advantages` over the trajectories of all ranks; this rank's, ``[N]``.

    Measured from the group's largest reward, which all ranks can agree on. float64 inside: the order in which ranks
    are added up then shows in no float32 result.
    """
    w = torch.ones_like(rewards, dtype=torch.float64) if weights is None else weights.double()
    if gate is not None:
        w = torch.where(gate, w, 0)
    counted = w != 0
    r = torch.where(counted, rewards.double(), 0)
    options = {"baseline": baseline, "scale": scale, "ddof": ddof, "eps": eps, "singleton": singleton}
    own = [group_ids.shape[0]]
    told = agreed("group_advantages", ranks, "process_group", options, own, device=rewards.device)
    groups, group = _numbered(group_ids, [size for (size,) in told], ranks)

    def added(*columns: Tensor) -> tuple[Tensor, ...]:
        # unlike index_add, index_put sorts on a GPU, so the order of a sum does not depend on the run
        sums = r.new_zeros(groups, len(columns)).index_put((group,), torch.stack(columns, 1), accumulate=True)
        dist.all_reduce(sums, group=ranks)
        return sums[group].unbind(1)

    origin = r.new_full((groups,), -torch.inf).scatter_reduce(0, group, torch.where(counted, r, -torch.inf), "amax")
    dist.all_reduce(origin, dist.ReduceOp.MAX, group=ranks)
    d = torch.where(counted, r - origin[group], 0)
    total, sum_d = added(w, w * d)
    mean_d = sum_d / total.clamp_min(torch.finfo(torch.float64).tiny)
    alone = total <= 1
    if baseline == "mean":
        out = d - mean_d
    elif baseline == "leave_one_out":
        out = d - (sum_d - d) / torch.where(alone, 1, total - 1)
    else:
        out = r
    if scale == "std":
        (squares,) = added(w * (d - mean_d).square())
        divisor = (squares / torch.where(alone, 1, total - ddof)).clamp_min(0).sqrt() + eps
        out = out / torch.where(divisor == 0, 1, divisor)
    if baseline != "none" or scale != "none":
        raw = r / (1 + eps) if scale == "std" else r
        out = torch.where(alone, raw if singleton == "raw" else 0, out)
    return torch.where(counted, out, 0).to(accumulator(rewards))


def whiten(
    x: Tensor,  # [T]
    *,
    mask: Tensor | None,  # [T]
    shift_mean: bool,
    ddof: int,
    eps: float,
    ranks: dist.ProcessGroup,
) -> Tensor:
    """As :func:`trajkern.whiten` over the values of all ranks; this rank's, ``[T]``. float64 inside, in two passes."""
    if readable(x):  # elsewhere nothing here waits
        options = {"shift_mean": shift_mean, "ddof": ddof, "eps": eps}
        agreed("whiten", ranks, "process_group", options, device=x.device)
    w = torch.ones_like(x, dtype=torch.float64) if mask is None else mask.double()
    wide = torch.where(w != 0, x.double(), 0)

    def added(*sums: Tensor) -> tuple[Tensor, ...]:
        total = torch.stack(sums)
        dist.all_reduce(total, group=ranks)
        return total.unbind()

    count, total = added(w.sum(), wide.sum())
    mean = total / count.clamp_min(1)
    (squares,) = added((w * (wide - mean).square()).sum())
    variance = torch.where(count > ddof, squares / (count - ddof).clamp_min(1), 0)
    out = (wide - mean) / (variance + eps).sqrt()
    return torch.where(w != 0, out if shift_mean else out + mean, 0).to(accumulator(x))


def _numbered(group_ids: Tensor, sizes: list[int], ranks: dist.ProcessGroup) -> tuple[int, Tensor]:
    """A bound of the groups' numbers on all ranks, and the number of each trajectory's group, ``[N]``.

    ``sizes``: how many trajectories each rank has.

    A group's number is its place among the sorted ids of all trajectories: how many groups there are, only a wait could
    tell.
    """
    ids = group_ids.long()
    padded = torch.nn.functional.pad(ids, (0, max(sizes) - ids.shape[0]))
    of_ranks = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(of_ranks, padded, group=ranks)
    every = torch.cat([x[:size] for x, size in zip(of_ranks, sizes, strict=True)]).sort().values
    return every.shape[0], torch.searchsorted(every, ids)
