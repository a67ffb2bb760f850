"""Reflection rewards: precision under a common offset, what bad input is told, compilation, and the Triton kernels' way
with references that nobody may check."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch

import trajkern as tk
from trajkern import reference

NAN, INF = math.nan, math.inf
META = torch.device("meta")
CU, IDS = torch.tensor([0, 2, 2, 4]), torch.tensor([7, -3, 7])  # group -3 has an empty reference


@pytest.fixture(params=["owner", "reference"])
def route(request: pytest.FixtureRequest):
    with tk.use_backend("reference") if request.param == "reference" else contextlib.nullcontext():
        yield request.param


def good(function: str) -> dict:
    x = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    extra = {"baseline": x - 1} if function == "reflection_rewards" else {}
    return {"logprobs": x, "cu_seqlens": CU, "group_ids": IDS, **extra}


FLOATS, INTEGERS = r"dtype float32, .*; got ", r"dtype int64, int32; got "
BAD = [
    ("logprobs", torch.ones(4).long(), TypeError, FLOATS + r"int64\[4\]"),
    ("logprobs", torch.ones(2, 2), ValueError, r"1 dimension; got float32\[2, 2\]"),
    ("logprobs", torch.tensor([-1.0, NAN, -1.0, -1.0]), ValueError, r"finite; it is nan at index 1"),
    ("logprobs", torch.tensor([-1.0, -1.0, -1.0, -INF]), ValueError, r"finite; it is -inf at index 3"),
    ("cu_seqlens", torch.tensor([0, 3, 2, 4]), ValueError, r"never decrease; it goes from 3 to 2 at index 2"),
    ("cu_seqlens", torch.tensor([1, 2, 2, 4]), ValueError, r"from 0 to the 4 tokens; it runs from 1 to 4"),
    ("cu_seqlens", torch.tensor([0, 2, 2, 400]), ValueError, r"from 0 to the 4 tokens; it runs from 0 to 400"),
    ("cu_seqlens", torch.tensor([0, 2, 2, 4.0]), TypeError, INTEGERS + r"float32\[4\]"),
    ("cu_seqlens", torch.tensor([], dtype=torch.int64), ValueError, r"at least its first 0; it is empty"),
    ("cu_seqlens", torch.tensor([0, 2, 2, 4], device=META), ValueError, r"on cpu .*; got int64\[4\] on meta"),
    ("cu_seqlens", torch.tensor([0, 1, 1, 4]), ValueError, r"equal length; group 7 has lengths \[1, 3\]"),
    ("group_ids", torch.tensor([1.0, 1.0, 2.0]), TypeError, INTEGERS + r"float32\[3\]"),
    ("group_ids", torch.tensor([1, 1]), ValueError, r"shape \[3\] \(one id a rollout\); got int64\[2\]"),
    ("group_ids", torch.tensor([1, 1, 1], device=META), ValueError, r"on cpu .*; got int64\[3\] on meta"),
    ("ddof", 2, ValueError, r"one of 0, 1; got 2"),
    ("ddof", True, ValueError, r"one of 0, 1; got True"),
    ("normalize", 1, TypeError, r"True or False, got 1 \(int\)"),
    ("baseline", torch.ones(3), ValueError, r"shape \[4\] \(one value a token\); got float32\[3\]"),
    ("baseline", torch.ones(4).int(), TypeError, FLOATS + r"int32\[4\]"),
    ("baseline", torch.ones(4, device=META), ValueError, r"on cpu .*; got float32\[4\] on meta"),
    ("baseline", torch.tensor([-1.0, -1.0, INF, -1.0]), ValueError, r"finite; it is inf at index 2"),
]
CALLS = [
    pytest.param(function, *row, id=f"{function}-{row[0]}-{i}")
    for function in ("variance_weights", "reflection_rewards")
    for i, row in enumerate(BAD)
    if row[0] in good(function) or row[0] in ("ddof", "normalize")
]


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize(("function", "name", "value", "error", "text"), CALLS)
def test_bad_input(function: str, name: str, value, error: type[Exception], text: str) -> None:
    getattr(tk, function)(**good(function))
    with pytest.raises(error, match=f"^{name} must .*{text}"):
        getattr(tk, function)(**good(function) | {name: value})


def test_ids_of_every_size_and_sign() -> None:
    """Scores ascend with the id, also where ids differ in every byte."""
    ids = torch.tensor([2**62, -(2**63), 0, 2**62, -1, 2**63 - 1, -1, 300, 2**40 + 5, 300])
    generator = torch.Generator().manual_seed(0)
    x, cu_seqlens = torch.randn(50, generator=generator), torch.arange(0, 51, 5)
    result, expected = (f(x.double(), cu_seqlens, ids) for f in (tk.reflection_rewards, reference.reflection_rewards))
    for actual, numbers in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, numbers, rtol=1e-13, atol=1e-15)
    narrow = torch.tensor([3, 3, -3], dtype=torch.int32)
    assert tk.reflection_rewards(torch.zeros(0), torch.zeros(4, dtype=torch.int32), narrow).group_score.shape == (2,)


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_common_offset_costs_nothing(ddof: int) -> None:
    """Near -10,000 neighbouring float32 are 2^-10 apart: a few such steps come out to the rounding of the result."""
    steps = torch.randint(-3, 4, (4, 40), generator=torch.Generator().manual_seed(1)).double()
    x = (-10_000 + steps / 1024).flatten().float()
    expected = (steps / 1024).std(0, correction=ddof)
    result = tk.reflection_rewards(x, torch.arange(0, 161, 40), torch.zeros(4, dtype=torch.int64), ddof=ddof)
    torch.testing.assert_close(result.std[:40].double(), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(result.weights[:40].double(), expected / expected.sum(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-0.1, -1e4 / 3, -1e-30])
def test_equal_values_are_exactly_zero(dtype: torch.dtype, value: float) -> None:
    x = torch.full((7 * 11,), value, dtype=dtype, requires_grad=True)
    result = tk.reflection_rewards(x, torch.arange(0, 78, 11), torch.zeros(7, dtype=torch.int64))
    assert not any(bool(y.any()) for y in result)
    sum(y.sum() for y in result).backward()
    assert x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("output", ["rewards", "weights", "std", "group_score"])
@pytest.mark.parametrize("frozen", ["logprobs", "baseline", ""])
def test_gradient_of_one_output(output: str, frozen: str) -> None:
    """What has no upstream gradient, or needs none, is left out, and the rest is as the reference has it."""
    generator = torch.Generator().manual_seed(2)
    cu_seqlens, ids = torch.tensor([0, 5, 8, 13, 16, 21]), torch.tensor([4, 1, 4, 1, 4])
    grads = []
    for module in (tk, reference):
        generator.manual_seed(2)
        x, b = (torch.randn(21, generator=generator, dtype=torch.float64) for _ in range(2))
        x.requires_grad_(frozen != "logprobs"), b.requires_grad_(frozen != "baseline")
        y = getattr(module.reflection_rewards(x, cu_seqlens, ids, baseline=b), output)
        if y.requires_grad:
            y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64))
        grads.append([z.new_zeros(21) if z.grad is None else z.grad for z in (x, b)])
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("route")
def test_the_number_of_groups_may_be_given() -> None:
    arguments = good("reflection_rewards")
    groups = int(arguments["group_ids"].unique().numel())
    for plain, given in zip(
        tk.reflection_rewards(**arguments), tk.reflection_rewards(**arguments, num_groups=groups), strict=True
    ):
        assert torch.equal(plain, given)
    rollouts = arguments["group_ids"].numel()
    for wrong in (0, rollouts + 1):
        with pytest.raises(ValueError, match=rf"^num_groups must lie in \[1, {rollouts}\].*got {wrong}"):
            tk.reflection_rewards(**arguments, num_groups=wrong)
    with pytest.raises(ValueError, match=f"^num_groups must be {groups}, .*got {rollouts}"):
        tk.reflection_rewards(**arguments, num_groups=rollouts)
    for wrong in (True, 2.0):
        with pytest.raises(TypeError, match="^num_groups must be an int"):
            tk.reflection_rewards(**arguments, num_groups=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [2, 3])
def test_a_number_of_groups_that_nobody_checked(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a wrong number gives NaN, and the number is not read."""
    arguments = good("reflection_rewards")
    expected = tk.reflection_rewards(**arguments)
    monkeypatch.setattr("trajkern.ops.reflection.readable", lambda x: False)
    found = tk.reflection_rewards(**arguments, num_groups=groups)
    assert found.group_score.isnan().all() if groups == 3 else torch.equal(found.group_score, expected.group_score)
    assert torch.equal(found.rewards, expected.rewards)


