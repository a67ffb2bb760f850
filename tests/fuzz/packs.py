"""The ops of packed values, groups and whole batches of numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.problem import (
    LAID_OUT,
    Factors,
    Options,
    Problem,
    Target,
    Undecided,
    bounds,
    given,
    of_case,
    randn,
    some,
    terms_of,
)
from trajkern.testing.advantage import DISCOUNTED_RETURNS, GAE, GROUP_ADVANTAGES, WHITEN
from trajkern.testing.reflection import REFLECTION_REWARDS, VARIANCE_WEIGHTS
from trajkern.testing.registry import Inputs, OpSpec, Variant

DTYPES = ("float32", "float64")
LENGTHS = {
    "one token": (1,),
    "ragged": (5, 0, 33, 1, 64, 7),
    "no tokens": (0, 0),
    "no trajectories": (),
    "long": (700, 3),
    "many": (3,) * 90,
}


def _group_advantages(options: Options, seed: int) -> Problem:
    n = options["rows"]

    def make(g: torch.Generator) -> Inputs:
        rewards = {
            "random": randn(g, n),
            "binary": (torch.rand(n, generator=g) > 0.5).double(),
            "constant": torch.full((n,), 0.1, dtype=torch.float64),
            "large": randn(g, n) + 1e4,
        }[options["values"]]
        ids = (torch.randint(options["groups"], (n,), generator=g) - options["groups"] // 2) * 1_000_003
        gate = some(g, (n,), options["gate"])
        weights = torch.randint(0, 4, (n,), generator=g).double() if options["weights"] == "given" else None
        chosen = {name: options[name] for name in ("baseline", "scale", "ddof", "eps", "singleton")}
        return {"rewards": rewards, "group_ids": ids} | chosen | given(gate=gate, weights=weights)

    inputs, spec = of_case(GROUP_ADVANTAGES, options, seed, make), GROUP_ADVANTAGES
    if options["scale"] == "std":
        rewards, gate = inputs["rewards"], inputs.get("gate")
        counted = torch.ones_like(rewards, dtype=torch.bool) if gate is None else gate
        spec = dataclasses.replace(spec, oracle_term=terms_of(inputs, rewards, inputs["group_ids"], counted))
    return Problem(spec, inputs)


def _packed(spec: OpSpec, options: Options, seed: int) -> Problem:
    lengths = LENGTHS[options["lengths"]]

    def make(g: torch.Generator) -> Inputs:
        total = sum(lengths)
        inputs: dict[str, Any] = {"rewards": randn(g, total), "cu_seqlens": bounds(lengths), "gamma": options["gamma"]}
        if spec is GAE:
            inputs |= {"values": randn(g, total), "lam": options["lam"]}
            inputs |= given(bootstrap=randn(g, len(lengths)) if options["bootstrap"] == "given" else None)
        return inputs | given(mask=some(g, (total,), options["mask"]))

    return Problem(spec, of_case(spec, options, seed, make))


def _last_alone(inputs: Inputs, g: torch.Generator) -> Any:
    """The last trajectory and nothing else."""
    cuts = inputs["cu_seqlens"]
    first, total, count = int(cuts[-2:][0]), int(cuts[-1]), cuts.shape[0] - 1
    alone = {k: v[first:] if k in ("rewards", "values", "mask") else v for k, v in inputs.items()}
    alone["cu_seqlens"] = torch.tensor([0, total - first] if count else [0])
    if "bootstrap" in inputs:
        alone["bootstrap"] = inputs["bootstrap"][-1:]

    def undo(name: str, x: Tensor) -> Tensor:
        whole = count if name == "grad_bootstrap" else total
        return x[first if whole == total else -1 :] if x.shape[0] == whole and count > 1 else x

    return alone, undo


def _whiten(options: Options, seed: int) -> Problem:
    n = options["rows"]

    def make(g: torch.Generator) -> Inputs:
        x = randn(g, n) * options["scale"] + options["offset"]
        chosen = {"shift_mean": options["shift_mean"] == "yes", "ddof": options["ddof"], "eps": options["eps"]}
        return {"x": x} | chosen | given(mask=some(g, (n,), options["mask"]))

    inputs = of_case(WHITEN, options, seed, make)
    x, mask = inputs["x"], inputs.get("mask")
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    terms = terms_of(inputs, x, torch.zeros_like(x).long(), counted, of_variance=True)
    return Problem(dataclasses.replace(WHITEN, oracle_term=terms), inputs)


GROUPS = {
    "two": ((2, 1),),
    "ragged": ((9, 33), (3, 7), (5, 64), (2, 1), (4, 19)),
    "alone": ((1, 5), (3, 4), (1, 9)),
    "empty": ((3, 0), (2, 5), (4, 0)),
    "no tokens": ((3, 0), (2, 0)),
    "no groups": (),
    "blocks": ((2, 530), (3, 140)),
    "many": tuple((2 + k % 5, 20 + 13 * k % 70) for k in range(40)),
}


def _reflection(spec: OpSpec, options: Options, seed: int) -> Problem:
    groups = GROUPS[options["groups"]]

    def make(g: torch.Generator) -> Inputs:
        members = torch.arange(len(groups)).repeat_interleave(torch.tensor([k for k, _ in groups], dtype=torch.int64))
        members = members[torch.randperm(len(members), generator=g)]
        lengths = torch.tensor([n for _, n in groups], dtype=torch.int64)[members].tolist()
        column = torch.cat([torch.arange(n) for n in lengths] or [torch.arange(0)])
        x = randn(g, sum(lengths)) * options["spread"] + options["offset"]
        if options["values"] == "some constant":
            x = torch.where(column % 3 == 0, -0.1 - 0.3 * column, x)
        elif options["values"] == "in pairs":
            x = torch.where(column % 2 == 1, x.roll(1), x)
        inputs: dict[str, Any] = {"logprobs": x, "cu_seqlens": bounds(lengths), "group_ids": (members - 2) * 1_000_003}
        if options.get("baseline") == "given":
            inputs["baseline"] = randn(g, sum(lengths)) + options["offset"]
        return inputs | {"ddof": options["ddof"], "normalize": options["normalize"] == "yes"}

    inputs = of_case(spec, options, seed, make)
    if spec is REFLECTION_REWARDS and any(map(_largest_is_undecided, _columns(inputs))):
        raise Undecided
    # of a reference of one token the gradient is 0, of which sums in float64 leave their rounding
    size = max(1e-6 / options["spread"], _cancelling(inputs) if options["dtype"] == "float64" else 0.0)
    terms = dict.fromkeys(("grad_logprobs", "grad_baseline"), size)
    return Problem(dataclasses.replace(spec, term_scale=spec.term_scale | terms), inputs)


def _cancelling(inputs: Inputs) -> float:
    """How large the terms are whose sum a normalised deviation's gradient is: gains, and the weights' upstream of
    about 1, by the deviations' total."""
    if not inputs["normalize"]:
        return 0.0
    largest, gains = 0.0, dict(inputs, logprobs=inputs["logprobs"] - inputs.get("baseline", 0))
    for x, gain in zip(_columns(inputs), _columns(gains), strict=True):
        total = float((x - x.mean(0)).square().mean(0).sqrt().sum())
        if total > 0:
            largest = max(largest, (1 + float(gain.abs().max())) / total)
    return largest


