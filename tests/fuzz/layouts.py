"""The ops of spans and trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.problem import Factors, Options, Problem, Target, of_case, randn, terms_of
from trajkern.layouts.batch import PackedBatch
from trajkern.layouts.spans import Spans
from trajkern.layouts.tree import Tree
from trajkern.ops import span, tree
from trajkern.testing.registry import Inputs, OpSpec
from trajkern.testing.span import SPAN_REDUCE, SPREAD, no_spans, random_spans, whole
from trajkern.testing.tree import (
    BRANCH_COEFFICIENTS,
    SIBLING_ADVANTAGES,
    SUBTREE_REDUCE,
    chain,
    comb,
    joined,
    random_tree,
    regular_tree,
    star,
)

DTYPES = ("float32", "float64")
SPANS: dict[str, Callable[[torch.Generator], Spans]] = {
    "one token": lambda g: whole(1),
    "seven": lambda g: random_spans(g, 7),
    "sixty": lambda g: random_spans(g, 60),
    "short": lambda g: random_spans(g, 60, 3),
    "none": lambda g: no_spans(9),
    "empty": lambda g: whole(0),
    "long": lambda g: whole(5001),
    "many": lambda g: random_spans(g, 1500),
}
TREES: dict[str, Callable[[torch.Generator], Tree]] = {
    "one node": lambda g: chain(1),
    "star of 3": lambda g: star(3),
    "random 9": lambda g: random_tree(g, 9, 2),
    "regular": lambda g: regular_tree(4, 3),
    "random 90": lambda g: random_tree(g, 90),
    "comb": lambda g: comb(40),
    "chain": lambda g: chain(40),
    "no nodes": lambda g: chain(0),
    "roots": lambda g: joined([chain(1)] * 5),
    "segments": lambda g: joined([star(9), star(63), star(130)]),
    "random 2000": lambda g: random_tree(g, 2000, 20, 200),
}


def _batch(g: torch.Generator) -> PackedBatch:
    cuts = torch.tensor([0, 4, 4, 5, 38])
    return PackedBatch(torch.arange(38), cuts, torch.zeros(38, dtype=torch.bool), torch.tensor([0, 0, 1, 1]))


def _values(options: Options, g: torch.Generator, count: int) -> Tensor:
    x = randn(g, count)
    kinds = {"random": x, "equal": x.round(), "large": x + 1e4, "constant": x * 0 + 0.1}
    if options["values"] == "nan":
        return torch.where(torch.rand(count, generator=g) < 0.05, torch.nan, x)
    return kinds[options["values"]]


def _span_reduce(options: Options, seed: int) -> Problem:
    def make(g: torch.Generator) -> Inputs:
        spans = SPANS[options["spans"]](g)
        x = _values(options, g, spans.num_tokens)
        return {"x": torch.where(spans.token_span < 0, torch.nan, x), "spans": spans, "op": options["op"]}

    return Problem(SPAN_REDUCE, of_case(SPAN_REDUCE, options, seed, make))


def _spread(options: Options, seed: int) -> Problem:
    def make(g: torch.Generator) -> Inputs:
        kind, _, name = options["of"].partition(": ")
        if kind == "batch":
            layout: Any = _batch(g)
            return {"values": randn(g, layout.num_trajectories), "layout": layout}
        layout = SPANS[name](g) if kind == "spans" else TREES[name](g)
        return {"values": randn(g, len(layout) if kind == "spans" else layout.num_nodes), "layout": layout}

    return Problem(SPREAD, of_case(SPREAD, options, seed, make))


def _of_tree(spec: OpSpec, value: str, options: Options, seed: int) -> Problem:
    def make(g: torch.Generator) -> Inputs:
        forest = TREES[options["tree"]](g)
        count = forest.num_nodes if value == "node_values" else forest.num_leaves
        own = ("op", "baseline", "scale", "ddof", "eps", "singleton")
        inputs = {value: _values(options, g, count), "tree": forest} | {k: options[k] for k in own if k in options}
        if options.get("leaf_weights") == "given":
            inputs["leaf_weights"] = torch.rand(count, generator=g, dtype=torch.float64).sub(0.3).relu()
        return inputs

    inputs = of_case(spec, options, seed, make)
    if options.get("scale") == "std":
        parent = inputs["tree"].parent.long()
        spec = dataclasses.replace(spec, oracle_term=terms_of(inputs, inputs["node_values"], parent, parent >= 0))
    return Problem(spec, inputs)


_LAYOUT: Factors = {"layout": ("whole", "strided", "offset")}
_OF_TREE: Factors = {"dtype": DTYPES, "tree": tuple(TREES), "values": ("random", "equal", "large", "constant")}
TARGETS = {
    "span_reduce": Target(
        {"dtype": DTYPES, "op": span.REDUCTIONS, "spans": tuple(SPANS), "values": ("random", "equal", "large", "nan")}
        | _LAYOUT,
        _span_reduce,
    ),
    "spread": Target(
        {
            "dtype": DTYPES,
            "of": (*(f"spans: {name}" for name in SPANS), *(f"tree: {name}" for name in TREES), "batch"),
            **_LAYOUT,
        },
        _spread,
    ),
    "subtree_reduce": Target(
        _OF_TREE | {"op": tree.REDUCTIONS} | _LAYOUT, lambda o, seed: _of_tree(SUBTREE_REDUCE, "leaf_values", o, seed)
    ),
    "sibling_advantages": Target(
        _OF_TREE
        | {
            "baseline": ("mean", "leave_one_out", "parent", "none"),
            "scale": ("std", "none"),
            "ddof": (1, 0),
            "eps": (1e-6, 0.0, 1e-2),
            "singleton": ("raw", "zero"),
            **_LAYOUT,
        },
        lambda o, seed: _of_tree(SIBLING_ADVANTAGES, "node_values", o, seed),
    ),
    "branch_coefficients": Target(
        _OF_TREE | {"leaf_weights": ("none", "given")} | _LAYOUT,
        lambda o, seed: _of_tree(BRANCH_COEFFICIENTS, "leaf_advantages", o, seed),
    ),
}
