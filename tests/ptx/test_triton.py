"""Any Triton kernel inside ``compiled``: launched as on a GPU, on CPU tensors, and checked."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

import trajkern as tk  # noqa: E402
from trajkern.testing import KernelFault, compiled  # noqa: E402
from trajkern.testing.ptx.context import ARCHITECTURES  # noqa: E402


@triton.jit
def scale_kernel(x, out, n, factor, BLOCK: tl.constexpr, SLACK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n + SLACK)
    tl.store(out + at, value * factor, mask=at < n)


@triton.jit
def reverse_kernel(x, out, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(out + at, tl.flip(tl.load(x + at)))


@triton.jit
def sums_kernel(x, out, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + column < width
        total += tl.sum(tl.load(x + row * width + start + column, mask=inside, other=0.0), 1)
    tl.store(out + tl.arange(0, ROWS), total)


class Pair(NamedTuple):
    x: tl.tensor
    scale: tl.tensor
    missing: tl.tensor | None


@triton.jit
def pair_kernel(pair, out, MODE: tl.constexpr):
    at = tl.arange(0, 64)
    value = tl.load(pair.x + at).to(tl.float32) * pair.scale
    if MODE == "twice":
        value *= 2
    if pair.missing is not None:
        value += tl.load(pair.missing + at)
    tl.store(out + at, value.to(out.dtype.element_ty))


def _scale(x: torch.Tensor, slack: int = 0, block: int = 128) -> torch.Tensor:
    out = torch.empty_like(x)
    scale_kernel[(triton.cdiv(x.numel(), block),)](x, out, x.numel(), 3.0, BLOCK=block, SLACK=slack)
    return out


def test_a_right_kernel() -> None:
    x = torch.randn(300)
    with compiled("sm_90") as run:
        out = _scale(x)
    assert torch.equal(out, x * 3) and run.launches == {"scale_kernel": 1}
    assert run.stats["launches"] == 1 and run.stats["lane instructions"] > 300


def test_a_mask_that_is_off_by_one() -> None:
    with pytest.raises(KernelFault) as caught, compiled("sm_90"):
        _scale(torch.randn(300), slack=1)
    fault = caught.value
    assert fault.kernel == "scale_kernel" and "reads bytes 1200 to 1203 of `x`, float32 [300]" in fault.reason
    assert fault.places[0].source.startswith("test_triton.py:") and fault.places[0].block == (2, 0, 0)


def test_an_output_of_which_a_part_is_written() -> None:
    with pytest.raises(KernelFault, match=r"scale_kernel: 172 elements of an output, float32 \[300\].*of them 128"):
        with compiled("sm_90"):
            x = torch.randn(300)
            out = torch.empty_like(x)
            scale_kernel[(1,)](x, out, 128, 3.0, BLOCK=128, SLACK=0)


def test_memory_that_torch_wrote_counts_as_written() -> None:
    with compiled("sm_90"):
        x = torch.empty(300)
        with pytest.raises(KernelFault, match="which nothing has written"):
            _scale(x)
        torch.arange(300, dtype=torch.float32, out=x)
        assert torch.equal(_scale(x), x * 3)
        y = torch.empty(300)
        y.numpy()[:] = 1
        assert (_scale(y) == 3).all()


def test_reductions_through_shared_memory_and_another_order() -> None:
    x = torch.randn(4, 700)
    found = []
    for order, seed in (("lowest", 0), ("random", 1), ("random", 2)):
        with compiled("sm_90", order=order, seed=seed):
            out = torch.empty(4)
            sums_kernel[(1,)](x, out, 700, ROWS=4, BLOCK=256)
        found.append(out)
    torch.testing.assert_close(found[0], x.sum(1))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_one_program_in_place() -> None:
    """Threads that hold copies of an element load it before one of them stores it."""
    x = torch.arange(16, dtype=torch.float32)
    with compiled("sm_90"):
        scale_kernel[(1,)](x, x, 16, 2.0, BLOCK=16, SLACK=0)
    assert torch.equal(x, torch.arange(16) * 2.0)


def test_programs_that_race() -> None:
    with pytest.raises(KernelFault, match="nothing orders them") as caught, compiled("sm_90"):
        x, out = torch.randn(64), torch.zeros(64)
        pair_kernel[(2,)](Pair(x, 1.0, out), out, MODE="once")
    assert {place.block for place in caught.value.places} == {(0, 0, 0), (1, 0, 0)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_tuples_strings_and_absent_arguments(dtype: torch.dtype) -> None:
    x, more = torch.randn(64).to(dtype), torch.randn(64)
    with compiled("sm_90"):
        out, both = torch.empty_like(x), torch.empty(64)
        pair_kernel[(1,)](Pair(x, 0.5, None), out, MODE="twice")
        pair_kernel[(1,)](Pair(x, 1.0, more), both, MODE="once")
    assert torch.equal(out, x) and torch.equal(both, x.float() + more)


def test_heuristics_autotuning_and_hooks() -> None:
    configs = [triton.Config({"BLOCK": block}) for block in (64, 128)]
    tuned = triton.autotune(configs, key=["n"])(scale_kernel)
    chosen = triton.heuristics({"SLACK": lambda arguments: 0})(tuned)
    x = torch.randn(300)
    with compiled("sm_90") as run:
        out = torch.empty_like(x)
        chosen[lambda options: (triton.cdiv(300, options["BLOCK"]),)](x, out, 300, 3.0)
    assert torch.equal(out, x * 3) and run.launches["scale_kernel"] >= 3  # each configuration, then the chosen one


def test_a_view_of_a_larger_storage() -> None:
    whole = torch.arange(400, dtype=torch.float32)
    with compiled("sm_90"):
        assert torch.equal(_scale(whole[33:300]), whole[33:300] * 3)
        with pytest.raises(KernelFault, match="reads bytes 1068 to 1071"):
            _scale(whole[33:300], slack=1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_compiles(arch: str) -> None:
    x = torch.randn(100)
    with compiled(arch):
        assert torch.equal(_scale(x), x * 3)


@triton.jit
def product_kernel(x, out):
    at = tl.arange(0, 16)
    tile = tl.load(x + at[:, None] * 16 + at[None, :])
    tl.store(out + at[:, None] * 16 + at[None, :], tl.dot(tile, tile))


def test_an_instruction_without_execution_is_named() -> None:
    x = torch.randn(16, 16).half()
    with compiled("sm_90"), pytest.raises(NotImplementedError, match=r"no execution on a CPU of `.*test_triton.py:"):
        product_kernel[(1,)](x, torch.zeros(16, 16))


def test_the_driver_is_gone_afterwards() -> None:
    before = vars(triton.runtime.driver).get("_active")
    with pytest.raises(KernelFault), compiled("sm_90"):
        _scale(torch.randn(300), slack=1)
    assert vars(triton.runtime.driver).get("_active") is before
    with pytest.raises(RuntimeError, match="triton.*tensors, got cpu|not available"), tk.use_backend("triton"):
        tk.token_logprobs(torch.randn(2, 8), torch.tensor([0, 1]))


INTERPRETED = """
import trajkern as tk
from trajkern.testing import compiled
with compiled("sm_90"), tk.use_backend("triton"):
    pass
