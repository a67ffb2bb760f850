"""Some trajectories of a pack, as they are asked for, and packs put end to end."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._checks import check_shape, check_tensor, check_valued, describe
from trajkern._dtypes import INTEGERS
from trajkern.layouts._given import check_tokens
from trajkern.layouts._nodes import offsets_of

LEGAL = "an int, a slice, or a list or tensor of ints or of one bool a trajectory"


class Selection(NamedTuple):
    """Trajectories of a pack and their tokens: as slices where both are contiguous, else as numbers."""

    rows: slice | Tensor  # [K]
    tokens: slice | Tensor  # [T']
    cu_seqlens: Tensor  # [K+1]


def selection(index: Any, bounds: Tensor) -> Selection:
    """What ``index`` asks for, of the trajectories between these bounds ``[N+1]``. Reads values on the host."""
    rows = _rows(index, bounds.shape[0] - 1, bounds.device)
    if isinstance(rows, slice):
        own = bounds[rows.start : rows.stop + 1]
        first, last = int(own[0]), int(own[-1])
        return Selection(rows, slice(first, last), own - first)
    begin, lengths = bounds[:-1].long()[rows], bounds.diff().long()[rows]
    cu_seqlens = offsets_of(lengths)
    total = int(cu_seqlens[-1])
    check_tokens("index", total)
    shift = torch.repeat_interleave(begin - cu_seqlens[:-1], lengths, output_size=total)
    tokens = shift + torch.arange(total, device=bounds.device)
    return Selection(rows, tokens, fitting(cu_seqlens, total, bounds.dtype))


def fitting(offsets: Tensor, last: int, dtype: torch.dtype) -> Tensor:
    """Offsets in this dtype, or in int64 where it does not hold the last."""
    return offsets.to(dtype if last <= torch.iinfo(dtype).max else torch.int64)


def _rows(index: Any, count: int, device: torch.device) -> slice | Tensor:
    if isinstance(index, slice):
        try:
            asked = range(count)[index]
        except (TypeError, ValueError) as error:  # of a part that is no int, or a step of 0
            raise type(error)(f"index must be {LEGAL}; got {describe(index)}") from None
        if asked.step == 1:
            return slice(asked.start, max(asked.start, asked.stop))
        return torch.tensor([*asked], dtype=torch.int64, device=device)
    if isinstance(index, (list, range)):
        index = _listed(index)
    elif not isinstance(index, Tensor) and hasattr(index, "__array__"):
        try:
            index = torch.as_tensor(index, device="cpu")
        except TypeError:  # an array of what no tensor holds
            raise TypeError(f"index must be {LEGAL}; got {describe(index)}") from None
    if not isinstance(index, Tensor) or (index.ndim == 0 and index.dtype in INTEGERS):
        return _single(index, count)
    check_tensor("index", index, dtypes=(torch.bool, *INTEGERS), ndim=1)
    check_valued("index", index)
    if index.dtype == torch.bool:
        check_shape("index", index, (count,), "one flag a trajectory")
        return index.to(device).nonzero().squeeze(1)
    numbers = index.to(device).long()
    outside = (numbers < -count) | (numbers >= count)
    if bool(outside.any()):
        raise IndexError(f"index must lie in {_range(count)}; got {int(numbers[outside][0])}")
    return torch.where(numbers < 0, numbers + count, numbers)


def _listed(index: list[Any] | range) -> Tensor:
    flags = [isinstance(x, bool) for x in index]
    if any(flags) and not all(flags):
        raise TypeError(f"index must be {LEGAL}; got both in {describe(index)}")
    if not all(flags) and not all(hasattr(x, "__index__") for x in index):
        raise TypeError(f"index must be {LEGAL}; got {describe(index)}")
    values = [*index] if any(flags) else [operator.index(x) for x in index]
    return torch.tensor(values, dtype=torch.bool if any(flags) else torch.int64, device="cpu")


def _single(index: Any, count: int) -> slice:
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"index must be {LEGAL}; got {describe(index)}")
    number = operator.index(index)
    if not -count <= number < count:
        raise IndexError(f"index must lie in {_range(count)}; got {number}")
    number %= count
    return slice(number, number + 1)


def _range(count: int) -> str:
    return f"[{-count}, {count}), the trajectories" if count else "a batch with trajectories"


def concatenated_bounds(bounds: Sequence[Tensor]) -> Tensor:
    """The bounds of packs put end to end, each ``[N_i + 1]``, in a dtype that holds them all."""
    lengths = torch.cat([x.diff().long() for x in bounds])
    cu_seqlens = offsets_of(lengths)
    dtype = torch.int64 if any(x.dtype == torch.int64 for x in bounds) else torch.int32
    return fitting(cu_seqlens, int(cu_seqlens[-1]), dtype)


GROUPS = ("apart", "shared")


def concatenated_groups(ids: Sequence[Tensor], index: Sequence[Tensor], counts: Sequence[int], how: Any) -> Tensor:
    """The group ids of packs put end to end.

    Args:
        ids: of each pack, as they were given, ``[N_i]``.
        index: the same, dense from 0.
        counts: how many groups each pack has.
        how: "apart", "shared", or None where no two packs have an id in common.
    """
    if how == "apart":
        begin, parts = 0, []
        for dense, count in zip(index, counts, strict=True):
            parts.append(dense + begin)
            begin += count
        return torch.cat(parts)
    if how is None:
        _check_disjoint(ids)
    return torch.cat([*ids])


def _check_disjoint(ids: Sequence[Tensor]) -> None:
    own = [x.unique() for x in ids]
    both, times = torch.cat(own).unique(return_counts=True)
    if bool((times > 1).any()):
        twice = int(both[times > 1][0])
        first, second = [n for n, x in enumerate(own) if bool((x == twice).any())][:2]
        raise ValueError(
            f"groups must be 'apart' or 'shared' where batches have group ids in common: batches {first} and {second} "
            f"both have {twice}. 'apart': each batch's prompts are its own; 'shared': equal ids are one prompt"
        )
