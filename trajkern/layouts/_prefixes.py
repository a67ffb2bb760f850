"""Where a tree's nodes come from: the shared prefixes of a batch, or ids that tokens bear."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._checks import check_choice, check_number, check_shape, check_tensor, check_valued, resolved
from trajkern._dtypes import INTEGERS
from trajkern.layouts import _plain
from trajkern.layouts.batch import PackedBatch, check_batch

_PER_TOKEN = ("old_logprobs", "ref_logprobs", "sampler_logprobs")


def shared_prefixes(
    batch: PackedBatch, on_mismatch: str, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [M], [M], [roots], [T]
    """The parents, lengths, group ids and source of :meth:`trajkern.Tree.from_trajectories`, on the host."""
    on_mismatch = check_choice("on_mismatch", on_mismatch, ("raise", "split"))
    tolerance = check_number("tolerance", tolerance, low=0)
    check_batch(batch)
    tokens, cu_seqlens = (resolved(x).cpu().long().contiguous() for x in (batch.tokens, batch.bounds))
    distinct, group = torch.unique(batch.group_ids.cpu(), return_inverse=True)
    _check_sizes(batch, int(cu_seqlens[-1]))
    mask = batch.loss_mask.cpu().contiguous()
    present = {name: x for name in _PER_TOKEN if (x := getattr(batch, name)) is not None}
    logprobs = {name: resolved(x).cpu().double().contiguous() for name, x in present.items()}
    find = _native_prefixes if _ext.CPU_BUILT else _plain_prefixes
    rest = list(logprobs.values()), tolerance, on_mismatch == "split"
    try:
        parent, lengths, source, root_groups = find(tokens, mask, cu_seqlens, group, distinct.shape[0], *rest)
    except _plain.Parted as parted:
        field, *places = parted.found
        _refuse(list(logprobs.items())[field], places, cu_seqlens, tolerance)
    return parent, lengths, distinct[root_groups], source


def _native_prefixes(
    tokens: Tensor, mask: Tensor, cu_seqlens: Tensor, group: Tensor, groups: int, logprobs: list[Tensor], *rest: Any
) -> Iterator[Tensor]:
    mismatch, *arrays = _ext.cpu().tree_prefixes(
        *(x.data_ptr() for x in (tokens, mask, cu_seqlens, group)),
        group.shape[0],
        groups,
        [x.data_ptr() for x in logprobs],
        *rest,
    )
    if mismatch is not None:
        raise _plain.Parted(*mismatch)
    return (
        torch.frombuffer(x, dtype=torch.int64) if len(x) else torch.empty(0, dtype=torch.int64, device="cpu")
        for x in arrays
    )


def _plain_prefixes(
    tokens: Tensor, mask: Tensor, cu_seqlens: Tensor, group: Tensor, groups: int, logprobs: list[Tensor], *rest: Any
) -> Iterator[Tensor]:
    tree = _plain.PrefixTree(tokens, mask, group, groups, logprobs, *rest)
    for begin, end in pairwise(cu_seqlens.tolist()):
        tree.insert(begin, end)
    return iter(tree.numbered())


def _check_sizes(batch: PackedBatch, tokens: int) -> None:
    """That no field was given other data since the batch was made: the search below takes pointers."""
    for name in ("tokens", "loss_mask", *_PER_TOKEN):
        if (x := getattr(batch, name)) is not None:
            check_tensor(name, x)
            check_shape(name, x, (tokens,), "one a token, as when the batch was made")
    check_tensor("group_ids", batch.group_ids)
    check_shape("group_ids", batch.group_ids, (batch.num_trajectories,), "one id a trajectory, as then")


def _refuse(field: tuple[str, Tensor], places: list[int], cu_seqlens: Tensor, tolerance: float) -> NoReturn:
    name, x = field
    at = torch.searchsorted(cu_seqlens, torch.tensor(places, device="cpu"), right=True) - 1
    first, second = at.tolist()
    values = x[places].tolist()
    raise ValueError(
        f"{name} must agree to {tolerance:g} along the prefix that trajectories {first} and {second} share; at its "
        f"token {places[1] - int(cu_seqlens[second])} they are {values[0]:g} and {values[1]:g} "
        "(on_mismatch='split' lets the trajectories part there)"
    )


def segments(segment_ids: Tensor, parent_ids: Tensor) -> tuple[Tensor, Tensor]:  # [T], [T] -> [M], [M]
    """The parents and lengths of :meth:`trajkern.Tree.from_segments`, on the host."""
    check_tensor("segment_ids", segment_ids, dtypes=INTEGERS, ndim=1)
    check_valued("segment_ids", segment_ids)
    check_tensor("parent_ids", parent_ids, dtypes=INTEGERS, device=segment_ids.device)
    check_shape("parent_ids", parent_ids, tuple(segment_ids.shape), "one id a token")
    own, above = (resolved(x).cpu().long() for x in (segment_ids, parent_ids))
    first = torch.ones_like(own, dtype=torch.bool)
    first[1:] = own[1:] != own[:-1]
    begin = first.nonzero().squeeze(1)
    ids, up = own[begin], above[begin]
    changed = (above != up[first.cumsum(0) - 1]).nonzero()
    if changed.numel():
        at = int(changed[0, 0])
        raise ValueError(f"parent_ids must be one id along a segment; that of segment {int(own[at])} changes at {at}")
    known, number = ids.sort(stable=True)
    again = (known[1:] == known[:-1]).nonzero()
    if again.numel():
        node = int(number[int(again[0, 0]) + 1])
        raise ValueError(
            f"segment_ids must mark one run of tokens each; id {int(ids[node])} begins again at token "
            f"{int(begin[node])}"
        )
    place = torch.searchsorted(known, up).clamp_max(max(len(known) - 1, 0))
    _refuse_parent(known[place] != up, up, begin, "an id that some token has")
    parent = torch.where(up == ids, -1, number[place])
    _refuse_parent(parent > torch.arange(len(parent), device="cpu"), up, begin, "a segment that stands before")
    return parent, torch.diff(begin, append=torch.tensor([len(own)], device="cpu"))


def _refuse_parent(bad: Tensor, up: Tensor, begin: Tensor, legal: str) -> None:
    if bool(bad.any()):
        node = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"parent_ids must name {legal}, or the token's own; token {int(begin[node])}'s is {int(up[node])}"
        )