"""


def test_the_interpreter_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert "TRITON_INTERPRET is set, under which Triton compiles nothing" in done.stderr


class TestOwnOps:
    def test_forward_and_backward(self) -> None:
        x, targets = torch.randn(3, 50, requires_grad=True), torch.tensor([1, 2, 3])
        with compiled("sm_90") as run, tk.use_backend("triton"):
            logprobs = tk.token_logprobs(x, targets)
            logprobs.sum().backward()
        assert run.stats["launches"] == 2
        y = x.detach().requires_grad_()
        torch.log_softmax(y, 1)[range(3), targets].sum().backward()
        torch.testing.assert_close(x.grad, y.grad)

    def test_without_a_backend_the_owner_on_the_cpu_runs(self) -> None:
        with compiled("sm_90") as run:
            tk.token_logprobs(torch.randn(2, 8), torch.tensor([0, 1]))
        assert not run.launches

    def test_availability(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with compiled("sm_90"):
            assert tk.backends()["triton"] == "available"
        monkeypatch.setattr("trajkern.testing.ptx.by_nvcc.shutil.which", lambda name: None)
        monkeypatch.setattr("trajkern.testing.ptx.context._library", lambda capability: _library_without_nvcc())
        with compiled("sm_90"), pytest.raises(RuntimeError, match="no nvcc on the PATH.*install the CUDA toolkit"):
            with tk.use_backend("cuda"):
                pass


def _library_without_nvcc() -> None:
    from trajkern.testing.ptx import by_nvcc

    by_nvcc.nvcc()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from trajkern.testing.ptx import context

    monkeypatch.setattr(context.importlib.util, "find_spec", lambda name: None)
    context._triton_problem.cache_clear()
    try:
        with compiled("sm_90"), pytest.raises(RuntimeError, match="triton is not installed; run `pip install triton`"):
            with tk.use_backend("triton"):
                pass
    finally:
        context._triton_problem.cache_clear()
