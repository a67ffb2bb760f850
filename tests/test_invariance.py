"""The same bits: from run to run, for any number of threads, and whatever else is in the batch.

The scalar loss and the metrics, sums over the whole batch, are promised from run to run and over threads only.
"""

from __future__ import annotations

import pytest
import torch

import trajkern as tk
from trajkern.testing import budget_share, oracle, run

pytestmark = pytest.mark.usefixtures("backend", "poison")


def _call(spec, inputs):
    return run(spec, getattr(tk, spec.name), inputs)


def _assert_same_bits(left, right) -> None:
    assert left.keys() == right.keys()
    for name, x in left.items():
        assert torch.equal(x.nan_to_num(123.0), right[name].nan_to_num(123.0)), f"{name} differs"


def test_twice(spec, case, dtype, device) -> None:
    inputs = spec.inputs(case, dtype, device)
    _assert_same_bits(_call(spec, inputs), _call(spec, inputs))


def test_threads(spec, case, dtype) -> None:
    if not case.large or not spec.own_sums:
        return  # runs on one thread anyway, or on a library's terms
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


def _upstream_free(spec, inputs):
    """Outputs, and gradients for an upstream of ones (which permutes into itself)."""
    inputs = {
        k: v.detach().requires_grad_() if k in spec.differentiable and isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }
    outputs = spec.outputs(getattr(tk, spec.name)(**inputs))
    total = sum(x.sum() for n, x in outputs.items() if x.requires_grad and n not in spec.no_grad_outputs)
    outcome = {k: v.detach() for k, v in outputs.items() if v.ndim}
    if isinstance(total, torch.Tensor):
        total.backward()
        grads = {f"grad_{k}": inputs[k].grad for k in spec.differentiable if isinstance(inputs.get(k), torch.Tensor)}
        outcome |= {k: g for k, g in grads.items() if g is not None}
    return outcome


def test_packing_and_order(spec, case, device) -> None:
    dtype = spec.dtypes[0]
    inputs = spec.inputs(case, dtype, device)
    if not any(isinstance(v, torch.Tensor) and v.numel() for v in inputs.values()):
        return  # nothing to lay out differently
    for variant in spec.variants:
        other, undo = variant.apply(inputs, torch.Generator().manual_seed(3))
        here = {k: v for k, v in _upstream_free(spec, inputs).items()}
        there = _upstream_free(spec, {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in other.items()})
        for name, x in there.items():
            expected = here[name]
            got = undo(name, x)
            if got.shape != expected.shape:  # the variant keeps a part of the batch
                expected = undo(name, expected)
            same = torch.equal(got.nan_to_num(123.0), expected.nan_to_num(123.0))
            assert same, f"{variant.name}: {name} depends on what else is in the batch"


def test_scalar_outputs_permuted_stay_in_budget(device) -> None:
    from trajkern.testing.policy_loss import POLICY_LOSS as spec

    case = next(c for c in spec.cases if c.name == "dapo_full")
    inputs = spec.inputs(case, torch.float32, device)
    turned, _ = spec.variants[0].apply(inputs, torch.Generator())
    high, low = oracle(spec, inputs)
    loss = tk.policy_loss(**turned)[0]
    assert budget_share(spec, "loss", loss, high["loss"], low["loss"]) <= 1
