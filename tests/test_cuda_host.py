"""The CUDA kernels on a machine without a GPU: compiled for the host and run with one fiber per thread.

Proves indexing, logic and the use of barriers and lanes; not speed, nor memory ordering.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern import _ext, reference
from trajkern.testing import advantage, errors, run, span, tree

ROOT = Path(__file__).resolve().parent.parent
HOST = ROOT / "tests" / "cuda_host"
# kernels are optimised lightly (they run), the bindings not at all (they compile sooner)
SOURCES = {
    **{path: "-O1" for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))},
    **{path: "-O0" for path in sorted((ROOT / "csrc" / "bind").glob("*.cpp"))},
    HOST / "primitives.cu": "-O1",
    HOST / "cuda_host.cpp": "-O2",
    HOST / "module.cpp": "-O0",
}
SPECS = (*advantage.SPECS, *span.SPECS, *tree.SPECS)
ORDERS = {"forward": 0, "backward": 1, "random": 2}
SMALL = [
    pytest.param((spec, case), id=f"{spec.name}-{case.name}") for spec in SPECS for case in spec.cases if not case.large
]
COMPILER = shutil.which("g++") or shutil.which("c++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on the PATH")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The module _C_cuda_host, built once."""
    folder = tmp_path_factory.mktemp("cuda_host")
    includes = [f"-I{path}" for path in (HOST, pybind11.get_include(), sysconfig.get_paths()["include"])]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.parent.name}_{source.stem}.o"
        flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
        command = [str(COMPILER), *flags, SOURCES[source], *includes, "-x", "c++", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    library = folder / f"_C_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([str(COMPILER), "-shared", *map(str, objects), "-o", str(library)], check=True)
    loader = importlib.machinery.ExtensionFileLoader("_C_cuda_host", str(library))
    spec = importlib.util.spec_from_loader("_C_cuda_host", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class OnHost:
    """Stands where the launchers find the CPU's module: their kernels come from ``host``."""

    def __init__(self, host: ModuleType, blocks: int = 3) -> None:
        self.host, self.cpu, self.blocks, self.calls = host, _ext.cpu(), blocks, 0

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self.host, name):
            return getattr(self.cpu, name)
        self.calls += 1
        return getattr(self.host, name)

    def whiten_scratch(self, n: int) -> int:
        """Room for as many blocks as the test asks for, not as n does."""
        return self.host.whiten_scratch(1) * self.blocks


@pytest.fixture
def kernels(host: ModuleType, monkeypatch: pytest.MonkeyPatch, poison: None) -> OnHost:
    module = OnHost(host)
    monkeypatch.setattr(_ext, "cpu", lambda: module)
    host.set_order(ORDERS["forward"], 0)
    return module


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@pytest.mark.parametrize("small", SMALL)
def test_within_budget(small, dtype: torch.dtype, kernels: OnHost) -> None:
    spec, case = small
    shares = errors(spec, getattr(tk, spec.name), spec.inputs(case, dtype))
    assert kernels.calls > 0
    assert max(shares.values()) <= 1, f"{case.name} ({case.reason}): share of the error budget {shares}"


def _in_every_order(host: ModuleType, call: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``call`` returns, the same bits in whatever order the threads run: a missing barrier shows here."""
    host.set_order(ORDERS["forward"], 0)
    first = call()
    for name, seed in (("backward", 0), ("random", 1), ("random", 2)):
        host.set_order(ORDERS[name], seed)
        for key, x in call().items():
            assert torch.equal(x.nan_to_num(123.0), first[key].nan_to_num(123.0)), f"{key} differs in {name} order"
    return first


@pytest.mark.parametrize("small", SMALL)
def test_order_of_the_threads_changes_no_bit(small, kernels: OnHost) -> None:
    spec, case = small
    inputs, function = spec.inputs(case, torch.float32), getattr(tk, spec.name)
    _in_every_order(kernels.host, lambda: run(spec, function, inputs))


def _members(n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffled rows, and the positions of ``size`` of them, ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator), torch.randperm(n, generator=generator)[:size].sort().values


def _advantages_with_grad(rewards: Tensor, ids: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    x = rewards.clone().requires_grad_()
    out = tk.group_advantages(x, ids)
    out.backward(upstream)
    return {"advantages": out.detach(), "grad_rewards": x.grad}


# eight lanes take a group of up to 64, a block a larger one; a tile has 1,024 rows
@pytest.mark.parametrize(("n", "size"), ((560, 3), (90, 64), (90, 65), (300, 257), (2200, 1100)))
def test_group_does_not_see_the_rest_of_the_batch(n: int, size: int, kernels: OnHost) -> None:
    rewards, at = _members(n, size, seed=n)
    ids = torch.arange(n) // 100 + 10
    ids[at] = -7
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1))
    packed = _in_every_order(kernels.host, lambda: _advantages_with_grad(rewards, ids, upstream))
    alone = _advantages_with_grad(rewards[at], torch.zeros(size, dtype=torch.int64), upstream[at])
    for name, x in alone.items():
        assert torch.equal(packed[name][at], x), name
    centred = rewards[at].double() - rewards[at].double().mean()
    expected = centred / (rewards[at].double().std() + 1e-6)
    torch.testing.assert_close(alone["advantages"].double(), expected, rtol=1e-6, atol=1e-6)


def test_trajectory_does_not_see_the_rest_of_the_batch(kernels: OnHost) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 200, generator=generator)
    mask = torch.rand(200, generator=generator) > 0.3
    bounds = torch.tensor([0, 5, 5, 111, 112, 200])
    packed = tk.gae(rewards, values, bounds, gamma=0.9, mask=mask).advantages
    for a, b in pairwise(bounds.tolist()):
        alone = tk.gae(rewards[a:b], values[a:b], torch.tensor([0, b - a]), gamma=0.9, mask=mask[a:b]).advantages
        assert torch.equal(packed[a:b], alone)


@pytest.mark.parametrize("blocks", (1, 2, 7))
def test_whiten_over_any_number_of_blocks(blocks: int, kernels: OnHost) -> None:
    kernels.blocks = blocks
    spec = next(s for s in SPECS if s.name == "whiten")
    inputs = spec.inputs(next(c for c in spec.cases if c.name == "large_mean"), torch.float32)
    assert max(errors(spec, tk.whiten, inputs).values()) <= 1


@pytest.mark.parametrize("bounds", ((2, 6, 8), (0, 6, 7), (0, 99, 10), (-5, 3, 10), (0, 7, 3, 10), (4, 4)))
def test_gae_keeps_to_the_tokens_whatever_the_boundaries(bounds: tuple[int, ...], host: ModuleType) -> None:
    """On a GPU nobody checks them; tokens outside every trajectory become NaN."""
    room = torch.full((30,), 55.0)
    rewards, out, cu_seqlens = torch.ones(10), room[10:20], torch.tensor(bounds)
    pack = cu_seqlens.data_ptr(), 0, len(bounds) - 1, 10
    host.gae(0, pack, rewards.data_ptr(), 0, 0, 1.0, 1.0, out.data_ptr(), (0, 0, 0))
    assert (room[:10] == 55).all() and (room[20:] == 55).all()
    assert torch.isnan(out[: max(bounds[0], 0)]).all() and torch.isnan(out[bounds[-1] :]).all()
    assert not (out == 55).any()


def test_warp_and_block_sums(host: ModuleType) -> None:
    blocks, threads = 2, 96
    x = torch.randn(blocks, threads, dtype=torch.float64)

    def sums() -> dict[str, Tensor]:
        out = {name: torch.full_like(x, torch.nan) for name in ("warp", "block", "squares")}
        host.sums(x.data_ptr(), blocks, threads, *(o.data_ptr() for o in out.values()))
        return out

    got = _in_every_order(host, sums)
    by_warp = [[sum(row[w : w + 32]) for w in range(0, threads, 32)] for row in x.tolist()]
    torch.testing.assert_close(got["warp"], torch.tensor(by_warp, dtype=torch.float64).repeat_interleave(32, 1))
    for name, values in (("block", x), ("squares", x * x)):
        expected = torch.tensor([[sum(row)] * threads for row in values.tolist()], dtype=torch.float64)
        torch.testing.assert_close(got[name], expected)
        assert (got[name] == got[name][:, :1]).all(), f"threads disagree on {name}"


def test_affine_scan(host: ModuleType) -> None:
    blocks = 2
    scale, shift = torch.randn(2, blocks, 32, dtype=torch.float64)
    scale[0, 7], scale[1, 3], shift[1, 3] = 0.0, 1.0, 0.0  # a segment starts; a lane passes on
    out_scale, out_shift = torch.full((2, blocks, 32), torch.nan, dtype=torch.float64)
    host.scan(scale.data_ptr(), shift.data_ptr(), blocks, out_scale.data_ptr(), out_shift.data_ptr())
    for b in range(blocks):
        a, c = 1.0, 0.0
        for k in range(32):
            a, c = float(scale[b, k]) * a, float(scale[b, k]) * c + float(shift[b, k])
            assert float(out_scale[b, k]) == pytest.approx(a, rel=1e-12, abs=1e-15)
            assert float(out_shift[b, k]) == pytest.approx(c, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("lanes", (0, 1, 0x80000000, 0xFFFFFFFF, 0x00F0A001))
def test_lanes_and_sets_of_lanes(lanes: int, host: ModuleType) -> None:
    blocks, threads = 2, 64
    out = torch.full((blocks * threads, 6), -99)
    host.lanes(lanes, blocks, threads, out.data_ptr())
    members = [k for k in range(32) if lanes >> k & 1]
    for i, row in enumerate(out.tolist()):
        below = [k for k in members if k < i % 32]
        assert row[:3] == [i % 32, i % threads // 32, i // 32]
        assert row[3:] == [max(below, default=-1), max(members, default=-1), len(below)]


def test_a_missing_barrier_shows(host: ModuleType) -> None:
    expected = torch.arange(1, 33) % 32 + 100

    def neighbours(synchronised: bool, order: str) -> Tensor:
        out = torch.full((32,), -1)
        host.set_order(ORDERS[order], 0)
        host.neighbour(synchronised, out.data_ptr())
        return out

    for order in ORDERS:
        assert torch.equal(neighbours(True, order), expected)
    assert not all(torch.equal(neighbours(False, order), expected) for order in ORDERS)


MISUSES = {  # in the order of primitives.h
    "absent_lane": "can never arrive.*a vote.*thread 5 has returned",
    "two_sites": "deadlock.*__syncwarp.*a vote",
    "divergent_barrier": "can never arrive.*__syncthreads",
    "two_barriers": "deadlock.*__syncthreads.*__syncthreads",
    "foreign_source": "outside its mask",
    "not_in_own_mask": "not in its own mask",
    "shared_overrun": "byte 64 of shared memory",
}


@pytest.mark.parametrize("misuse", MISUSES)
@pytest.mark.parametrize("order", ORDERS)
def test_misuse_is_an_error(misuse: str, order: str, host: ModuleType) -> None:
    host.set_order(ORDERS[order], 3)
    with pytest.raises(RuntimeError, match=MISUSES[misuse]):
        host.misuse(list(MISUSES).index(misuse))


def _forest_and_parts() -> tuple[list[tk.Tree], tk.Tree]:
    g = torch.Generator().manual_seed(0)
    parts = [tree.star(2500), tree.comb(40), tree.regular_tree(4, 7), tree.random_tree(g, 300), tree.chain(3)]
    return parts, tree.joined(parts)


@pytest.mark.parametrize("op", ("sum", "mean", "max", "min", "var"))
def test_tree_does_not_see_the_rest_of_the_forest(op: str, kernels: OnHost) -> None:
    """Summaries of 32 and of 1,024 leaves begin anew in each tree."""
    parts, forest = _forest_and_parts()
    values = torch.randn(forest.num_leaves, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(forest.num_nodes, generator=torch.Generator().manual_seed(2))

    def both(x: Tensor, where: tk.Tree, up: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        out = tk.subtree_reduce(x, where, op)
        out.backward(up)
        return {"out": out.detach(), "grad": x.grad}

    whole = _in_every_order(kernels.host, lambda: both(values, forest, upstream))
    node = leaf = 0
    for part in parts:
        nodes, leaves = slice(node, node + part.num_nodes), slice(leaf, leaf + part.num_leaves)
        alone = both(values[leaves], part, upstream[nodes])
        assert torch.equal(whole["out"][nodes], alone["out"]) and torch.equal(whole["grad"][leaves], alone["grad"])
        node, leaf = nodes.stop, leaves.stop
    expected = reference.subtree_reduce(values.double(), forest, op)
    torch.testing.assert_close(whole["out"].double(), expected, rtol=1e-6, atol=1e-6)
