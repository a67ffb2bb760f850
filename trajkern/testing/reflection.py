"""Specs of the reflection family."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trajkern.testing.registry import Case, Inputs, OpSpec, Variant

DTYPES = (torch.float32, torch.float64)
Groups = tuple[tuple[int, int], ...]  # (rollouts, tokens of the reference) of each

_RAGGED: Groups = ((9, 33), (3, 7), (5, 64), (2, 1), (4, 19))
_ID = 1_000_003


def _rollouts(
    groups: Groups,
    *,
    spread: float = 1.0,
    offset: float = -3.0,
    shuffled: bool = True,
    baseline: bool = False,
    edit: Callable[[Tensor, Tensor], Tensor] = lambda x, column: x,
    **options: Any,
) -> Callable[[torch.Generator], Inputs]:
    """Log-probs of each group's reference; ``edit`` maps them and each token's place in its reference to others."""

    def make(g: torch.Generator) -> Inputs:
        members = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([k for k, _ in groups]).long())
        order = torch.randperm(len(members), generator=g) if shuffled else torch.arange(len(members))
        members = members[order]
        lengths = torch.tensor([n for _, n in groups]).long()[members]
        total = int(lengths.sum())
        names = torch.randperm(len(groups), generator=g) - len(groups) // 2 if shuffled else torch.arange(len(groups))
        column = torch.cat([torch.arange(n) for n in lengths.tolist()] or [torch.arange(0)])
        x = torch.randn(total, generator=g, dtype=torch.float64) * spread + offset
        inputs = {
            "logprobs": edit(x, column),
            "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
            "group_ids": names[members] * _ID,
        }
        if baseline:
            inputs["baseline"] = torch.randn(total, generator=g, dtype=torch.float64) + offset
        return inputs | options

    return make


def _some_constant(x: Tensor, column: Tensor) -> Tensor:
    """Every third position the same in all rollouts."""
    return torch.where(column % 3 == 0, -0.1 - 0.3 * column, x)


def _in_pairs(x: Tensor, column: Tensor) -> Tensor:
    """Positions 2i and 2i + 1 alike, so that two share every group's largest deviation."""
    return torch.where(column % 2 == 1, x.roll(1), x)


def _tokens(inputs: Inputs, rollouts: Tensor) -> Tensor:
    bounds = inputs["cu_seqlens"].tolist()
    spans = [torch.arange(*bounds[n : n + 2]) for n in rollouts.tolist()]
    return torch.cat(spans or [torch.arange(0)])


def _chosen(inputs: Inputs, rollouts: Tensor) -> tuple[Inputs, Tensor]:
    """The batch of these rollouts in this order, and where its tokens stood."""
    tokens = _tokens(inputs, rollouts)
    lengths = inputs["cu_seqlens"].diff()[rollouts]
    per_token = {k: inputs[k][tokens] for k in ("logprobs", "baseline") if k in inputs}
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return inputs | per_token | {"cu_seqlens": cu_seqlens, "group_ids": inputs["group_ids"][rollouts]}, tokens


def _alone(inputs: Inputs, g: torch.Generator):
    """The last rollout's group and nothing else."""
    ids = inputs["group_ids"]
    rollouts = (ids == ids[-1:]).nonzero()[:, 0]
    group, tokens = _chosen(inputs, rollouts)
    places = {"rewards": rollouts, "group_score": (torch.unique(ids) == ids[-1:]).nonzero()[:, 0]}

    def undo(name: str, x: Tensor) -> Tensor:
        index = places.get(name, tokens)
        return x if x.shape == index.shape else x[index]

    return group, undo


def _groups_moved(inputs: Inputs, g: torch.Generator):
    """The groups one after the other in another order, each with its rollouts in pack order."""
    ids, group = torch.unique(inputs["group_ids"], return_inverse=True)
    place = torch.randperm(ids.numel(), generator=g)
    rollouts = place[group].argsort(stable=True)
    moved, tokens = _chosen(inputs, rollouts)
    back = {"rewards": rollouts.argsort()}

    def undo(name: str, x: Tensor) -> Tensor:
        return x if name == "group_score" else x[back.get(name, tokens.argsort())]

    return moved, undo


