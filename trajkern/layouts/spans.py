"""Spans: the token ranges of a pack that mean something, such as turns, steps or tool calls."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._checks import (
    check_boundaries,
    check_count,
    check_device,
    check_shape,
    check_tensor,
    check_valued,
    checked_field,
    resolved,
    suggesting,
)
from trajkern._dtypes import INTEGERS
from trajkern._values import check_cu_seqlens
from trajkern.layouts import _plain
from trajkern.layouts._given import MOST_TOKENS, Given, check_fields, check_tokens, derived, owned, savable
from trajkern.layouts._selection import selection
from trajkern.layouts.batch import PackedBatch, check_batch

_BLOCK = 1 << 14  # tokens that one thread searches for turns at a time


@suggesting
@dataclass(frozen=True, eq=False, repr=False)
class Spans:
    """S token ranges ``[start, end)`` of a pack of T tokens, ascending and disjoint.

    Args:
        start, end: int64 or int32 ``[S]``, 0 <= start <= end <= T, in tokens of the pack. A span begins at the end of
            the one before it or later. Empty spans are legal: a turn without tokens.
        trajectory: int64 or int32 ``[S]``, at least 0, never decreasing: whose each span is.
        index: int64 or int32 ``[S]``, at least 0: the span's number inside its trajectory, in which it ascends (numbers
            may be left out).
        num_tokens: T, at most 2^31 - 1.
        cu_seqlens: int64 or int32 ``[N+1]``, from 0 to T; not kept. With it, a span that leaves its trajectory is an
            error.

    All tensors are on one device. What ops read of them is copied, so that a later write into one changes nothing; it
    makes the next use a ValueError, where torch counts it. Construction and :meth:`turns` read values on the host,
    which waits for a GPU a few times, once a batch; nothing later does.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    start: Tensor  # [S]
    end: Tensor  # [S]
    trajectory: Tensor  # [S]
    index: Tensor  # [S]
    num_tokens: int
    cu_seqlens: InitVar[Tensor | None] = None  # [N+1]

    def __post_init__(self, cu_seqlens: Tensor | None) -> None:
        check_tensor("start", self.start, dtypes=INTEGERS, ndim=1)
        check_fields(self)
        for name in ("end", "trajectory", "index"):
            check_tensor(name, getattr(self, name), dtypes=INTEGERS, device=self.device)
            check_shape(name, getattr(self, name), tuple(self.start.shape), "one entry a span, like start")
        checked_field(self, check_count, "num_tokens", low=0, high=MOST_TOKENS)
        arrays = torch.stack([x.long() for x in (self.start, self.end, self.trajectory, self.index)]).cpu()
        _check_ranges(arrays, self.num_tokens)
        _check_numbers(arrays)
        if cu_seqlens is not None:
            check_boundaries("cu_seqlens", cu_seqlens, self.device)
            check_cu_seqlens(cu_seqlens, self.num_tokens)
            _check_inside(arrays, cu_seqlens.cpu().long())
        _keep(self, (owned(self.start), owned(self.end)))

    def __len__(self) -> int:
        """S."""
        return self.ranges[0].shape[0]

    def __repr__(self) -> str:
        """Its sizes, in a line."""
        return f"Spans(spans={self.start.shape[0]}, tokens={self.num_tokens}, on {self.device})"

    @property
    def device(self) -> torch.device:
        return self.start.device

    @property
    def lengths(self) -> Tensor:
        """Tokens of each span, ``[S]``."""
        start, end = self.ranges
        return end - start

    @property
    def ranges(self) -> tuple[Tensor, Tensor]:
        """(start, end) as they were given, the layout's own: not to be written into."""
        self._given.check()  # type: ignore[attr-defined]
        return self._ranges  # type: ignore[attr-defined]

    @derived
    def token_span(self) -> Tensor:
        """The span of each token, or -1 outside every span, int64 ``[T]``."""
        edges = torch.stack(self.ranges, 1).long().flatten()
        edges = torch.cat((edges.new_zeros(1), edges, edges.new_full((1,), self.num_tokens)))
        span = torch.full((edges.shape[0] - 1,), -1, device=self.device)  # what lies between spans, and they
        span[1::2] = torch.arange(len(self), device=self.device)
        return torch.repeat_interleave(span, edges.diff(), output_size=self.num_tokens)

    @savable
    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Spans:
        """The same spans on another device, not validated again."""
        check_device("device", device)
        arrays = (self.start, self.end, self.trajectory, self.index)
        moved = _bare(*(x.to(device, non_blocking=non_blocking) for x in arrays), self.num_tokens)
        start, end = (x.to(device, non_blocking=non_blocking) for x in self.ranges)
        return _keep(moved, (start, end))

    @savable
    def taken(self, batch: PackedBatch, index: Any) -> Spans:
        """The spans of ``batch[index]``: of each trajectory that is taken those that it has here, of the same numbers.

        Args:
            batch: the batch whose spans these are.
            index: as of :meth:`trajkern.PackedBatch.__getitem__`.

        Reads values on the host.

        Raises:
            IndexError, TypeError, ValueError: an index that the batch refuses, or another batch than these spans'.
        """
        check_batch(batch)
        if batch.num_tokens != self.num_tokens:
            raise ValueError(f"batch must have the spans' {self.num_tokens} tokens; got {batch!r}")
        chosen = selection(index, batch.bounds)
        each = torch.arange(len(batch), device=self.device)
        rows, cu_seqlens = each[chosen.rows], chosen.cu_seqlens.long()
        owner = self.trajectory.long()
        if owner.numel() and (last := int(owner[-1])) >= len(batch):
            raise ValueError(f"batch must have the spans' trajectories, up to {last}; got {batch!r}")
        begin, end = torch.searchsorted(owner, rows), torch.searchsorted(owner, rows, right=True)
        counts = end - begin
        total = int(counts.sum())
        to = torch.repeat_interleave(torch.arange(rows.shape[0], device=self.device), counts, output_size=total)
        span = torch.arange(total, device=self.device) - (counts.cumsum(0) - counts)[to] + begin[to]
        start, stop = self.ranges
        shift = cu_seqlens[:-1][to] - batch.bounds[:-1].long()[rows[to]]
        start, stop = (x[span].long() + shift for x in (start, stop))
        return Spans(start, stop, to, self.index[span], int(cu_seqlens[-1]), chosen.cu_seqlens)

    @classmethod
    @savable
    def turns(
        cls,
        loss_mask: Tensor,  # [T]
        cu_seqlens: Tensor,  # [N+1]
    ) -> Spans:
        """The turns of the policy: in each trajectory the longest runs of scored tokens, numbered from 0.

        Args:
            loss_mask: bool ``[T]``; True where a token is scored.
            cu_seqlens: int64 or int32 ``[N+1]``, the boundaries of the trajectories; they end a run.

        Found on the host, whatever the device.
        """
        check_tensor("loss_mask", loss_mask, dtypes=(torch.bool,), ndim=1)
        check_valued("loss_mask", loss_mask)
        check_tokens("loss_mask", loss_mask.shape[0])
        check_boundaries("cu_seqlens", cu_seqlens, loss_mask.device)
        check_valued("cu_seqlens", cu_seqlens)
        check_cu_seqlens(cu_seqlens, tokens := loss_mask.shape[0])
        mask, bounds = loss_mask.cpu().contiguous(), resolved(cu_seqlens).cpu().long().contiguous()
        if not _ext.CPU_BUILT:
            return _trusted(*_plain.turns(mask, bounds).to(loss_mask.device), tokens)
        before = torch.zeros(
            -(-tokens // _BLOCK) + 1, dtype=torch.int64, device="cpu"
        )  # turns that begin before each block
        pack = mask.data_ptr(), bounds.data_ptr(), bounds.shape[0] - 1, tokens, _BLOCK, before.data_ptr()
        arrays = torch.empty(4, _ext.cpu().span_count_turns(*pack), dtype=torch.int64, device="cpu")
        _ext.cpu().span_turns(*pack, *(x.data_ptr() for x in arrays))
        return _trusted(*arrays.to(loss_mask.device), tokens)


def _trusted(*values: Any) -> Spans:
    """Spans that are known to be legal."""
    start, end, *_ = values
    return _keep(_bare(*values), (owned(start), owned(end)))


def _keep(spans: Spans, ranges: tuple[Tensor, Tensor]) -> Spans:
    """The spans, which read these ranges."""
    given, own = {"start": spans.start, "end": spans.end}, dict(zip(("ranges[0]", "ranges[1]"), ranges, strict=True))
    object.__setattr__(spans, "_ranges", ranges)
    object.__setattr__(spans, "_given", Given("Spans", given, own))
    return spans


def _bare(*values: Any) -> Spans:
    spans = object.__new__(Spans)
    for field, value in zip(fields(Spans), values, strict=True):
        object.__setattr__(spans, field.name, value)
    return spans


def trajectories(cu_seqlens: Tensor, num_tokens: int) -> Spans:
    """Every trajectory as one span; ``cu_seqlens`` is known to be legal, and nobody writes into it."""
    start, end = cu_seqlens[:-1], cu_seqlens[1:]
    each = torch.arange(start.shape[0], device=start.device)
    return _keep(_bare(start, end, each, torch.zeros_like(start), num_tokens), (start, end))


def _first(bad: Tensor) -> int | None:
    return int(bad.nonzero()[0, 0]) if bool(bad.any()) else None


def _check_ranges(arrays: Tensor, tokens: int) -> None:
    start, end = arrays[:2]
    if (s := _first((start < 0) | (start > end) | (end > tokens))) is not None:
        raise ValueError(f"start and end must be 0 <= start <= end <= {tokens}, the tokens; {_named(arrays, s)}")
    if (s := _first(start[1:] < end[:-1])) is not None:
        raise ValueError(
            f"start must ascend and no span overlap the next; {_named(arrays, s)} and {_named(arrays, s + 1)}"
        )


def _check_numbers(arrays: Tensor) -> None:
    trajectory, index = arrays[2:]
    for name, x in (("trajectory", trajectory), ("index", index)):
        if (s := _first(x < 0)) is not None:
            raise ValueError(f"{name} must be at least 0; span {s}'s is {int(x[s])}")
    if (s := _first(trajectory[1:] < trajectory[:-1])) is not None:
        raise ValueError(f"trajectory must never decrease; it goes from {_step(trajectory, s)} at span {s + 1}")
    if (s := _first((trajectory[1:] == trajectory[:-1]) & (index[1:] <= index[:-1]))) is not None:
        raise ValueError(
            f"index must ascend inside a trajectory; in trajectory {int(trajectory[s])} it goes from "
            f"{_step(index, s)} at span {s + 1}"
        )


def _check_inside(arrays: Tensor, cu_seqlens: Tensor) -> None:
    start, end, trajectory, _ = arrays
    count = cu_seqlens.shape[0] - 1
    if (s := _first(trajectory >= count)) is not None:
        raise ValueError(f"trajectory must lie in [0, {count}); span {s}'s is {int(trajectory[s])}")
    begin, stop = cu_seqlens[trajectory], cu_seqlens[trajectory + 1]
    if (s := _first((start < begin) | (end > stop))) is not None:
        raise ValueError(
            f"start and end must stay inside the span's trajectory; {_named(arrays, s)}, trajectory "
            f"{int(trajectory[s])} is [{int(begin[s])}, {int(stop[s])})"
        )


def _named(arrays: Tensor, span: int) -> str:
    return f"span {span} is [{int(arrays[0, span])}, {int(arrays[1, span])})"


def _step(x: Tensor, at: int) -> str:
    return f"{int(x[at])} to {int(x[at + 1])}"
