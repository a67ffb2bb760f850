"""The packed batch: rollouts of different lengths end to end, without padding.

Trajectory n owns the tokens ``cu_seqlens[n]:cu_seqlens[n+1]``; every per-token field belongs to the token at its
position. Fields are checked against each other once, here, so that no kernel needs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._checks import (
    check_boundaries,
    check_choice,
    check_count,
    check_device,
    check_shape,
    check_tensor,
    check_valued,
    describe,
    suggesting,
)
from trajkern._dtypes import FLOATS, INTEGERS, LAID_OUT
from trajkern._values import check_cu_seqlens, check_finite
from trajkern.layouts._given import MOST_TOKENS, Given, check_fields, check_tokens, owned, savable
from trajkern.layouts._padding import flags, padding, real_tokens, same_shape
from trajkern.layouts._selection import GROUPS, concatenated_bounds, concatenated_groups, selection

_PER_TOKEN = ("tokens", "loss_mask", "old_logprobs", "ref_logprobs", "sampler_logprobs")
_LOGPROBS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")


def check_batch(batch: Any) -> None:
    if not isinstance(batch, PackedBatch):
        raise TypeError(f"batch must be a PackedBatch, got {describe(batch)}")


class HeadInputs(NamedTuple):
    """The scored (row, target) pairs of a batch, in pack order."""

    rows: Tensor  # [P] index of the hidden state that predicts the target: the token before it
    targets: Tensor  # [P] token id to predict
    tokens: Tensor  # [P] position of the target in the pack; ``x[tokens]`` takes a per-token field to the pairs
    cu_seqlens: Tensor  # [N+1] trajectory boundaries counted in pairs

    def __repr__(self) -> str:
        return f"HeadInputs(pairs={self.targets.shape[0]}, on {self.targets.device})"


@suggesting
@dataclass(frozen=True, eq=False, repr=False)
class PackedBatch:
    """A packed batch of N trajectories and T tokens.

    Args:
        tokens: token ids, int64 or int32, ``[T]``, at most 2^31 - 1.
        cu_seqlens: boundaries, int64 or int32, ``[N+1]``, from 0 to T, never decreasing. Empty trajectories are legal.
        loss_mask: bool ``[T]``; True where a token is scored. A trajectory's first token has nothing before it that
            could predict it, so True there is an error.
        group_ids: int64 or int32 ``[N]``, any values; equal ids share a prompt. ``group_index`` holds them dense.
        rewards: float ``[N]``, finite.
        old_logprobs, ref_logprobs, sampler_logprobs: float ``[T]``, read only where ``loss_mask`` is True (finite
            there); what stands elsewhere does not matter.

    ``len`` is N, and indexing takes trajectories: :meth:`__getitem__`. ``torch.utils.data`` takes it as a data set, and
    pins it.

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
        check_fields(self)
        device, length = self.tokens.device, self.tokens.numel()
        check_tokens("tokens", length)
        check_boundaries("cu_seqlens", self.cu_seqlens, device)
        check_cu_seqlens(self.cu_seqlens, length)
        count = self.cu_seqlens.numel() - 1
        check_tensor("loss_mask", self.loss_mask, dtypes=(torch.bool,), device=device)
        check_shape("loss_mask", self.loss_mask, (length,), "one flag a token")
        check_tensor("group_ids", self.group_ids, dtypes=INTEGERS, device=device)
        check_shape("group_ids", self.group_ids, (count,), "one id a trajectory")
        if self.rewards is not None:
            check_tensor("rewards", self.rewards, dtypes=FLOATS, device=device)
            check_shape("rewards", self.rewards, (count,), "one reward a trajectory")
            check_finite("rewards", self.rewards)
        for name in _LOGPROBS:
            if (x := getattr(self, name)) is not None:
                check_tensor(name, x, dtypes=FLOATS, device=device)
                check_shape(name, x, (length,), "one value a token")
                check_finite(name, x, where=self.loss_mask)
        self._check_first_tokens()
        _derive(self)

    def _check_first_tokens(self) -> None:
        starts = self.cu_seqlens[:-1][self.cu_seqlens.diff() > 0].long()
        if (scored := self.loss_mask[starts].nonzero()).numel():
            raise ValueError(
                f"loss_mask must be False on the first token of every trajectory (nothing predicts it); "
                f"it is True at token {int(starts[scored[0, 0]])}"
            )

    def _pairs(self) -> HeadInputs:
        tokens = self.loss_mask.nonzero().squeeze(1)
        counted = torch.zeros(self.num_tokens + 1, dtype=torch.int64, device=tokens.device)
        torch.cumsum(self.loss_mask, 0, out=counted[1:])
        return HeadInputs(tokens - 1, self.tokens[tokens].long(), tokens, counted[self.cu_seqlens.long()])

    def __len__(self) -> int:
        """N."""
        return self.num_trajectories

    def __repr__(self) -> str:
        """Its sizes and which fields it has, in a line."""
        if "_derived" not in self.__dict__:  # while it is being made
            return f"PackedBatch(tokens={self.tokens!r:.60})"
        groups, scored = self._derived[1], self._derived[3].tokens.shape[0]  # type: ignore[attr-defined]
        given = "".join(f", {name}" for name in ("rewards", *_LOGPROBS) if getattr(self, name) is not None)
        counts = f"trajectories={self._bounds.shape[0] - 1}, tokens={self.num_tokens}, scored={scored}, groups={groups}"  # type: ignore[attr-defined]
        return f"PackedBatch({counts}{given}, on {self.device})"

    def __iter__(self) -> Iterator[PackedBatch]:
        """Its trajectories one by one, each as a batch."""
        return (self[n] for n in range(len(self)))

    @savable
    def __getitem__(self, index: Any) -> PackedBatch:
        """Some of the trajectories, in the order in which they are asked for, as a batch.

        Every field goes with its trajectory, ``group_ids`` as they are: what is left of a group is a group. Fields keep
        their gradients. As in torch, an int or a slice of step 1 gives views, all else copies.

        Args:
            index: an int (a batch of one trajectory); a slice; a list, an array or a tensor ``[K]`` of int64 or int32,
                negative ones from the end, the same one as often as it stands there; or of bools, one a trajectory.

        What belongs to the batch's tokens comes along by :meth:`tokens_of`, spans by :meth:`trajkern.Spans.taken`, the
        tree of the batch, where ``index`` is a mask, by :meth:`trajkern.Tree.pruned`. Reads values on the host.

        Raises:
            IndexError: a trajectory that is not there.
            TypeError, ValueError: an index of another kind; a subclass with fields that this cannot know.
        """
        chosen, of_batch = selection(index, self.bounds), _own_fields(self)
        parts = {name: chosen.tokens if name in _PER_TOKEN else chosen.rows for name in of_batch}
        taken = {name: None if x is None else x[parts[name]] for name, x in of_batch.items()}
        return _trusted(taken | {"cu_seqlens": chosen.cu_seqlens})

    def tokens_of(self, index: Any) -> Tensor:
        """Where the tokens of ``self[index]`` stand in this pack, int64 ``[T']``: ``x[batch.tokens_of(index)]``."""
        tokens = selection(index, self.bounds).tokens
        return torch.arange(self.num_tokens, device=self.device)[tokens] if isinstance(tokens, slice) else tokens

    @classmethod
    @suggesting
    @savable
    def concatenate(cls, batches: Sequence[PackedBatch], *, groups: str | None = None) -> PackedBatch:
        """The batches end to end; fields keep their gradients, and dtypes widen as ``torch.cat``'s do.

        A group is compared with itself, so which trajectories of several batches share a prompt has to be said where
        the ids do not say it:

        Args:
            batches: at least one, on one device, all with the same fields.
            groups: "apart": every batch has prompts of its own, and ids are renumbered, batch after batch from 0;
                "shared": equal ids are one prompt, as of the parts of one batch, and stay; None: ids stay, and no two
                batches may have one in common.

        Reads values on the host.

        Raises:
            TypeError, ValueError: something else than batches, a field that only some of them have, another device,
                or ids in common where ``groups`` is None.
        """
        groups = check_choice("groups", groups, (None, *GROUPS))
        parts = _several(batches)
        check_tokens("batches", sum(x.num_tokens for x in batches))
        joined = {name: torch.cat([x[name] for x in parts]) for name, first in parts[0].items() if first is not None}
        index, counts = [x.group_index for x in batches], [x.num_groups for x in batches]
        joined["group_ids"] = concatenated_groups([x["group_ids"] for x in parts], index, counts, groups)
        return _trusted(joined | {"cu_seqlens": concatenated_bounds([x.bounds for x in batches])})

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
        self._given.check()  # type: ignore[attr-defined]
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
        check_device("device", device)
        return self._moved(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in pinned memory, from which ``to(device, non_blocking=True)`` waits for no copy.

        As ``torch.Tensor.pin_memory``: what is pinned already is not copied, and without an accelerator it raises.
        """
        return self._moved(lambda x: x.pin_memory())

    @savable
    def _moved(self, move: Callable[[Tensor], Tensor]) -> PackedBatch:
        moved = _bare({name: None if x is None else move(x) for name, x in _own_fields(self).items()})
        index, groups, longest, pairs = self._derived  # type: ignore[attr-defined]
        object.__setattr__(moved, "_derived", (move(index), groups, longest, HeadInputs(*map(move, pairs))))
        return _keep(moved, move(self.bounds))

    @classmethod
    @suggesting
    @savable
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
        row; rows may be padded on either side. ``loss_mask`` (positive = scored) must be zero on padding. Both are
        bool, uint8, of signed integers or of floats of 16 to 64 bits; NaN, infinity or a negative number (a mask that
        is to be added to scores) in either is an error. Reads values on the host, as construction does.
        """
        check_tensor("tokens", tokens, dtypes=INTEGERS, ndim=2)
        check_valued("tokens", tokens)
        keep = real_tokens(attention_mask, tokens)
        scored = flags("loss_mask", loss_mask, tokens)
        if bool((scored & ~keep).any()):
            row = int((scored & ~keep).any(1).nonzero()[0, 0])
            raise ValueError(f"loss_mask must be zero on padding; row {row} scores a padded position")
        cu_seqlens = torch.zeros(tokens.shape[0] + 1, dtype=torch.int64, device=tokens.device)
        torch.cumsum(keep.sum(1), 0, out=cu_seqlens[1:])
        per_token = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs}
        packed = {k: None if x is None else same_shape(k, x, tokens)[keep] for k, x in per_token.items()}
        return cls(tokens[keep], cu_seqlens, scored[keep], group_ids, rewards, **packed)

    @suggesting
    def to_padded(self, x: Tensor, *, length: int | None = None, side: str = "right", value: float = 0) -> Tensor:
        """Pad a per-token tensor ``[T, ...]`` to ``[N, length, ...]``, the padding on ``side`` filled with ``value``.

        ``length`` defaults to :attr:`max_length`. The inverse of :meth:`from_padded`, bit for bit.
        """
        check_tensor("x", x, dtypes=LAID_OUT, device=self.device)
        if x.ndim == 0 or x.shape[0] != self.num_tokens:
            raise ValueError(f"x must have {self.num_tokens} rows, one a token; got {describe(x)}")
        length = self.max_length if length is None else length
        index = self.padded_index(length, side)
        out = x.new_full((self.num_trajectories * int(length), *x.shape[1:]), padding(value, x))
        return out.index_copy(0, index, x).view(self.num_trajectories, int(length), *x.shape[1:])

    @suggesting
    def padded_index(self, length: int, side: str = "right") -> Tensor:
        """Where each token stands in the flattened rows ``[N * length]`` of :meth:`to_padded`, int64 ``[T]``."""
        side = check_choice("side", side, ("left", "right"))
        length = check_count("length", length, high=MOST_TOKENS)
        if length < self.max_length:
            raise ValueError(f"length must be at least the longest trajectory's {self.max_length}, got {length}")
        lengths = self.lengths.long()
        row = torch.arange(self.num_trajectories, device=self.device) * length
        begin = row if side == "right" else row + length - lengths
        shift = torch.repeat_interleave(begin - self.bounds[:-1], lengths, output_size=self.num_tokens)
        return shift + torch.arange(self.num_tokens, device=self.device)


