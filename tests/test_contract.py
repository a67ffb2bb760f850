"""What PyTorch expects of an op: schema, fake, strides, dtypes, and gradients that can be taken or refused."""

from __future__ import annotations

import functools

import pytest
import torch

import trajkern as tk
from trajkern.testing import SPECS, run


def _record(spec, inputs):
    """Every torch.ops.trajkern call that the public function and its backward make."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "trajkern":
                calls.append((func, [a.clone() if isinstance(a, torch.Tensor) else a for a in args]))
            return func(*args, **(kwargs or {}))

    with Recorder():
        run(spec, getattr(tk, spec.name), inputs)
    return calls


def test_opcheck(spec, monkeypatch: pytest.MonkeyPatch) -> None:
    nan_is_nan = functools.partial(torch.testing.assert_close, equal_nan=True)  # a metric that is not computed
    monkeypatch.setattr(torch.testing, "assert_close", nan_is_nan)
    seen = set()
    for case in spec.cases:
        if case.large:
            continue
        for func, args in _record(spec, spec.inputs(case, torch.float32)):
            signature = (func, tuple(type(a) for a in args), tuple(getattr(a, "ndim", None) for a in args))
            if signature not in seen:
                seen.add(signature)
                torch.library.opcheck(func, tuple(args))
    assert seen, "the public function called no op"


def test_every_op_is_reached() -> None:
    """No op without a spec that exercises it, the in-place twin of the logits' backward apart."""
    reached = {"trajkern::token_stats_backward_"}
    for spec in SPECS:
        for case in (case for case in spec.cases if not case.large):
            calls = _record(spec, spec.inputs(case, torch.float32))
            reached |= {func.name().split(".")[0] for func, _ in calls}
    ops = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("trajkern::")}
    assert reached == {n for n in ops if not n.endswith("_in_graph")}, (
        "those are called by graphs: tests/test_compile.py"
    )


@pytest.mark.usefixtures("poison")
def test_result_dtype(spec, dtype, device) -> None:
    outcome = run(spec, getattr(tk, spec.name), inputs := spec.inputs(spec.cases[0], dtype, device))
    for name, x in outcome.items():
        if name.startswith("grad_"):
            assert x.dtype == inputs[name.removeprefix("grad_")].dtype
        elif x.is_floating_point():
            assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_no_gradient_asked(spec, device) -> None:
    with torch.no_grad():
        result = spec.outputs(getattr(tk, spec.name)(**spec.inputs(spec.cases[0], torch.float32, device)))
    assert not any(x.requires_grad for x in result.values())


def test_inputs_are_not_written(spec, case, device) -> None:
    inputs = spec.inputs(case, torch.float32, device)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    run(spec, getattr(tk, spec.name), inputs)
    for name, x in before.items():
        assert torch.equal(x.nan_to_num(9.0), inputs[name].detach().nan_to_num(9.0)), name


def test_zero_coefficients_save_and_read_nothing() -> None:
    """kl_coef 0: ref_logprobs is not read; entropy_coef 0: no gradient is formed for it."""
    args = (torch.randn(4, requires_grad=True), torch.randn(4), torch.ones(1), torch.tensor([0, 4]))
    poisoned = torch.full((4,), torch.nan)
    loss, metrics = tk.policy_loss(*args, config=tk.PolicyLoss(), ref_logprobs=poisoned, sampler_logprobs=poisoned)
    assert loss.isfinite() and metrics["kl"].isnan()
