"""The policy loss in the head under every pair of its options, over several blocks, against float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trajkern as tk
from trajkern.losses.kinds import KINDS
from trajkern.testing import errors
from trajkern.testing.option_pairs import FLAT, FLAT_REFUSED, TREE, TREE_REFUSED, problem
from trajkern.testing.pairs import all_pairs, covering, held, pair

DESIGNS = {"flat": (FLAT, FLAT_REFUSED), "tree": (TREE, TREE_REFUSED)}
COVERING = {name: covering(*design) for name, design in DESIGNS.items()}
DRAWS = 2  # of other designs and other numbers
LUCK = 4.0  # share of the budget where torch's own error happens to be small; the faults that were took thousands

REFUSED = [
    ({name: values[0] for name, values in factors.items()} | dict(two), message)
    for factors, refused in DESIGNS.values()
    for two, message in refused.items()
] + [
    ({name: values[0] for name, values in TREE.items()} | {"kind": name}, "branch must come with a loss that sums")
    for name, kind in KINDS.items()
    if not kind.in_tree
]

IN_THE_INTERPRETER = """
import trajkern as tk
from trajkern.testing import errors
from trajkern.testing.option_pairs import FLAT, problem
first = {name: values[0] for name, values in FLAT.items()}
for more in (
    {"softcap": "given", "sampling_support": "given", "kl": "k3_corrected", "mask": "some", "dtype": "bfloat16"},
    {"old_logprobs": "none", "sampler_correction": "sequence_mask", "rows": "shared", "kind": "cispo"},
):
    spec, inputs = problem(first | more, tokens=24)
    with tk.use_backend("triton"):
        shares = errors(spec, tk.linear_policy_loss, inputs)
    assert max(shares.values()) <= 1, (more, shares)
"""


def _worst(options: dict[str, str], seed: int = 0) -> tuple[float, str]:
    spec, inputs = problem(options, seed)
    return max((share, name) for name, share in errors(spec, tk.linear_policy_loss, inputs).items())


@pytest.mark.parametrize("design", DESIGNS)
def test_every_pair_is_there(design: str) -> None:
    factors, refused = DESIGNS[design]
    found = set().union(*map(held, COVERING[design]))
    assert found == all_pairs(factors) - refused.keys()
    assert len(COVERING[design]) < 110


def test_a_design_without_a_legal_combination() -> None:
    refused = {pair("a", "1", "b", x) for x in "12"}
    with pytest.raises(ValueError, match="no legal combination holds"):
        covering({"a": "12", "b": "12", "c": "12"}, refused)


@pytest.mark.parametrize(
    "options", [pytest.param(row, id=f"{name}-{i}") for name, rows in COVERING.items() for i, row in enumerate(rows)]
)
@pytest.mark.usefixtures("poison")
def test_within_budget(options: dict[str, str]) -> None:
    share, name = _worst(options)
    assert share <= LUCK, f"{name} is off by {share:.3g} times its budget with {options}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, DRAWS + 1))
@pytest.mark.parametrize("design", DESIGNS)
def test_other_draws(design: str, seed: int) -> None:
    for options in covering(*DESIGNS[design], seed):
        share, name = _worst(options, seed)
        assert share <= LUCK, f"{name} is off by {share:.3g} times its budget with {options}"


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_pairs(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec, inputs = problem(options)
        tk.linear_policy_loss(**inputs)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter() -> None:
    """Triton's kernels, at the pairs where a fault has been."""
    command = [sys.executable, "-c", IN_THE_INTERPRETER]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
