"""Specs of the advantage family."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trajkern.testing.registry import Case, Inputs, OpSpec, Variant

DTYPES = (torch.float32, torch.float64)


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _drawn(options: dict[str, Any], g: torch.Generator, n: int) -> Inputs:
    return {k: v(g, n) if callable(v) else v for k, v in options.items()}


def _groups(n: int, groups: int, spread: float = 1.0, centre: float = 0.0, **options: Any):
    """Random rewards in unsorted groups of uneven size, whose ids are far apart and partly negative."""

    def make(g: torch.Generator) -> Inputs:
        ids = (torch.randint(max(groups, 1), (n,), generator=g) - groups // 2) * 1_000_003
        return {"rewards": _randn(g, n) * spread + centre, "group_ids": ids} | _drawn(options, g, n)

    return make


def _binary(g: torch.Generator) -> Inputs:
    ids = torch.arange(64) // 8
    return {"rewards": (torch.rand(64, generator=g) > 0.5).double(), "group_ids": ids}


def _in_runs(g: torch.Generator) -> Inputs:
    """Groups of 700 rows that stand together, in no order of their ids."""
    return {"rewards": _randn(g, 2500), "group_ids": torch.tensor([7, -3, 10**15, 0]).repeat_interleave(700)[:2500]}


def _crowded(g: torch.Generator) -> Inputs:
    """Ids that the kernels' mixing of bits takes to 0, 1, 2, 3 and 4: one bucket, whichever of the bits name it."""
    mask, ids = 2**64 - 1, []
    for x in range(5):
        for factor in (0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD):
            x = (x ^ x >> 33) * pow(factor, -1, 2**64) & mask
        x ^= x >> 33
        ids.append(x - 2**64 if x >= 2**63 else x)
    return {"rewards": _randn(g, 3000), "group_ids": torch.tensor(ids)[torch.randint(5, (3000,), generator=g)]}


def _constant(g: torch.Generator) -> Inputs:
    return {"rewards": torch.full((9,), 0.1, dtype=torch.float64), "group_ids": torch.arange(9) % 3}


def _alone(**options: Any) -> Callable[[torch.Generator], Inputs]:
    def make(g: torch.Generator) -> Inputs:
        return {"rewards": _randn(g, 6), "group_ids": torch.tensor([5, 1, 2, 1, 9, 7])} | options

    return make


def _gate(g: torch.Generator, n: int) -> Tensor:
    return torch.rand(n, generator=g) > 0.3


def _frequencies(g: torch.Generator, n: int) -> Tensor:
    return torch.randint(0, 4, (n,), generator=g).double()


GROUP_ADVANTAGES = OpSpec(
    name="group_advantages",
    family="advantage",
    outputs=lambda x: {"advantages": x},
    differentiable=("rewards",),
    typed=("rewards", "weights"),
    dtypes=DTYPES,
    cases=(
        Case("grpo", _groups(60, 9), "the default: mean, unbiased std, raw singletons"),
        Case("sorted_binary", _binary, "0/1 rewards in groups of 8, the usual batch"),
        Case("dr_grpo", _groups(60, 9, scale="none"), "no std"),
        Case("rloo", _groups(60, 9, baseline="leave_one_out", scale="none", singleton="zero"), "RLOO"),
        Case("rloo_std", _groups(60, 9, baseline="leave_one_out"), "leave-one-out over std"),
        Case("no_baseline", _groups(60, 9, baseline="none"), "std alone"),
        Case("raw", _groups(60, 9, baseline="none", scale="none"), "neither: the reward itself"),
        Case("population_std", _groups(60, 9, ddof=0, eps=1e-4), "ddof 0 and TRL's eps"),
        Case("no_eps", _groups(60, 9, eps=0.0), "a constant group divides 0 by 0"),
        Case("gate", _groups(60, 9, gate=_gate), "gated rows enter no statistic"),
        Case("gate_all", _groups(20, 3, gate=lambda g, n: torch.zeros(n, dtype=torch.bool)), "every group emptied"),
        Case("weights", _groups(60, 9, weights=_frequencies), "frequencies, some of them 0"),
        Case("weights_gate", _groups(60, 9, weights=_frequencies, gate=_gate, ddof=0), "both"),
        Case("large_mean", _groups(60, 5, 1.0, 10_000.0), "rewards near 10,000: one-pass variance fails"),
        Case("constant", _constant, "a constant group is exactly 0 and has a finite gradient"),
        Case("singletons", _alone(), "alone: raw / (1 + eps)"),
        Case("singletons_zero", _alone(singleton="zero"), "alone: zero"),
        Case("singletons_no_std", _alone(scale="none"), "alone: raw"),
        Case("one", _groups(1, 1), "N = 1"),
        Case("empty", _groups(0, 1), "N = 0"),
        Case("one_group", _groups(300, 1), "one large group", large=True),
        Case("in_runs", _in_runs, "large groups whose rows stand together", large=True),
        Case("crowded", _crowded, "ids that share a bucket", large=True),
        Case("many_groups", _groups(3000, 1000), "more groups than threads", large=True),
    ),
    variants=(
        Variant("one_group_alone", lambda x, g: _only_group(x)),
        Variant("other_groups_between", lambda x, g: _spread_out(x)),
    ),
    term_scale={"advantages": 1.0},
)


