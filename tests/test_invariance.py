"""The same bits: from run to run, for any number of threads, and whatever else is in the batch.

The scalar loss and the metrics, sums over the whole batch, are promised from run to run and over threads only.
"""

from __future__ import annotations

import pytest
import torch

import trajkern as tk
from trajkern.testing import budget_share, oracle, run
from trajkern.testing.validation import dependent, differing

pytestmark = pytest.mark.usefixtures("backend", "poison")


def _call(spec, inputs):
    return run(spec, getattr(tk, spec.name), inputs)


def _assert_same_bits(left, right) -> None:
    assert left.keys() == right.keys()
    assert not (name := differing(left, right)), f"{name} differs"


@pytest.mark.first_dtype
def test_twice(spec, case, dtype, device) -> None:
    inputs = spec.inputs(case, dtype, device)
    _assert_same_bits(_call(spec, inputs), _call(spec, inputs))


@pytest.mark.on_threads
def test_threads(spec, case, dtype) -> None:
    inputs = spec.inputs(case, dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _call(spec, inputs)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            _assert_same_bits(alone, _call(spec, inputs))
    finally:
        torch.set_num_threads(before)


def test_packing_and_order(spec, case, device) -> None:
    dependence = dependent(spec, getattr(tk, spec.name), spec.inputs(case, spec.dtypes[0], device))
    assert not dependence, dependence


def test_scalar_outputs_permuted_stay_in_budget(device) -> None:
    from trajkern.testing.policy_loss import POLICY_LOSS as spec

    case = next(c for c in spec.cases if c.name == "dapo_full")
    inputs = spec.inputs(case, torch.float32, device)
    turned, _ = spec.variants[0].apply(inputs, torch.Generator())
    high, low = oracle(spec, inputs)
    loss = tk.policy_loss(**turned)[0]
    assert budget_share(spec, "loss", loss, high["loss"], low["loss"]) <= 1
