"""Faults put into our own kernels, each of which the compiled kernels' checks must find.

A sample of those in csrc/cuda, which take nvcc half a minute each, or all with ``--every-case``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import trajkern as tk
from trajkern._backends import OWNERS
from trajkern.testing import SPECS, KernelFault, compiled, run
from trajkern.testing.numerics import budget_shares
from trajkern.testing.ptx.by_nvcc import trajkern_library

ROOT = Path(__file__).resolve().parents[2]


def wrong_cases(family: str, dtype: torch.dtype = torch.float32) -> Iterator[str]:
    """The family's small cases that fault or leave their budget, and why."""
    for spec in (s for s in SPECS if s.family == family):
        for case in (c for c in spec.cases if not c.large and not c.mixed):
            inputs = spec.inputs(case, dtype)
            with compiled("sm_90"), tk.use_backend(OWNERS[family]["cuda"]):
                try:
                    outcome = run(spec, getattr(tk, spec.name), inputs)
                except KernelFault as fault:
                    yield str(fault)
                    continue
            share = max(budget_shares(spec, outcome, inputs).values(), default=0.0)
            if not share <= 1:
                yield f"{spec.name} {case.name}: {share} of its budget"


class Mutant(NamedTuple):
    family: str
    file: str
    old: str
    new: str
    says: str  # in the first thing that is wrong
    sample: bool = False


CUDA = {
    "a sort without its first barrier": Mutant(
        "advantage",
        "cuda/advantage_runs.cuh",
        "place[k] = merged_place(runs, i, width, count);\n    }\n    __syncthreads();\n",
        "place[k] = merged_place(runs, i, width, count);\n    }\n",
        "nothing orders them",
    ),
    "rows not counted stay unwritten": Mutant(
        "advantage", "cuda/advantage_runs.cuh", "    else\n      out[row] = 0;\n", "", "left unwritten"
    ),
    "a run begins where its neighbour's ids end": Mutant(
        "advantage",
        "cuda/advantage_runs.cuh",
        "in.ids[row - 1] == in.ids[row] && in.counted",
        "in.ids[row] == in.ids[row] && in.counted",
        "of its budget",
    ),
    "a summary past the leaves": Mutant(
        "tree",
        "cuda/tree_range.cuh",
        "if (begin + size > tree.leaves) return;",
        "if (begin + size > tree.leaves + 1) return;",
        "reads bytes",
    ),
    "block_sum without its first barrier": Mutant(
        "advantage",
        "cuda/block.cuh",
        "  __syncthreads();  // the scratch may still be read for the sum before\n",
        "",
        "nothing orders them",
    ),
    "block_sum without its second barrier": Mutant(
        "advantage",
        "cuda/block.cuh",
        "scratch[warp_in_block()] = x;\n  __syncthreads();",
        "scratch[warp_in_block()] = x;",
        "",
    ),
    "a sum one token too far": Mutant(
        "span",
        "cuda/span.cu",
        "for (int64_t t = begin + lane(); t < end; t += kWarp) sum",
        "for (int64_t t = begin + lane(); t <= end; t += kWarp) sum",
        "",
        sample=True,
    ),
    "too little shared memory": Mutant(
        "advantage",
        "cuda/advantage.cu",
        "kWhitenThreads / kWarp * sizeof(double)",
        "kWhitenThreads / kWarp * sizeof(float)",
        "of shared memory, of which the launch has",
    ),
    "block_sum over one warp too many": Mutant(
        "advantage",
        "cuda/block.cuh",
        "warp < int(blockDim.x) / kWarp; ++warp",
        "warp <= int(blockDim.x) / kWarp; ++warp",
        "shared memory",
    ),
    "roots unwritten": Mutant(
        "tree", "cuda/tree.cu", "if (tree.parent[p] < 0 && lane() == 0) advantages[p] = 0;", "", "left unwritten"
    ),
    "a shuffle of half the warp": Mutant(
        "span",
        "cuda/span.cu",
        "best = greater(__shfl_xor_sync(kAllLanes, best, offset), best);",
        "if (lane() < offset) best = greater(__shfl_down_sync(kAllLanes, best, offset), best);",
        "never come",
        sample=True,
    ),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cuda_mutant" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-case")
        metafunc.parametrize("cuda_mutant", [name for name, mutant in CUDA.items() if mutant.sample or every])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_faults_in_cuda_are_found(cuda_mutant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = CUDA[cuda_mutant]
    for folder in ("bind", "common", "cuda"):
        shutil.copytree(ROOT / "csrc" / folder, tmp_path / "csrc" / folder)
    shutil.copy(ROOT / "csrc" / "module_cuda.cpp", tmp_path / "csrc")
    path = tmp_path / "csrc" / mutant.file
    text = path.read_text()
    assert mutant.old in text
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    library = trajkern_library(90, tmp_path / "csrc", ROOT / "build" / "ptx" / "mutants")
    monkeypatch.setattr("trajkern.testing.ptx.context._library", lambda capability: library)
    found = next(wrong_cases(mutant.family), None)
    assert found is not None and mutant.says in found, found


class TritonMutant(NamedTuple):
    family: str
    kernel: str
    old: str
    new: str
    says: str
    dtype: torch.dtype = torch.float32


TRITON = {
    "a row one vector longer": TritonMutant(
        "head", "fold_kernel", "size = vectors * VECTOR", "size = (vectors + 1) * VECTOR", ""
    ),
    "a gradient stored without its mask": TritonMutant(
        "head", "gradient_kernel", ", mask=columns < size - start)", ")", "writes bytes"
    ),
    "targets of the next row": TritonMutant(
        "logprob", "stats_kernel", "tl.load(targets + row)", "tl.load(targets + row + 1)", "reads bytes"
    ),
    "a result that is not stored": TritonMutant(
        "logprob",
        "stats_kernel",
        "tl.store(norm + 1, tl.where(keep, log_sum, 0.0))",
        "pass",
        "",
    ),
    "gradients stored without their mask": TritonMutant(
        "policy_loss", "tokens_kernel", "tl.where(keep, w * loss.slope, 0.0), mask=inside)", "w * loss.slope)", ""
    ),
    "narrowed in place without a barrier": TritonMutant(
        "head",
        "gradient_kernel",
        "            tl.debug_barrier()\n",
        "            pass\n",
        "nothing orders them",
        torch.bfloat16,
    ),
    "every program writes the first group's": TritonMutant(
        "reflection", "deviation_kernel", "tl.store(totals + g, total)", "tl.store(totals, total)", ""
    ),
}


@contextmanager
def _mutated(kernel, old: str, new: str) -> Iterator[None]:
    source = kernel.src
    assert old in source
    try:
        kernel._unsafe_update_src(source.replace(old, new, 1))
        kernel.device_caches.clear()
        yield
    finally:
        kernel._unsafe_update_src(source)
        kernel.device_caches.clear()


def _kernels(family: str) -> ModuleType:
    return pytest.importorskip(f"trajkern._triton.{family}", reason="triton is not installed")


@pytest.mark.parametrize("mutant", TRITON.values(), ids=TRITON)
def test_faults_in_triton_are_found(mutant: TritonMutant) -> None:
    kernel = getattr(_kernels(mutant.family), mutant.kernel)
    with _mutated(kernel, mutant.old, mutant.new):
        found = next(wrong_cases(mutant.family, mutant.dtype), None)
    assert found is not None and mutant.says in found, found
