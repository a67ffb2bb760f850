"""Every pair of the options of ``linear_policy_loss``, over at least two blocks of rows; of a flat batch and of trees.

``FLAT`` and ``TREE`` name the options' values, ``FLAT_REFUSED`` and ``TREE_REFUSED`` the pairs that must raise, and
what they say. :func:`problem` makes arguments of a combination.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from trajkern.layouts.tree import Tree
from trajkern.losses.config import PolicyLoss
from trajkern.losses.kinds import AGGREGATES, KINDS, KL_ESTIMATORS, SAMPLER_CORRECTIONS
from trajkern.ops.tree_loss import Paths
from trajkern.reference import linear_logprobs
from trajkern.testing.head import LINEAR_POLICY_LOSS
from trajkern.testing.pairs import Pair, pair
from trajkern.testing.registry import Case, Inputs, OpSpec
from trajkern.testing.tree import chain, comb, random_tree, regular_tree, star

GIVEN = ("none", "given")
HEAD = {
    "dtype": ("float32", "bfloat16", "float16", "float64"),
    "gradients": ("all", "hidden", "weight and bias"),
    "bias": GIVEN,
    "temperature": ("1", "number", "rows"),
    "softcap": GIVEN,
    "logit_scale": ("1", "given"),
    "logits_dtype": ("float32", "own"),
}
LOSS = {
    "aggregate": ("own", *AGGREGATES),
    "clip_high": ("0.2", "0.28"),
    "clip_dual": GIVEN,
    "kl": ("none", *KL_ESTIMATORS),
    "sampler_correction": SAMPLER_CORRECTIONS,
    "entropy": ("none", "term", "metric"),
    "old_logprobs": ("given", "none"),
    "normalizer": ("none", "number", "tensor"),
}
FLAT: dict[str, tuple[str, ...]] = {
    **HEAD,
    "mask": ("none", "some", "all of a trajectory"),
    "rows": ("own", "shared", "some, turned"),
    "sampling_support": GIVEN,
    "workspace": ("13 rows", "64 rows"),
    "batch_invariant": ("no", "yes"),
    "kind": tuple(KINDS),
    "ratio_level": ("own", "token", "sequence"),
    **LOSS,
    "advantages": ("a trajectory", "a token", "half zero"),
    "with_logprobs": ("no", "yes"),
}
TREE: dict[str, tuple[str, ...]] = {
    **HEAD,
    "tree": ("regular", "comb", "star", "forest", "chain", "no tokens", "no nodes"),
    "mask": ("none", "some", "all of a node"),
    "workspace": ("3 rows", "13 rows"),
    "kind": tuple(name for name, kind in KINDS.items() if kind.in_tree),
    "ratio_level": ("token", "sequence"),
    **LOSS,
    "advantages": ("signed", "half zero", "zero"),
    "gate": GIVEN,
}
_RANKING = tuple(name for name, kind in KINDS.items() if kind.selects)
FLAT_REFUSED: dict[Pair, str] = {
    pair("workspace", "13 rows", "batch_invariant", "yes"): "workspace_bytes must hold the 64 rows",
    **{pair("kind", kind, "ratio_level", "sequence"): "ratio_level must be 'token' for kind" for kind in _RANKING},
    **{
        pair("kind", kind, "sampler_correction", "sequence_mask"): "sampler_correction must not be 'sequence_mask'"
        for kind in _RANKING
    },
}
TREE_REFUSED: dict[Pair, str] = {
    pair("ratio_level", "sequence", "kl", "k3_corrected"): "branch must come with a loss that sums over the leaves",
    **{
        pair("kind", name, "ratio_level", "sequence"): "branch must come with a loss that sums over the leaves"
        for name, kind in KINDS.items()
        if kind.in_tree == ("token",)
    },
}
TOKENS, WIDTH, VOCABULARY = 130, 8, 33
# far from the bounds of every clip and mask, across which 16 bits would otherwise round a token
LOG_RATIOS, LOG_WEIGHTS = (-0.6, -0.1, 0.1, 0.6, 1.4), (-1.2, -0.2, 0.2, 1.2)


def problem(options: dict[str, str], seed: int = 0, tokens: int = TOKENS) -> tuple[OpSpec, Inputs]:
    """The op with the gradients that are asked for, and its arguments; of a flat batch, ``tokens`` of them."""
    wanted = {"all": ("hidden", "weight", "bias"), "hidden": ("hidden",), "weight and bias": ("weight", "bias")}
    dtype, terms = getattr(torch, options["dtype"]), 16.0 * 4.0  # logits, and ratios that multiply their error
    if options["logits_dtype"] == "own" and dtype.itemsize == 2:
        terms *= torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    spec = dataclasses.replace(
        LINEAR_POLICY_LOSS,
        differentiable=wanted[options["gradients"]],
        term_scale=dict.fromkeys(LINEAR_POLICY_LOSS.term_scale, terms),
    )
    case = Case("pairs", lambda g: _arguments(options, g, tokens), "a combination of options")
    return spec, spec.inputs(case, dtype, seed=seed)


def _arguments(options: dict[str, str], g: torch.Generator, tokens: int) -> Inputs:
    inputs, cuts = _of_tree(options, g) if "tree" in options else of_batch(options, g, tokens)
    config = config_of(options)
    pairs = inputs["targets"].shape[0]
    known = {k: v for k, v in inputs.items() if k not in ("advantages", "branch", "workspace_bytes", "batch_invariant")}
    now = linear_logprobs(**known | {"logits_dtype": torch.float64})
    old = now - chosen(LOG_RATIOS, pairs, g)
    inputs |= {"old_logprobs": old if options["old_logprobs"] == "given" else None, "config": config}
    inputs["cu_seqlens"] = cuts
    if config.kl_coef:
        inputs["ref_logprobs"] = old + 0.2 * randn(g, pairs)
    if config.sampler_correction != "none":
        before = old if options["old_logprobs"] == "given" else now
        inputs["sampler_logprobs"] = before - chosen(LOG_WEIGHTS, pairs, g)
    normalizers = {"none": None, "number": 57.5, "tensor": torch.tensor([57.5])}
    inputs["normalizer"] = normalizers[options["normalizer"]]
    inputs["with_entropy"] = options["entropy"] == "metric"
    inputs["with_logprobs"] = options.get("with_logprobs") == "yes"
    return inputs


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def chosen(values: tuple[float, ...], count: int, g: torch.Generator) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[torch.randint(len(values), (count,), generator=g)]


def config_of(options: dict[str, str]) -> PolicyLoss:
    level, aggregate, kl = options["ratio_level"], options["aggregate"], options["kl"]
    return PolicyLoss(
        options["kind"],
        clip_high=float(options["clip_high"]),
        clip_dual=3.0 if options["clip_dual"] == "given" else None,
        ratio_level=None if level == "own" else level,
        aggregate=None if aggregate == "own" else aggregate,
        kl="k3" if kl == "none" else kl,
        kl_coef=0.0 if kl == "none" else 0.1,
        entropy_coef=0.05 if options["entropy"] == "term" else 0.0,
        sampler_correction=options["sampler_correction"],
        max_length=40,
        cov_fraction=0.2,
        cov_low=-1.0,
        cov_high=0.7,
    )


def _head(options: dict[str, str], tokens: int, g: torch.Generator) -> Inputs:
    """The head's arguments but the targets and what goes with them."""
    inputs = {"hidden": randn(g, tokens, WIDTH), "weight": randn(g, VOCABULARY, WIDTH) * (2 / WIDTH**0.5)}
    if options["bias"] == "given":
        inputs["bias"] = randn(g, VOCABULARY)
    rows = torch.rand(tokens, generator=g, dtype=torch.float64) + 0.6
    scalars = {"1": 1.0, "number": 0.7, "rows": rows}
    own = options["logits_dtype"] == "own"
    logits_dtype = getattr(torch, options["dtype"]) if own else torch.float32
    size = 8 if options["dtype"] == "float64" else logits_dtype.itemsize
    return inputs | {
        "temperature": scalars[options["temperature"]],
        "softcap": 6.0 if options["softcap"] == "given" else None,
        "logit_scale": 1.3 if options["logit_scale"] == "given" else 1.0,
        "logits_dtype": logits_dtype,
        "workspace_bytes": int(options["workspace"].split()[0]) * VOCABULARY * size,
    }


