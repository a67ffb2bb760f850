"""The ops of given logits and of given log-probs."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from tests.fuzz.problem import LAID_OUT, Factors, Options, Problem, Target, given, of_case, randn, some
from trajkern.testing.divergence import LINEAR_DIVERGENCE
from trajkern.testing.logprob import TOKEN_LOGPROBS, TOKEN_STATS
from trajkern.testing.registry import Inputs, OpSpec

DTYPES = ("float32", "bfloat16", "float16", "float64")
ROWS = {"1": (1,), "none": (0,), "5": (5,), "2 x 3": (2, 3), "40": (40,), "130": (130,)}
OUTPUTS = {
    "entropy": ("entropy",),
    "all": ("entropy", "sum_sq_probs", "is_top1"),
    "no entropy": ("is_top1", "sum_sq_probs"),
    "none": (),
}
FACTORS: Factors = {
    "dtype": DTYPES,
    "rows": tuple(ROWS),
    "vocabulary": (2, 1, 7, 33, 257, 1025, 5003),
    "temperature": ("1", "number", "rows"),
    "mask": ("none", "some", "nothing"),
    "scale": (3.0, 1e-3, 30.0),
    "offset": (0.0, -1e4, 1e4),
    "values": ("random", "certain", "banned", "equal"),
    **LAID_OUT,
}


def _logits(options: Options, g: torch.Generator) -> Inputs:
    shape, vocabulary = ROWS[options["rows"]], options["vocabulary"]
    logits = randn(g, *shape, vocabulary) * options["scale"] + options["offset"]
    targets = torch.randint(vocabulary, shape, generator=g)
    if options["values"] == "certain":
        margin = 8.0 if options["temperature"] == "rows" else 20.0  # float64 rounds p to 1 beyond 36 nats
        logits.fill_(0).scatter_(-1, targets[..., None], margin)
    elif options["values"] == "equal":
        logits.fill_(options["offset"])
    elif options["values"] == "banned":
        targets = targets // 2 * 2
        logits[..., 1::2] = -torch.inf
    rows = torch.rand(shape, generator=g, dtype=torch.float64) * 2 + 0.25
    mask = some(g, shape, options["mask"])
    if mask is not None:
        logits[~mask] = torch.nan
        targets[~mask] = -100
    temperature = {"1": None, "number": 0.6, "rows": rows}[options["temperature"]]
    chosen = OUTPUTS[options["outputs"]] if "outputs" in options else None
    return {"logits": logits, "targets": targets} | given(temperature=temperature, mask=mask, outputs=chosen)


def _of_logits(spec: OpSpec, options: Options, seed: int) -> Problem:
    inputs = of_case(spec, options, seed, lambda g: _logits(options, g))
    return Problem(spec, inputs)


def token_logprobs(options: Options, seed: int) -> Problem:
    return _of_logits(TOKEN_LOGPROBS, options, seed)


def token_stats(options: Options, seed: int) -> Problem:
    return _of_logits(TOKEN_STATS, options, seed)


TOPK_DIVERGENCE = dataclasses.replace(
    LINEAR_DIVERGENCE,
    name="topk_divergence",
    differentiable=("student_logprobs",),
    typed=("student_logprobs", "teacher_logprobs"),
    orders=(),
)


def _known(options: Options, g: torch.Generator) -> Inputs:
    """Log-probs of some ids that leave a part of each distribution to the others."""
    rows, count = options["rows"], options["ids"]

    def logprobs(share: float) -> Tensor:
        return (randn(g, rows, count) * options["scale"]).log_softmax(-1) + math.log(share)

    student, teacher = logprobs(0.9), logprobs(0.6)
    ids = None
    if options["repeated"] == "yes":
        ids = torch.randint(1000, (rows, count), generator=g)
        ids[:, 1:2] = ids[:, :1]
    mask = some(g, (rows,), options["mask"])
    return {"student_logprobs": student, "teacher_logprobs": teacher, "beta": options["beta"]} | given(
        ids=ids, mask=mask
    )


def topk_divergence(options: Options, seed: int) -> Problem:
    return Problem(TOPK_DIVERGENCE, of_case(TOPK_DIVERGENCE, options, seed, lambda g: _known(options, g)))


TARGETS = {
    "token_logprobs": Target(FACTORS, token_logprobs),
    "token_stats": Target(FACTORS | {"outputs": tuple(OUTPUTS)}, token_stats),
    "topk_divergence": Target(
        {
            "dtype": DTYPES,
            "rows": (1, 0, 5, 70),
            "ids": (1, 2, 9),
            "beta": (0.0, 1.0, 0.3, 0.999),
            "scale": (1.0, 6.0),
            "repeated": ("no", "yes"),
            "mask": ("none", "some", "nothing"),
            **LAID_OUT,
        },
        topk_divergence,
    ),
}