def _own_fields(batch: PackedBatch) -> dict[str, Any]:
    """The fields by name; TypeError where a subclass has some that nobody here knows how to take along."""
    known = [x.name for x in fields(PackedBatch)]
    for field in fields(batch):
        if field.name not in known:
            kind = type(batch).__name__
            raise TypeError(
                f"{kind}.{field.name} must be a field of PackedBatch to come along: whether it belongs to tokens or to "
                f"trajectories is not known here; keep it beside the batch"
            )
    own = {name: getattr(batch, name) for name in known}
    for name, x in own.items():
        if x is not None:
            check_tensor(name, x)
    return own


def _several(batches: Any) -> list[dict[str, Any]]:
    """The fields of each of the batches, which fit together."""
    if isinstance(batches, PackedBatch) or not isinstance(batches, Sequence):
        raise TypeError(f"batches must be a list or tuple of PackedBatches, got {describe(batches)}")
    if not batches:
        raise ValueError("batches must hold at least one PackedBatch, got none")
    for n, batch in enumerate(batches):
        if not isinstance(batch, PackedBatch):
            raise TypeError(f"batches[{n}] must be a PackedBatch, got {describe(batch)}")
        if batch.device != batches[0].device:
            raise ValueError(f"batches[{n}] must be on {batches[0].device} like batches[0]; it is on {batch.device}")
    parts = [_own_fields(batch) for batch in batches]
    for name, first in parts[0].items():
        for n, part in enumerate(parts):
            if (part[name] is None) != (first is None):
                has, lacks = (n, 0) if first is None else (0, n)
                raise ValueError(
                    f"{name} must be in all batches or in none; batches[{has}] has it, not batches[{lacks}]"
                )
    return parts


