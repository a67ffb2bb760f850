"""The packed batch: rollouts of different lengths end to end, without padding.

Trajectory n owns the tokens ``cu_seqlens[n]:cu_seqlens[n+1]``; every per-token field belongs to the token at its
position. Fields are checked against each other once, here, so that no kernel needs to.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._checks import (
    check_boundaries,
    check_cu_seqlens,
    check_finite,
    check_shape,
    check_tensor,
    check_valued,
    describe,
    suggesting,
)
from trajkern._dtypes import INTEGERS
from trajkern.layouts._given import Given, owned

_FLOAT = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PER_TOKEN = ("old_logprobs", "ref_logprobs", "sampler_logprobs")


def check_batch(batch: Any) -> None:
    if not isinstance(batch, PackedBatch):
        raise TypeError(f"batch must be a PackedBatch, got {describe(batch)}")


class HeadInputs(NamedTuple):
    """The scored (row, target) pairs of a batch, in pack order."""

    rows: Tensor  # [P] index of the hidden state that predicts the target: the token before it
    targets: Tensor  # [P] token id to predict
    tokens: Tensor  # [P] position of the target in the pack; ``x[tokens]`` takes a per-token field to the pairs
    cu_seqlens: Tensor  # [N+1] trajectory boundaries counted in pairs


@suggesting
@dataclass(frozen=True, eq=False)
class PackedBatch:
    """A packed batch of N trajectories and T tokens.

    Args:
        tokens: token ids, int64 or int32, ``[T]``.
        cu_seqlens: boundaries, int64 or int32, ``[N+1]``, from 0 to T, never decreasing. Empty trajectories are legal.
        loss_mask: bool ``[T]``; True where a token is scored. A trajectory's first token has nothing before it that
            could predict it, so True there is an error.
        group_ids: int64 or int32 ``[N]``, any values; equal ids share a prompt. ``group_index`` holds them dense.
        rewards: float ``[N]``, finite.
        old_logprobs, ref_logprobs, sampler_logprobs: float ``[T]``, read only where ``loss_mask`` is True (finite
            there); what stands elsewhere does not matter.

    All tensors are on one device. What ops read of ``cu_seqlens`` is copied; a later write into it, ``tokens``,
    ``loss_mask`` or ``group_ids`` makes the next use a ValueError, where torch counts it. Construction reads values on
    the host, which waits for a GPU a few times, once a batch; nothing later does.

    Raises:
        TypeError: a field that is no tensor or has the wrong dtype.
        ValueError: a shape, device or value that contradicts the other fields. The message names the field.
    """

    tokens: Tensor  # [T]
    cu_seqlens: Tensor  # [N+1]
    loss_mask: Tensor  # [T]
    group_ids: Tensor  # [N]
    rewards: Tensor | None = None  # [N]
    old_logprobs: Tensor | None = None  # [T]
    ref_logprobs: Tensor | None = None  # [T]
    sampler_logprobs: Tensor | None = None  # [T]

    def __post_init__(self) -> None:
        check_tensor("tokens", self.tokens, dtypes=INTEGERS, ndim=1)
        check_valued("tokens", self.tokens)
        device, length = self.tokens.device, self.tokens.numel()
        check_boundaries("cu_seqlens", self.cu_seqlens, device)
        check_cu_seqlens(self.cu_seqlens, length)
        count = self.cu_seqlens.numel() - 1
        check_tensor("loss_mask", self.loss_mask, dtypes=(torch.bool,), device=device)
        check_shape("loss_mask", self.loss_mask, (length,), "one flag a token")
        check_tensor("group_ids", self.group_ids, dtypes=INTEGERS, device=device)
        check_shape("group_ids", self.group_ids, (count,), "one id a trajectory")
        if self.rewards is not None:
            check_tensor("rewards", self.rewards, dtypes=_FLOAT, device=device)
            check_shape("rewards", self.rewards, (count,), "one reward a trajectory")
            check_finite("rewards", self.rewards)
        for name in _PER_TOKEN:
            if (x := getattr(self, name)) is not None:
                check_tensor(name, x, dtypes=_FLOAT, device=device)
                check_shape(name, x, (length,), "one value a token")
                check_finite(name, x, where=self.loss_mask)
        self._check_first_tokens()
        dense = torch.unique(self.group_ids, return_inverse=True)
        longest = int(self.cu_seqlens.diff().max()) if count else 0
        object.__setattr__(self, "_derived", (dense[1], dense[0].numel(), longest, self._pairs()))
        _keep(self, owned(self.cu_seqlens))

    def _check_first_tokens(self) -> None:
        starts = self.cu_seqlens[:-1][self.cu_seqlens.diff() > 0].long()
        scored = self.loss_mask[starts].nonzero()
        if scored.numel():
            raise ValueError(
                f"loss_mask must be False on the first token of every trajectory (nothing predicts it); "
                f"it is True at token {int(starts[scored[0, 0]])}"
            )

    def _pairs(self) -> HeadInputs:
        tokens = self.loss_mask.nonzero().squeeze(1)
        counted = torch.zeros(self.num_tokens + 1, dtype=torch.int64, device=tokens.device)
        torch.cumsum(self.loss_mask, 0, out=counted[1:])
        return HeadInputs(tokens - 1, self.tokens[tokens].long(), tokens, counted[self.cu_seqlens.long()])

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens.numel()

    @property
    def num_trajectories(self) -> int:
        """N."""
        return self.bounds.numel() - 1

    @property
    def num_groups(self) -> int:
        """G, the number of distinct group ids."""
        return self._derived[1]  # type: ignore[attr-defined]

    @property
    def group_index(self) -> Tensor:
        """``group_ids`` as dense int64 ids 0..G-1 in ascending order of the original ids, ``[N]``."""
        return self._derived[0]  # type: ignore[attr-defined]

    @property
    def max_length(self) -> int:
        """Tokens of the longest trajectory, 0 without any."""
        return self._derived[2]  # type: ignore[attr-defined]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each trajectory, ``[N]``."""
        return self.bounds.diff()

    @property
    def bounds(self) -> Tensor:
        """``cu_seqlens`` as they were given, the layout's own: not to be written into."""
        self._given.check()  # type: ignore[attr-defined]
        return self._bounds  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def head_inputs(self) -> HeadInputs:
        """The rows and targets that carry loss; a target never belongs to another trajectory than its row."""
        self._given.check()  # type: ignore[attr-defined]
        return self._derived[3]  # type: ignore[attr-defined]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device, not validated again."""
        moved = object.__new__(PackedBatch)
        for field in fields(self):
            x = getattr(self, field.name)
            object.__setattr__(moved, field.name, None if x is None else x.to(device, non_blocking=non_blocking))
        index, groups, longest, pairs = self._derived  # type: ignore[attr-defined]
        pairs = HeadInputs(*(x.to(device, non_blocking=non_blocking) for x in pairs))
        index = index.to(device, non_blocking=non_blocking)
        object.__setattr__(moved, "_derived", (index, groups, longest, pairs))
        return _keep(moved, self.bounds.to(device, non_blocking=non_blocking))

    @classmethod
    @suggesting
    def from_padded(
        cls,
        tokens: Tensor,  # [N, L]
        attention_mask: Tensor,  # [N, L]
        *,
        loss_mask: Tensor,  # [N, L]
        group_ids: Tensor,  # [N]
        rewards: Tensor | None = None,  # [N]
        old_logprobs: Tensor | None = None,  # [N, L]
        ref_logprobs: Tensor | None = None,  # [N, L]
        sampler_logprobs: Tensor | None = None,  # [N, L]
    ) -> PackedBatch:
        """Pack a left- or right-padded batch.

        ``attention_mask`` is positive on real tokens and zero on padding, and real tokens must be contiguous in each
        row; rows may be padded on either side. ``loss_mask`` (any real dtype, positive = scored) must be zero on
        padding. NaN, infinity or a negative number (a mask that is to be added to scores) in either is an error. Reads
        values on the host, as construction does.
        """
        check_tensor("tokens", tokens, dtypes=INTEGERS, ndim=2)
        check_valued("tokens", tokens)
        keep = _real_tokens(attention_mask, tokens)
        scored = _flags("loss_mask", loss_mask, tokens)
        if bool((scored & ~keep).any()):
            row = int((scored & ~keep).any(1).nonzero()[0, 0])
            raise ValueError(f"loss_mask must be zero on padding; row {row} scores a padded position")
        cu_seqlens = torch.zeros(tokens.shape[0] + 1, dtype=torch.int64, device=tokens.device)
        torch.cumsum(keep.sum(1), 0, out=cu_seqlens[1:])
        per_token = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs}
        packed = {k: None if x is None else _same_shape(k, x, tokens)[keep] for k, x in per_token.items()}
        return cls(tokens[keep], cu_seqlens, scored[keep], group_ids, rewards, **packed)

    @suggesting
    def to_padded(self, x: Tensor, *, length: int | None = None, side: str = "right", value: float = 0) -> Tensor:
        """Pad a per-token tensor ``[T, ...]`` to ``[N, length, ...]``, the padding on ``side`` filled with ``value``.

        ``length`` defaults to :attr:`max_length`. The inverse of :meth:`from_padded`, bit for bit.
        """
        check_tensor("x", x, device=self.device)
        if x.ndim == 0 or x.shape[0] != self.num_tokens:
            raise ValueError(f"x must have {self.num_tokens} rows, one a token; got {describe(x)}")
        if side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', got {side!r}")
        length = self.max_length if length is None else length
        if length < self.max_length:
            raise ValueError(f"length must be at least the longest trajectory's {self.max_length}, got {length}")
        out = x.new_full((self.num_trajectories * length, *x.shape[1:]), value)
        out = out.index_copy(0, self.padded_index(length, side), x)
        return out.view(self.num_trajectories, length, *x.shape[1:])

    def padded_index(self, length: int, side: str = "right") -> Tensor:
        """Where each token stands in the flattened rows ``[N * length]`` of :meth:`to_padded`, int64 ``[T]``."""
        lengths = self.lengths.long()
        row = torch.arange(self.num_trajectories, device=self.device) * length
        begin = row if side == "right" else row + length - lengths
        shift = torch.repeat_interleave(begin - self.bounds[:-1], lengths, output_size=self.num_tokens)
        return shift + torch.arange(self.num_tokens, device=self.device)


