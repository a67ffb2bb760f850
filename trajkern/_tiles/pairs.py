"""Which rows of the head are computed, and which targets each of them has."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trajkern._tiles.arguments import Head


class Pairs(NamedTuple):
    """The rows to compute, one a slot, and their (row, target) pairs in the order of slots and targets.

    Slots at the end may be idle; where nobody may ask how many pairs are unmasked, pairs may be without a slot.
    """

    row: Tensor  # [U] of the hidden states
    key: Tensor  # [U] what ``norm`` is kept by: the row, or the pair where each has its support; the end for idle slots
    idle: Tensor | None  # [U] bool; None: none is
    pair: Tensor  # [P'] its index in the arguments
    slot: Tensor  # [P']
    offsets: Tensor  # [U+1] first pair of each slot
    distinct_rows: bool  # whether no two slots have one row


def pairs_of(
    head: Head,
    vocabulary: int,
    keep: Tensor | None,  # [P]
    exact: bool,
    multiple: int = 1,
) -> Pairs:
    """Pairs that share a row share its slot, unless each was sampled from a support of its own.

    ``exact``: count slots and pairs, which waits for a GPU. ``multiple``: of slots, the last ones idle.
    """
    device, count, keys = head.hidden.device, head.targets.shape[0], head.keys
    is_by_pair = head.rows is None or head.support_ids is not None
    if is_by_pair and exact:
        return _one_a_slot(head, keep, multiple)
    number = torch.arange(count, device=device) if is_by_pair else head.rows
    assert number is not None
    if keep is None:
        keep = torch.ones(count, dtype=torch.bool, device=device)
    if not exact:
        keep = keep & in_range(head, vocabulary)
    used = torch.zeros(keys + 1, dtype=torch.bool, device=device)
    used.index_fill_(0, torch.where(keep, number, keys), True)
    used = used[:keys]
    slot_of_key = used.cumsum(0) - 1
    slots = int(used.sum()) if exact else min(keys, count)
    has_idle = not exact or slots % multiple > 0
    slots = -(-slots // multiple) * multiple
    key = torch.full((slots + 1,), keys, device=device)
    key = key.scatter_(0, torch.where(used, slot_of_key, slots), torch.arange(keys, device=device))[:slots]
    slot = torch.where(keep, slot_of_key[number.clamp(0, keys - 1)], slots) if keys else number
    index = (slot * vocabulary + head.targets.clamp(0, vocabulary - 1)).argsort(stable=True)
    if exact:
        index = index[: int(keep.sum())]
    slot = slot[index]
    offsets = torch.searchsorted(slot, torch.arange(slots + 1, device=device))
    return Pairs(_rows_of(head, key), key, key == keys if has_idle else None, index, slot, offsets, _is_distinct(head))


def _one_a_slot(head: Head, keep: Tensor | None, multiple: int) -> Pairs:
    """Where no two pairs share a slot: their own order."""
    count, device = head.targets.shape[0], head.targets.device
    index = torch.arange(count, device=device) if keep is None else keep.nonzero()[:, 0]
    used = index.shape[0]
    padding = -used % multiple
    key = torch.cat((index, index.new_full((padding,), count))) if padding else index
    offsets = torch.arange(used + padding + 1, device=device)
    slot = offsets[:used]
    if padding:
        offsets = offsets.clamp_max(used)
    return Pairs(_rows_of(head, key), key, key == count if padding else None, index, slot, offsets, _is_distinct(head))


def _rows_of(head: Head, key: Tensor) -> Tensor:
    """The row of each slot's key, some row for the idle."""
    row = key.clamp_max(max(head.keys - 1, 0))
    if head.rows is None or head.support_ids is None:
        return row
    return head.rows[row].clamp(0, head.hidden.shape[0] - 1)


def _is_distinct(head: Head) -> bool:
    return head.rows is None or head.support_ids is None


def repeated(x: Tensor, times: int) -> Tensor:  # [P] -> [P times]
    """Each element so many times, one after the other; torch's repeat_interleave waits for a GPU to count them."""
    return x[:, None].expand(-1, times).reshape(-1)


def in_range(head: Head, vocabulary: int) -> Tensor:
    """Pairs whose row and target exist."""
    valid = (head.targets >= 0) & (head.targets < vocabulary)
    return valid if head.rows is None else valid & (head.rows >= 0) & (head.rows < head.hidden.shape[0])