def of_batch(options: dict[str, str], g: torch.Generator, tokens: int) -> tuple[Inputs, Tensor]:
    inputs = _head(options, tokens, g)
    pairs = tokens * 3 // 4 if options["rows"] == "some, turned" else tokens
    cuts = torch.tensor([0, 7, 7, pairs // 3, pairs // 2, pairs])
    targets = torch.randint(VOCABULARY, (pairs,), generator=g)
    inputs |= {"targets": targets, "batch_invariant": options["batch_invariant"] == "yes"}
    if options["rows"] == "shared":
        inputs["rows"] = torch.randint(tokens * 5 // 6, (pairs,), generator=g)
    elif options["rows"] != "own":
        inputs["rows"] = torch.randperm(tokens, generator=g)[:pairs]
    if options["mask"] != "none":
        inputs["mask"] = torch.rand(pairs, generator=g) < 0.85
    if options["mask"] == "all of a trajectory":
        inputs["mask"][cuts[2] : cuts[3]] = False
    if options["sampling_support"] == "given":
        kept = torch.rand(pairs, VOCABULARY, generator=g) < 0.4
        kept[torch.arange(pairs), targets] = True
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)))
        inputs["sampling_support"] = kept.nonzero()[:, 1], offsets
    advantages = randn(g, pairs if options["advantages"] == "a token" else len(cuts) - 1)
    if options["advantages"] == "half zero":
        advantages[::2] = 0
    return inputs | {"advantages": advantages}, cuts


def _tree(name: str, g: torch.Generator) -> Tree:
    trees = {
        "regular": lambda: regular_tree(4, 3, 2),
        "comb": lambda: comb(14),
        "star": lambda: star(40),
        "forest": lambda: random_tree(g, 30),
        "chain": lambda: chain(30),
        "no tokens": lambda: Tree(torch.tensor([-1, 0, 0]), torch.zeros(3, dtype=torch.int64)),
        "no nodes": lambda: chain(0),
    }
    return trees[name]()


def _of_tree(options: dict[str, str], g: torch.Generator) -> tuple[Inputs, Tensor]:
    tree = _tree(options["tree"], g)
    inputs = _head(options, tree.num_tokens, g)
    pairs = tree.pairs(torch.randint(VOCABULARY, (tree.num_tokens,), generator=g))
    inputs |= {"targets": pairs.targets, "rows": pairs.rows}
    count, bounds = pairs.targets.shape[0], pairs.cu_seqlens
    if options["mask"] != "none":
        inputs["mask"] = torch.rand(count, generator=g) < 0.8
    if options["mask"] == "all of a node" and tree.num_nodes:
        inputs["mask"][bounds[0] : bounds[1]] = False
    advantages = randn(g, tree.num_leaves)
    if options["advantages"] == "half zero":
        advantages[::2] = 0
    elif options["advantages"] == "zero":
        advantages.zero_()
    gate = torch.arange(tree.num_leaves) % 3 > 0 if options["gate"] == "given" else None
    return inputs | {"advantages": None, "branch": Paths(tree, advantages, gate)}, bounds