def _others_between(inputs: Inputs, g: torch.Generator):
    """Each rollout followed by one of a group of its own, with a longer reference and a larger id."""
    n, ids = inputs["group_ids"].shape[0], inputs["group_ids"]
    groups, spans = torch.unique(ids).numel(), list(pairwise(inputs["cu_seqlens"].tolist()))
    places, at = [], 0
    for a, b in spans:
        places.append(torch.arange(at, at + b - a))
        at += 2 * (b - a) + 3
    tokens = torch.cat(places or [torch.arange(0)])
    wide = dict(inputs)
    for k in ("logprobs", "baseline"):
        if k in inputs:
            wide[k] = inputs[k].new_full((at,), -0.5).index_copy(0, tokens, inputs[k])
    lengths = torch.tensor([m for a, b in spans for m in (b - a, b - a + 3)], dtype=torch.int64)
    wide["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    wide["group_ids"] = torch.stack([ids, torch.arange(n) + 10**12], 1).flatten()
    rows = {"rewards": torch.arange(n) * 2, "group_score": torch.arange(groups)}

    def undo(name: str, x: Tensor) -> Tensor:
        return x[rows.get(name, tokens)]

    return wide, undo


_VARIANTS = (
    Variant("group_alone", _alone),
    Variant("groups_moved", _groups_moved),
    Variant("others_between", _others_between),
)

_SHARED = (
    Case("typical", _rollouts(_RAGGED), "groups and references of uneven sizes, ids unsorted and partly negative"),
    Case("unbiased", _rollouts(_RAGGED, ddof=1), "the unbiased variance"),
    Case("plain", _rollouts(_RAGGED, normalize=False), "weights that are the deviations"),
    Case("sorted", _rollouts(((4, 16),) * 4, shuffled=False), "the usual batch: groups of one size, in order"),
    Case("some_constant", _rollouts(_RAGGED, edit=_some_constant), "positions that agree weigh exactly 0"),
    Case("constant", _rollouts(_RAGGED, edit=lambda x, column: -0.1 * column - 0.1), "every deviation is 0: 0 / 0"),
    Case("tied", _rollouts(((6, 8), (3, 30)), edit=_in_pairs, normalize=False), "the first of two largest"),
    Case("offset", _rollouts(_RAGGED, spread=0.05, offset=-1e4), "a one-pass variance fails"),
    Case("narrow", _rollouts(((8, 20), (4, 9)), spread=1e-6, offset=-1e-6), "log-probs of almost certain tokens"),
    Case("wide", _rollouts(((8, 20), (4, 9)), spread=1e18, offset=0.0), "squares beyond float32"),
    Case("alone", _rollouts(((1, 5), (1, 0), (1, 9))), "groups of one: 0"),
    Case("alone_unbiased", _rollouts(((1, 5), (3, 4), (1, 9)), ddof=1), "no more rollouts than ddof: 0"),
    Case("empty_references", _rollouts(((3, 0), (2, 5), (4, 0))), "references without tokens"),
    Case("no_tokens", _rollouts(((3, 0), (2, 0))), "P = 0"),
    Case("none", _rollouts(()), "N = 0"),
    Case("blocks", _rollouts(((2, 530), (3, 140))), "several blocks of columns"),
    Case("large", _rollouts(tuple((4 + k % 9, 40 + 13 * k % 90) for k in range(120))), "every thread", large=True),
    Case("one_group", _rollouts(((300, 130),)), "many rollouts of one prompt", large=True),
)

VARIANCE_WEIGHTS = OpSpec(
    name="variance_weights",
    family="reflection",
    outputs=lambda x: {"weights": x},
    differentiable=("logprobs",),
    typed=("logprobs",),
    dtypes=DTYPES,
    triton_dtypes=DTYPES,
    cases=_SHARED,
    variants=_VARIANTS,
)

REFLECTION_REWARDS = OpSpec(
    name="reflection_rewards",
    family="reflection",
    outputs=lambda x: x._asdict(),
    differentiable=("logprobs", "baseline"),
    typed=("logprobs", "baseline"),
    dtypes=DTYPES,
    triton_dtypes=DTYPES,
    cases=(
        *_SHARED,
        Case("baseline", _rollouts(_RAGGED, baseline=True), "the log-probs under masked reasoning taken off"),
        Case("baseline_plain", _rollouts(_RAGGED, baseline=True, normalize=False, ddof=1), "the same, unnormalised"),
        Case("baseline_long", _rollouts(((5, 1300), (7, 60)), baseline=True), "long references", large=True),
    ),
    variants=_VARIANTS,
)

SPECS = (VARIANCE_WEIGHTS, REFLECTION_REWARDS)