def _keep(batch: PackedBatch, bounds: Tensor) -> PackedBatch:
    """The batch, which reads these boundaries."""
    given = {name: getattr(batch, name) for name in ("tokens", "cu_seqlens", "loss_mask", "group_ids")}
    object.__setattr__(batch, "_bounds", bounds)
    object.__setattr__(batch, "_given", Given("PackedBatch", given))
    return batch


def _real_tokens(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    keep = _flags("attention_mask", attention_mask, tokens)
    edges = keep[:, :1].sum(1) + (keep[:, 1:] & ~keep[:, :-1]).sum(1)
    if bool((edges > 1).any()):
        row = int((edges > 1).nonzero()[0, 0])
        raise ValueError(f"attention_mask must mark one contiguous stretch in each row; row {row} has a gap")
    return keep


def _flags(name: str, mask: Tensor, tokens: Tensor) -> Tensor:
    _same_shape(name, mask, tokens)
    if mask.is_complex():
        raise TypeError(f"{name} must be of a real dtype; got {describe(mask)}")
    bad = ~torch.isfinite(mask) | (mask < 0)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        value = mask[row, column].item()
        raise ValueError(f"{name} must be 0 or a positive number everywhere; it is {value} at [{row}, {column}]")
    return mask > 0


def _same_shape(name: str, x: Tensor, tokens: Tensor) -> Tensor:
    check_tensor(name, x, device=tokens.device)
    check_shape(name, x, tuple(tokens.shape), "the shape of tokens")
    return x
