"""Checks that read tensors' values, where reading them is free: every message names the argument and the place."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern._checks import REPRESENTABLE, largest_value, representable

MOST_WEIGHT = 2.0**64  # of a rollout in its group


def check_finite(name: str, x: Tensor, where: Tensor | None = None) -> None:
    """Reads device values."""
    _refuse_where(name, x, "finite", ~torch.isfinite(x), where)


def check_squarable(name: str, x: Tensor, where: Tensor | None = None) -> None:
    """Finite, and of a magnitude whose squares add up without an overflow. Reads device values."""
    check_finite(name, x, where)
    most = largest_value(x.dtype)
    _refuse_where(name, x, f"of a magnitude of at most {most:.3g}, so that no square overflows", x.abs() > most, where)


def _refuse_where(name: str, x: Tensor, what: str, bad: Tensor, where: Tensor | None) -> None:
    if where is not None:
        bad &= where
    if bool(bad.any()):
        at = int(bad.nonzero()[0, 0])
        raise ValueError(f"{name} must be {what}; it is {float(x[at])} at index {at}")


def check_values(name: str, x: Tensor, low: float, where: Tensor | None = None) -> None:
    """Finite and at least ``low``. Reads device values."""
    check_finite(name, x, where)
    read = x if where is None else x[where]
    if bool((read < low).any()):
        raise ValueError(f"{name} must be at least {low:g}; the smallest is {float(read.min())}")


def check_rewards(rewards: Tensor, gate: Tensor | None, weights: Tensor | None) -> None:
    """Those that the gate lets through and that weigh something, and the weights. Reads device values."""
    where = gate
    if weights is not None:
        check_values("weights", weights, 0, where)
        _refuse_where("weights", weights, f"at most {MOST_WEIGHT:.3g}, so that sums hold", weights > MOST_WEIGHT, where)
        where = weights != 0 if gate is None else gate & (weights != 0)
    check_squarable("rewards", rewards, where)


def check_leaves(leaf_advantages: Tensor, leaf_weights: Tensor | None) -> None:
    """The weights, and the advantages of what weighs something. Reads device values."""
    if leaf_weights is not None:
        check_values("leaf_weights", leaf_weights, 0)
    check_finite("leaf_advantages", leaf_advantages, None if leaf_weights is None else leaf_weights != 0)


def check_temperatures(x: Tensor, dtype: torch.dtype) -> None:
    """Reads device values."""
    check_finite("temperature", x.flatten())
    if not bool((x > 0).all()):
        raise ValueError(f"temperature must be positive; its smallest value is {float(x.min())}")
    least, most = REPRESENTABLE[dtype]
    bad = (x < least) | (x > most)
    if bool(bad.any()):
        raise ValueError(f"temperature must be {representable(dtype)}; it is {float(x[bad][0])}")


def check_targets(targets: Tensor, vocabulary: int, mask: Tensor | None, name: str = "targets") -> None:
    """Reads device values."""
    bad = (targets < 0) | (targets >= vocabulary)
    if mask is not None:
        bad &= mask
    if bool(bad.any()):
        row = int(bad.flatten().nonzero()[0, 0])
        value = int(targets.flatten()[row])
        hint = "; rows that are not to be scored are False in mask=" if mask is None and name == "targets" else ""
        raise ValueError(
            f"{name} must lie in [0, {vocabulary}) on every unmasked row; {name} is {value} at row {row}{hint}"
        )


def check_pairs(
    targets: Tensor,  # [P]
    vocabulary: int,
    rows: Tensor | None,  # [P]
    tokens: int,
    mask: Tensor | None,  # [P]
    support: tuple[Tensor, Tensor] | None,  # [E], [P+1]
) -> None:
    """Whether the rows, targets and supports of a head exist. Reads device values."""
    check_targets(targets, vocabulary, mask)
    if rows is not None:
        bad = (rows < 0) | (rows >= tokens)
        if mask is not None:
            bad &= mask
        if bool(bad.any()):
            at = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"rows must lie in [0, {tokens}) on every unmasked pair; rows is {int(rows[at])} at pair {at}"
            )
    if support is not None:
        _check_support(*support, targets, vocabulary, mask)


def _check_support(ids: Tensor, offsets: Tensor, targets: Tensor, vocabulary: int, mask: Tensor | None) -> None:
    check_offsets("sampling_support offsets", offsets, ids.shape[0])
    check_targets(ids, vocabulary, None, name="sampling_support ids")
    pair = torch.repeat_interleave(
        torch.arange(targets.shape[0], device="cpu"), offsets.diff(), output_size=ids.shape[0]
    )
    held = torch.zeros(targets.shape, dtype=torch.bool, device="cpu")
    held[pair[ids == targets[pair]]] = True
    lacks = ~held if mask is None else ~held & mask
    if bool(lacks.any()):
        at = int(lacks.nonzero()[0, 0])
        target = int(targets[at])
        raise ValueError(f"sampling_support must hold every unmasked target; it lacks {target} at pair {at}")


def check_cu_seqlens(cu_seqlens: Tensor, length: int) -> None:
    """Reads device values."""
    check_offsets("cu_seqlens", cu_seqlens, length, "tokens")


def check_equal_lengths(cu_seqlens: Tensor, group_ids: Tensor) -> None:
    """The rollouts of each group score the same reference. Reads device values."""
    lengths, (ids, group) = cu_seqlens.diff(), torch.unique(group_ids, return_inverse=True)
    least, most = (
        lengths.new_zeros(ids.shape).scatter_reduce(0, group, lengths, to, include_self=False)
        for to in ("amin", "amax")
    )
    uneven = (least != most).nonzero()
    if uneven.numel():
        at = int(uneven[0, 0])
        raise ValueError(
            "cu_seqlens must give all rollouts of a group references of equal length; "
            f"group {int(ids[at])} has lengths {lengths[group == at].unique().tolist()}"
        )


def check_offsets(name: str, offsets: Tensor, length: int, what: str = "entries") -> None:
    """Reads device values."""
    if offsets.numel() == 0:
        raise ValueError(f"{name} must hold at least its first 0; it is empty")
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != length:
        raise ValueError(f"{name} must run from 0 to the {length} {what}; it runs from {first} to {last}")
    falls = (offsets[1:] < offsets[:-1]).nonzero()  # a difference could overflow
    if falls.numel():
        at = int(falls[0, 0])
        pair = offsets[at : at + 2].tolist()
        raise ValueError(f"{name} must never decrease; it goes from {pair[0]} to {pair[1]} at index {at + 1}")