def _bare(values: dict[str, Any]) -> PackedBatch:
    """A batch of these fields, with nothing derived."""
    batch = object.__new__(PackedBatch)
    for field in fields(PackedBatch):
        object.__setattr__(batch, field.name, values.get(field.name))
    return batch


def _trusted(values: dict[str, Any]) -> PackedBatch:
    """A batch of fields that are known to be legal."""
    batch = _bare(values)
    _derive(batch)
    return batch


@savable
def _derive(batch: PackedBatch) -> None:
    """What a batch needs again and again, computed once."""
    dense = torch.unique(batch.group_ids, return_inverse=True)
    longest = int(batch.cu_seqlens.diff().max()) if batch.cu_seqlens.numel() > 1 else 0
    object.__setattr__(batch, "_derived", (dense[1], dense[0].numel(), longest, batch._pairs()))
    _keep(batch, owned(batch.cu_seqlens))


def _keep(batch: PackedBatch, bounds: Tensor) -> PackedBatch:
    """The batch, which reads these boundaries."""
    given = {name: getattr(batch, name) for name in ("tokens", "cu_seqlens", "loss_mask", "group_ids")}
    object.__setattr__(batch, "_bounds", bounds)
    index, _, _, pairs = batch._derived  # type: ignore[attr-defined]
    own = {"bounds": bounds, "group_index": index} | {f"head_inputs().{k}": x for k, x in pairs._asdict().items()}
    object.__setattr__(batch, "_given", Given("PackedBatch", given, own))
    return batch
