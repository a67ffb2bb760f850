"""The policy loss of given log-probs, of flat batches and of trees."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.layouts import TREES
from tests.fuzz.packs import LENGTHS
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
)
from trajkern import reference
from trajkern._results import Branch
from trajkern.losses.config import PolicyLoss
from trajkern.losses.kinds import AGGREGATES, KINDS
from trajkern.ops.tree_loss import Paths
from trajkern.testing.numerics import cast, run
from trajkern.testing.option_pairs import (
    FLAT_REFUSED,
    GIVEN,
    LOG_RATIOS,
    LOG_WEIGHTS,
    LOSS,
    TREE_REFUSED,
    chosen,
    config_of,
)
from trajkern.testing.pairs import Pair, pair
from trajkern.testing.policy_loss import POLICY_LOSS
from trajkern.testing.registry import Inputs

DTYPES = ("float32", "float64", "bfloat16")


def _policy_loss(options: Options, seed: int) -> Problem:
    inputs = of_case(POLICY_LOSS, options, seed, lambda g: _arguments(options, g))
    if isinstance(branch := inputs.get("branch"), Branch):
        inputs["branch"] = Branch(*(x.to(inputs["logprobs"].dtype) for x in branch))
    if _cut_is_a_tie(inputs):
        raise Undecided
    spec = dataclasses.replace(POLICY_LOSS, term_scale=POLICY_LOSS.term_scale | _cancelling(inputs))
    if options["dtype"] == "float64" and options["aggregate"] == "token_sum":  # what float64's own sum is made of
        spec = dataclasses.replace(spec, term_scale=spec.term_scale | {"loss": _size_of_terms(inputs)})
    return Problem(spec, inputs, {"old_logprobs": None} if options["old_logprobs"] == "none" else {})


def _cancelling(inputs: Inputs) -> dict[str, Any]:
    """Of each token's gradient the smaller of its two sides, the leaves of positive and of negative advantage: where
    they cancel, their sum is found to that size's rounding."""
    branch, sides = inputs.get("branch"), []
    if isinstance(branch, Paths):
        sides = [Paths(branch.tree, sign * (sign * branch.advantages).clamp_min(0), branch.gate) for sign in (1, -1)]
    elif branch is not None:
        zero = torch.zeros_like(branch.positive)
        sides = [branch._replace(negative=zero), branch._replace(positive=zero)]
    wide = cast(inputs, torch.float64)
    found = [run(POLICY_LOSS, reference.policy_loss, wide | {"branch": side})["grad_logprobs"].abs() for side in sides]
    return {"grad_logprobs": torch.minimum(*found)} if found else {}


def _cut_is_a_tie(inputs: Inputs) -> bool:
    """Whether kl_cov takes one of two tokens by where they stand: a pack in another order takes the other."""
    config, advantages = inputs["config"], inputs["advantages"]
    if config.kind != "kl_cov" or advantages is None:
        return False
    x, lengths = inputs["logprobs"].double(), inputs["cu_seqlens"].diff()
    a = advantages.double() if advantages.shape == x.shape else advantages.double().repeat_interleave(lengths)
    mask = inputs.get("mask")
    if mask is not None:
        x, a = x[mask], a[mask]
    found = ((a - a.mean()) * (x - x.mean())).sort(descending=True).values
    cut = max(1, math.floor(config.cov_fraction * found.numel()))
    return cut < found.numel() and bool((found[cut - 1] - found[cut]).abs() <= 1e-9 * found[cut].abs())


def _size_of_terms(inputs: Inputs) -> float:
    """The sum of all tokens' advantages without their signs, at least 1."""
    branch, lengths = inputs.get("branch"), inputs["cu_seqlens"].diff()
    if isinstance(branch, Paths):
        return max(1.0, float((branch.advantages.abs() * branch.tree.flat_lengths).sum()))
    sizes = inputs["advantages"].abs() if branch is None else branch.positive + branch.negative.abs()
    per_token = sizes.shape[0] != lengths.shape[0]
    return max(1.0, float((sizes if per_token else sizes * lengths).sum()))


def _arguments(options: Options, g: torch.Generator) -> Inputs:
    inputs, lengths = _of_tree(options, g) if "tree" in options else _of_batch(options, g)
    total, config = sum(lengths), config_of(options)
    old = (-torch.rand(total, generator=g, dtype=torch.float64) * 4 - 2).mul(16).round() / 16  # exact in 16 bits
    inputs |= {"cu_seqlens": bounds(lengths), "config": config, "old_logprobs": old, **_reads(config, old, g)}
    inputs["logprobs"] = old if options["old_logprobs"] == "none" else old + chosen(LOG_RATIOS, total, g)
    inputs |= given(mask=some(g, (total,), options["mask"], 0.8))
    if options["entropy"] != "none":
        inputs["entropy"] = randn(g, total).abs()
    normalizers = {"none": None, "number": 57.5, "tensor": torch.tensor([57.5])}
    inputs["normalizer"] = normalizers[options["normalizer"]]
    return inputs | _streams(options, total, g)


