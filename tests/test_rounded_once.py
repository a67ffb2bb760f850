"""Outputs of the CPU's kernels that are found in float64 and rounded once.

A rounding more is within every budget, which torch's own error makes, and shows here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trajkern as tk
from trajkern._ext import CPU_BUILT
from trajkern.testing import spec_of
from trajkern.testing.numerics import oracle

pytestmark = pytest.mark.skipif(not CPU_BUILT, reason="the reference rounds every step")
ONCE = {
    "discounted_returns": ("returns",),
    "gae": ("advantages",),
    "whiten": ("whitened",),
    "variance_weights": ("weights",),
    "reflection_rewards": ("rewards", "weights", "std", "group_score"),
    "span_reduce": ("reduced",),
    "subtree_reduce": ("reduced",),
    "sibling_advantages": ("advantages",),
    "branch_coefficients": ("positive", "negative"),
}
LEAST = 0.99  # of the numbers: the oracle itself errs in the last bits of float64, which decides a tie


def rounded_once(name: str, function: Callable[..., Any]) -> dict[str, float]:
    """The share of each output's numbers that are the float64 reference's, rounded to float32."""
    spec, same, count = spec_of(name), dict.fromkeys(ONCE[name], 0), dict.fromkeys(ONCE[name], 0)
    for case in spec.cases:
        if case.large:
            continue
        inputs = spec.inputs(case, torch.float32)
        high, _ = oracle(spec, inputs)
        found = spec.outputs(function(**inputs))
        for output in ONCE[name]:
            expected = high[output].float()
            counted = expected.isfinite() & (expected != 0)
            same[output] += int((found[output].detach() == expected)[counted].sum())
            count[output] += int(counted.sum())
    return {output: same[output] / count[output] for output in ONCE[name]}


@pytest.mark.parametrize("name", ONCE)
def test_an_output_is_rounded_once(name: str) -> None:
    shares = rounded_once(name, getattr(tk, name))
    assert min(shares.values()) >= LEAST, shares


def test_one_rounding_more_is_seen() -> None:
    def coarse(**inputs: Any) -> torch.Tensor:
        return tk.whiten(**inputs) * 3 / 3

    assert rounded_once("whiten", coarse)["whitened"] < 0.9