def _rowwise(inputs: Inputs, index: Tensor) -> Inputs:
    return {k: v[index] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _only_group(inputs: Inputs):
    members = inputs["group_ids"] == inputs["group_ids"][-1]
    return _rowwise(inputs, members), lambda name, x: x if x.shape[0] == members.sum() else x[members]


def _spread_out(inputs: Inputs):
    """Each row followed by a row of a group of its own."""
    n = inputs["rewards"].shape[0]
    wide = _rowwise(inputs, torch.arange(2 * n) // 2)
    wide["group_ids"] = wide["group_ids"].clone()
    wide["group_ids"][1::2] = torch.arange(n) + 10**12
    return wide, lambda name, x: x if x.shape[0] == n else x[::2]


def _packed(lengths: tuple[int, ...], values: bool = True, **options: Any):
    def make(g: torch.Generator) -> Inputs:
        total = sum(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        inputs = {"rewards": _randn(g, total), "cu_seqlens": cu_seqlens}
        if values:
            inputs["values"] = _randn(g, total)
        extra = _drawn({k: v for k, v in options.items() if k != "bootstrap"}, g, total)
        if options.get("bootstrap"):
            extra["bootstrap"] = _randn(g, len(lengths))
        return inputs | extra

    return make


_LENGTHS = (5, 0, 33, 1, 64, 7)


def _reversed_trajectories(inputs: Inputs, g: torch.Generator):
    bounds = inputs["cu_seqlens"].tolist()
    order = [torch.arange(a, b) for a, b in pairwise(bounds)][::-1]
    index = torch.cat(order) if order else torch.arange(0)
    turned = {k: v[index] if k in ("rewards", "values", "mask") else v for k, v in inputs.items() if v is not None}
    turned["cu_seqlens"] = torch.tensor([0, *map(len, order)]).cumsum(0)
    if "bootstrap" in inputs:
        turned["bootstrap"] = inputs["bootstrap"].flip(0)

    def undo(name: str, x: Tensor) -> Tensor:
        return x.flip(0) if name == "grad_bootstrap" else x[torch.argsort(index)]

    return turned, undo


_REVERSED = Variant("trajectories_reversed", _reversed_trajectories)

DISCOUNTED_RETURNS = OpSpec(
    name="discounted_returns",
    family="advantage",
    outputs=lambda x: {"returns": x},
    differentiable=("rewards",),
    typed=("rewards",),
    dtypes=DTYPES,
    cases=(
        Case("undiscounted", _packed(_LENGTHS, False), "gamma 1"),
        Case("discounted", _packed(_LENGTHS, False, gamma=0.9), "gamma below 1"),
        Case("no_future", _packed(_LENGTHS, False, gamma=0.0), "gamma 0: the rewards"),
        Case("mask", _packed(_LENGTHS, False, gamma=0.9, mask=_gate), "observations take no part"),
        Case("long", _packed((2000, 3), False, gamma=0.99), "many chunks of a scan", large=True),
        Case("empty", _packed((0, 0), False), "T = 0"),
        Case("none", _packed((), False), "N = 0"),
    ),
    variants=(_REVERSED,),
    term_scale={"returns": 1.0, "grad_rewards": 1.0},
)

GAE = OpSpec(
    name="gae",
    family="advantage",
    outputs=lambda x: x._asdict(),
    differentiable=("rewards", "values", "bootstrap"),
    typed=("rewards", "values", "bootstrap"),
    dtypes=DTYPES,
    cases=(
        Case("typical", _packed(_LENGTHS, gamma=0.99, lam=0.95), "PPO's"),
        Case("bootstrap", _packed(_LENGTHS, gamma=0.9, lam=0.8, bootstrap=True), "truncated trajectories"),
        Case("mask", _packed(_LENGTHS, gamma=0.9, lam=0.8, bootstrap=True, mask=_gate), "observations take no part"),
        Case("one_step", _packed(_LENGTHS, gamma=0.9, lam=0.0), "lam 0: the TD error"),
        Case("long", _packed((1500, 40), gamma=0.99), "many chunks of a scan", large=True),
        Case("empty", _packed((0,), bootstrap=True), "T = 0"),
    ),
    variants=(_REVERSED,),
    term_scale={"advantages": 1.0, "returns": 1.0, "grad_rewards": 1.0, "grad_values": 1.0, "grad_bootstrap": 1.0},
)


def _values(n: int, scale: float = 1.0, offset: float = 0.0, **options: Any):
    def make(g: torch.Generator) -> Inputs:
        return {"x": _randn(g, n) * scale + offset} | _drawn(options, g, n)

    return make


WHITEN = OpSpec(
    name="whiten",
    family="advantage",
    outputs=lambda x: {"whitened": x},
    differentiable=("x",),
    typed=("x",),
    dtypes=DTYPES,
    cases=(
        Case("typical", _values(100), "the plain case"),
        Case("keep_mean", _values(100, 2.0, 3.0, shift_mean=False), "the mean added back"),
        Case("mask", _values(100, mask=_gate, ddof=0), "masked values enter no statistic"),
        Case("large_mean", _values(100, 1.0, 10_000.0), "a one-pass variance fails"),
        Case("one", _values(1), "no variance"),
        Case("nothing", _values(9, mask=lambda g, n: torch.zeros(n, dtype=torch.bool)), "everything masked"),
        Case("empty", _values(0), "T = 0"),
        Case("long", _values(20_000), "many chunks of a sum", large=True),
    ),
    term_scale={"whitened": 1.0, "grad_x": 1.0},
)

SPECS = (GROUP_ADVANTAGES, DISCOUNTED_RETURNS, GAE, WHITEN)