def _columns(inputs: Inputs) -> Iterator[Tensor]:
    """Each group's log-probs, ``[K, P]``."""
    bounds_of, ids = inputs["cu_seqlens"].tolist(), inputs["group_ids"]
    for group in ids.unique():
        tokens = [torch.arange(*bounds_of[n : n + 2]) for n in (ids == group).nonzero()[:, 0].tolist()]
        yield inputs["logprobs"][torch.stack(tokens)]


def _largest_is_undecided(x: Tensor) -> bool:  # [K, P]
    """Whether the order of a sum decides which column's deviation is the group's largest, whose the score is."""
    wide = x.double()
    spread = (wide - wide.mean(0)).square().sum(0)
    if not spread.numel() or not spread.max() > 0:  # of which the derivative is 0
        return False
    near = wide[:, spread >= spread.max() * (1 - 1e-12)]
    return bool((near != near[:, :1]).any())


_GROUPED: Factors = {
    "baseline": ("mean", "leave_one_out", "none"),
    "scale": ("std", "none"),
    "ddof": (1, 0),
    "eps": (1e-6, 0.0, 1e-2),
    "singleton": ("raw", "zero"),
}
_TRAJECTORIES: Factors = {
    "dtype": DTYPES,
    "lengths": tuple(LENGTHS),
    "gamma": (1.0, 0.9, 0.0),
    "mask": ("none", "some", "nothing"),
    **LAID_OUT,
}
_REFLECTED: Factors = {
    "dtype": DTYPES,
    "groups": tuple(GROUPS),
    "ddof": (0, 1),
    "normalize": ("yes", "no"),
    "spread": (1.0, 0.05, 1e-6, 30.0),
    "offset": (-3.0, 0.0, -1e4),
    "values": ("random", "some constant", "in pairs"),
    **LAID_OUT,
}
_ALONE = (Variant("last_trajectory_alone", _last_alone),)
TARGETS = {
    "group_advantages": Target(
        {
            "dtype": DTYPES,
            "rows": (1, 0, 6, 60, 300, 3000),
            "groups": (1, 3, 9, 400),
            "values": ("random", "binary", "constant", "large"),
            "gate": ("none", "some", "nothing"),
            "weights": ("none", "given"),
            **_GROUPED,
            **LAID_OUT,
        },
        _group_advantages,
    ),
    "discounted_returns": Target(_TRAJECTORIES, lambda o, seed: _packed(DISCOUNTED_RETURNS, o, seed), (), _ALONE),
    "gae": Target(
        _TRAJECTORIES | {"lam": (0.95, 0.0, 1.0), "bootstrap": ("none", "given")},
        lambda o, seed: _packed(GAE, o, seed),
        (),
        _ALONE,
    ),
    "whiten": Target(
        {
            "dtype": DTYPES,
            "rows": (2, 1, 0, 9, 100, 5000),
            "mask": ("none", "some", "nothing"),
            "shift_mean": ("yes", "no"),
            "ddof": (1, 0),
            "eps": (1e-8, 1e-2),
            "scale": (1.0, 1e-3, 100.0),
            "offset": (0.0, 1e4),
            **LAID_OUT,
        },
        _whiten,
    ),
    "variance_weights": Target(_REFLECTED, lambda o, seed: _reflection(VARIANCE_WEIGHTS, o, seed)),
    "reflection_rewards": Target(
        _REFLECTED | {"baseline": ("none", "given")}, lambda o, seed: _reflection(REFLECTION_REWARDS, o, seed)
    ),
}