def test_compiled_with_a_graph_break_at_the_number_of_groups() -> None:
    torch._dynamo.reset()
    arguments = good("reflection_rewards")
    eager = tk.reflection_rewards(**arguments)
    compiled = torch.compile(tk.reflection_rewards, backend="aot_eager")(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


UNCHECKED = """
import torch, trajkern as tk
x = torch.linspace(-3, -1, 12)
ids = torch.tensor([1, 2, 1, 2])
with tk.use_backend("triton"):
    for cu in ([0, 4, 6, 9, 11], [0, 3, 6, 10, 12], [0, 3, -9, 50, 12], [7, 2**62, -(2**62), 3, 2**40]):
        logprobs = x.clone().requires_grad_()
        result = tk.reflection_rewards(logprobs, torch.tensor(cu), ids)
        sum(y.nan_to_num(0).sum() for y in result).backward()
        if cu == [0, 4, 6, 9, 11]:
            assert result.rewards.isnan().tolist() == [True, False, True, False], result
            assert result.group_score.isnan().tolist() == [True, False], result
            assert result.weights[:4].isnan().all() and result.std[6:9].isnan().all(), result
            assert result.weights[4:6].isfinite().all() and result.std[9:11].isfinite().all(), result
print("done")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_unequal_lengths_that_nobody_checked() -> None:
    """On a GPU: NaN for the group, the others as ever, and nothing outside the pack is touched."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", UNCHECKED], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr[-3000:]
