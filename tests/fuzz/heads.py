"""The ops of hidden states and a vocabulary's weight: over several blocks of rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.problem import Factors, Options, Problem, Target, Undecided, given, laid_out, of_case, randn, some
from trajkern import reference
from trajkern.testing.divergence import LINEAR_DIVERGENCE
from trajkern.testing.head import LINEAR_LOGPROBS, LINEAR_TOKEN_STATS, STATS
from trajkern.testing.numerics import cast
from trajkern.testing.option_pairs import (
    FLAT,
    FLAT_REFUSED,
    GIVEN,
    HEAD,
    TREE,
    TREE_REFUSED,
    VOCABULARY,
    WIDTH,
    of_batch,
    problem,
)
from trajkern.testing.registry import Inputs, OpSpec, Variant
from trajkern.testing.topk import LINEAR_TOPK

LUCK = 4.0  # share of the budget that passes where torch's own error happens to be small
GRADIENTS = {"all": ("hidden", "weight", "bias"), "hidden": ("hidden",), "weight and bias": ("weight", "bias")}
FEW, MANY = 32, 130  # tokens: the least that a batch of all shapes has, and several blocks
OUTPUTS = {"entropy": ("entropy",), "all": STATS, "none": ()}
_LAYOUT: Factors = {"layout": ("whole", "strided", "offset"), "integers": ("int64", "int32")}
_ROWS = ("mask", "rows", "sampling_support", "workspace", "batch_invariant")
_OF_HEAD: Factors = {"tokens": (FEW, MANY), **HEAD, **{name: FLAT[name] for name in _ROWS}, **_LAYOUT}


def _with_gradients(spec: OpSpec, options: Options) -> OpSpec:
    """Of what is asked for; an error of logits in 16 bits is one of their terms."""
    terms = {}
    if options.get("logits_dtype") == "own" and options["dtype"] in ("float16", "bfloat16"):
        step = torch.finfo(getattr(torch, options["dtype"])).eps / torch.finfo(torch.float32).eps
        terms = dict.fromkeys(("logprobs", "entropy", "sum_sq_probs", "mean_logit"), 16.0 * step)
    return dataclasses.replace(spec, differentiable=GRADIENTS[options["gradients"]], term_scale=terms)


def _of_rows(spec: OpSpec, options: Options, seed: int) -> Problem:
    def make(g: torch.Generator) -> Inputs:
        inputs, _ = of_batch(options | {"advantages": "a trajectory"}, g, options["tokens"])
        del inputs["advantages"]
        if "outputs" in options:
            inputs["outputs"] = OUTPUTS[options["outputs"]]
        return inputs

    return Problem(_with_gradients(spec, options), of_case(spec, options, seed, make), luck=LUCK)


def _linear_topk(options: Options, seed: int) -> Problem:
    def make(g: torch.Generator) -> Inputs:
        inputs, _ = of_batch(options | {"advantages": "a trajectory", "sampling_support": "none"}, g, options["tokens"])
        for name in ("advantages", "logits_dtype"):
            del inputs[name]
        targets = inputs.pop("targets")
        if options["targets"] == "several":
            inputs["targets"] = torch.stack((targets, targets, (targets + 1) % VOCABULARY), 1)
        elif options["targets"] == "one":
            inputs["targets"] = targets
        if options["values"] == "whole numbers":  # of which the products are exact, and many equal
            inputs |= {"hidden": inputs["hidden"].sign(), "weight": inputs["weight"].sign()}
            inputs |= {"bias": inputs["bias"].round()} if "bias" in inputs else {}
        if inputs["batch_invariant"]:
            inputs["workspace_bytes"] = None
        return inputs | {"k": options["k"]}

    inputs = of_case(LINEAR_TOPK, options, seed, make)
    bends = options["softcap"] == "given" or options["temperature"] != "1" or options["logit_scale"] != "1"
    if options["values"] == "random" or bends:
        _refuse_ties(inputs)
    return Problem(_with_gradients(LINEAR_TOPK, options), inputs, luck=LUCK)


def _refuse_ties(inputs: Inputs) -> None:
    """Undecided where two of the likeliest tokens are so close that float32 may take either."""
    known = {name: x for name, x in inputs.items() if name not in ("targets", "workspace_bytes", "batch_invariant")}
    found = reference.linear_topk(**cast(known | {"k": min(inputs["k"] + 1, VOCABULARY)}, torch.float64))
    read = found.logprobs if inputs.get("mask") is None else found.logprobs[inputs["mask"]]
    if read.numel() and bool((read.diff(dim=-1).abs() < 3e-6).any()):
        raise Undecided


def _linear_divergence(options: Options, seed: int) -> Problem:
    padding, rows = {"none": (0, 0), "both": (5, 2)}[options["vocabulary"]], options["tokens"]

    def make(g: torch.Generator) -> Inputs:
        inputs: dict[str, Any] = {"beta": options["beta"], "temperature": options["temperature"]}
        for prefix, width, more in (("", WIDTH, padding[0]), ("teacher_", WIDTH + 3, padding[1])):
            inputs[f"{prefix}hidden"] = randn(g, rows, width)
            inputs[f"{prefix}weight"] = randn(g, VOCABULARY + more, width) * (2 / width**0.5)
            if options[f"{prefix}bias"] == "given":
                inputs[f"{prefix}bias"] = randn(g, VOCABULARY + more)
            inputs |= given(**{f"{prefix}softcap": 5.0 if options[f"{prefix}softcap"] == "given" else None})
            inputs[f"{prefix}logit_scale"] = options[f"{prefix}logit_scale"]
        inputs |= given(vocabulary=VOCABULARY if options["vocabulary"] == "both" else None)
        inputs |= given(mask=some(g, (rows,), options["mask"]))
        size = 8 if options["dtype"] == "float64" else 4
        if options["workspace"] == "13 rows" and options["batch_invariant"] == "no":
            inputs["workspace_bytes"] = 13 * 2 * (VOCABULARY + 5) * size
        return inputs | {"batch_invariant": options["batch_invariant"] == "yes"}

    inputs = of_case(LINEAR_DIVERGENCE, options, seed, make)
    return Problem(_with_gradients(LINEAR_DIVERGENCE, options), inputs, luck=LUCK)


def _linear_policy_loss(options: Options, seed: int) -> Problem:
    spec, inputs = problem(options, seed, options.get("tokens", MANY))
    return Problem(spec, {name: laid_out(x, options) for name, x in inputs.items()}, luck=LUCK)


def _some_rows_turned(inputs: Inputs, g: torch.Generator) -> Any:
    """Every third pair, the last first, alone: promised of batch-invariant calls alone."""
    rows = inputs.get("rows")
    of_pairs = inputs["hidden"] if rows is None else rows
    count, part = of_pairs.shape[0], dict(inputs)
    pairs = torch.arange(count)[::3].flip(0)
    named = ["targets", "mask", "rows"] if rows is not None else ["targets", "mask", "hidden", "teacher_hidden"]
    if rows is None and isinstance(inputs.get("temperature"), Tensor):
        named.append("temperature")
    part |= {name: inputs[name][pairs] for name in named if inputs.get(name) is not None}
    if inputs.get("sampling_support") is not None:
        ids, offsets = inputs["sampling_support"]
        sets = [ids[offsets[i] : offsets[i + 1]] for i in pairs.tolist()]
        part["sampling_support"] = torch.cat(sets), torch.tensor([0, *map(len, sets)]).cumsum(0)

    def undo(name: str, x: Tensor) -> Tensor:
        if name == "grad_hidden" and rows is not None:
            return x[:0]  # a state's other pairs are not there
        return x[pairs] if x.shape[0] == count else x

    return part, undo


_TURNED = (Variant("some_rows_turned", _some_rows_turned),)
_DIVERGED: Factors = {
    "dtype": FLAT["dtype"],
    "gradients": tuple(GRADIENTS),
    "tokens": (5, MANY),
    "beta": (0.0, 1.0, 0.3, 0.001),
    "temperature": (1.0, 0.7),
    **{f"{prefix}{name}": GIVEN for prefix in ("", "teacher_") for name in ("bias", "softcap")},
    **{f"{prefix}logit_scale": (1.0, 1.3, -0.8) for prefix in ("", "teacher_")},
    "vocabulary": ("none", "both"),
    "mask": ("none", "some", "nothing"),
    "workspace": ("own", "13 rows"),
    "batch_invariant": ("no", "yes"),
    **_LAYOUT,
}
_LISTED = {name: values for name, values in _OF_HEAD.items() if name not in ("logits_dtype", "sampling_support")}
TARGETS = {
    "linear_logprobs": Target(_OF_HEAD, lambda o, s: _of_rows(LINEAR_LOGPROBS, o, s), FLAT_REFUSED, _TURNED),
    "linear_token_stats": Target(
        _OF_HEAD | {"outputs": tuple(OUTPUTS)},
        lambda o, s: _of_rows(LINEAR_TOKEN_STATS, o, s),
        FLAT_REFUSED,
        _TURNED,
    ),
    "linear_topk": Target(
        _LISTED
        | {
            "values": ("random", "whole numbers"),
            "k": (1, 5, VOCABULARY - 1, VOCABULARY),
            "targets": ("none", "one", "several"),
        },
        lambda o, s: _linear_topk(o | {"logits_dtype": "float32"}, s),
        (),
        _TURNED,
    ),
    "linear_divergence": Target(_DIVERGED, _linear_divergence, (), _TURNED),
    "linear_policy_loss": Target({"tokens": (FEW, MANY), **FLAT, **_LAYOUT}, _linear_policy_loss, FLAT_REFUSED),
    "linear_policy_loss on a tree": Target({**TREE, **_LAYOUT}, _linear_policy_loss, TREE_REFUSED),
}