def _reads(config: PolicyLoss, old: Tensor, g: torch.Generator) -> Inputs:
    """The log-probs that the loss has a use for."""
    more: Inputs = {}
    if config.kl_coef:
        more["ref_logprobs"] = old + 0.2 * randn(g, *old.shape)
    if config.sampler_correction != "none":
        more["sampler_logprobs"] = old - chosen(LOG_WEIGHTS, old.shape[0], g)
    return more


def _streams(options: Options, total: int, g: torch.Generator) -> Inputs:
    """Terms with weights of their own, which are 0 on some tokens."""
    more: dict[str, Any] = {}
    for name in ("supervised", "kl") if options.get("streams") == "both" else ("supervised",):
        if options.get("streams", "none") != "none":
            weights = torch.rand(total, generator=g, dtype=torch.float64) - 0.2
            more[f"{name}_weights"] = torch.where(torch.rand(total, generator=g) < 0.4, weights, 0)
    return more


def _of_batch(options: Options, g: torch.Generator) -> tuple[Inputs, tuple[int, ...]]:
    lengths, design = LENGTHS[options["lengths"]], options["advantages"]
    size = sum(lengths) if "token" in design else len(lengths)
    per_token = "token" in design
    if design.startswith("sums"):
        counts = torch.randint(0, 4, (4, size), generator=g).double()
        sizes = torch.rand(3, size, generator=g, dtype=torch.float64) * counts[:3]
        branch = Branch(sizes[0], -sizes[1], 0.7 * counts[:3].sum(0) + sizes[2], *counts[:3])
        return {"advantages": None, "branch": branch, "per_token": per_token}, lengths
    advantages = randn(g, size)
    if design.startswith("half zero"):
        advantages[::2] = 0
    return {"advantages": advantages, "per_token": per_token}, lengths


def _of_tree(options: Options, g: torch.Generator) -> tuple[Inputs, tuple[int, ...]]:
    tree = TREES[options["tree"]](g)
    advantages = randn(g, tree.num_leaves)
    if options["advantages"] == "half zero":
        advantages[::2] = 0
    elif options["advantages"] == "zero":
        advantages.zero_()
    gate = torch.arange(tree.num_leaves) % 3 > 0 if options["gate"] == "given" else None
    return {"advantages": None, "branch": Paths(tree, advantages, gate)}, tuple(tree.node_lengths.tolist())


SUMS = ("sums of a trajectory", "sums of a token")  # which know of no trajectory's ratio, correction or mean
_OF_TRAJECTORIES = {
    "kind": tuple(x for x, kind in KINDS.items() if "token" not in kind.in_tree or kind.ratio_level == "sequence"),
    "ratio_level": ("sequence",),
    "sampler_correction": ("sequence_mask",),
    "aggregate": ("own", *(x for x in AGGREGATES if x.startswith("seq_mean"))),
    "streams": ("supervised", "both"),
}
_REFUSED: set[Pair] = {
    *FLAT_REFUSED,
    *(pair(name, x, "advantages", y) for name, values in _OF_TRAJECTORIES.items() for x in values for y in SUMS),
    pair("kl", "k3_corrected", "streams", "both"),
}
_COMMON: Factors = {"dtype": DTYPES, "mask": ("none", "some", "nothing"), **LOSS, **LAID_OUT}
TARGETS = {
    "policy_loss": Target(
        {
            "kind": tuple(KINDS),
            "ratio_level": ("own", "token", "sequence"),
            "lengths": tuple(LENGTHS),
            "advantages": ("of a trajectory", "of a token", "half zero", *SUMS),
            "streams": ("none", "supervised", "both"),
            **_COMMON,
        },
        _policy_loss,
        _REFUSED,
    ),
    "policy_loss on a tree": Target(
        {
            "kind": tuple(name for name, kind in KINDS.items() if kind.in_tree),
            "ratio_level": ("token", "sequence"),
            "tree": tuple(TREES),
            "advantages": ("signed", "half zero", "zero"),
            "gate": GIVEN,
            **_COMMON,
        },
        _policy_loss,
        TREE_REFUSED,
    ),
}
