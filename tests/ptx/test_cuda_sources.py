"""What csrc/cuda promises beyond the registry, as nvcc compiles it: primitives, and independence of the batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern import reference
from trajkern.ops.tree import REDUCTIONS
from trajkern.testing import KernelFault, compiled, run, spec_of, tree
from trajkern.testing.numerics import budget_shares
from trajkern.testing.ptx.by_nvcc import CudaLibrary, trajkern_library
from trajkern.testing.ptx.context import _library
from trajkern.testing.ptx.device import Pointers, Watch
from trajkern.testing.ptx.execution import Execution

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@contextmanager
def on_gpu(order: str = "lowest", seed: int = 0) -> Iterator[None]:
    with compiled("sm_90", order=order, seed=seed), tk.use_backend("cuda"):
        yield


@contextmanager
def launching(library: CudaLibrary, order: str = "lowest", seed: int = 0) -> Iterator[Execution]:
    """Inside the block functions of the library take ``data_ptr()``."""
    library.execution = execution = Execution(order, seed)
    with Watch(execution.device), Pointers(execution.device):
        yield execution


@pytest.fixture(scope="module")
def primitives() -> CudaLibrary:
    sources = [HERE / "primitives.cu", HERE / "module.cpp"]
    return CudaLibrary(
        "_primitives", sources, 90, CSRC.parent / "build" / "ptx", [HERE, CSRC / "common", CSRC / "cuda"]
    )


def _in_every_order(call: Callable[[str, int], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``call`` returns, the same bits in whatever order the warps run."""
    first = call("lowest", 0)
    for seed in (1, 2):
        for key, x in call("random", seed).items():
            assert torch.equal(x.nan_to_num(123.0), first[key].nan_to_num(123.0)), f"{key} depends on the order"
    return first


def _members(n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Shuffled rows, and the positions of ``size`` of them, ascending."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator), torch.randperm(n, generator=generator)[:size].sort().values


def _advantages_with_grad(rewards: Tensor, ids: Tensor, upstream: Tensor, *order) -> dict[str, Tensor]:
    x = rewards.clone().requires_grad_()
    with on_gpu(*order):
        out = tk.group_advantages(x, ids)
        out.backward(upstream)
    return {"advantages": out.detach(), "grad_rewards": x.grad}


# a warp has 32 lanes; up to 32 rows are an octet's, more a block's
@pytest.mark.parametrize(("n", "size"), [(560, 3), (40, 33), (300, 255), (300, 257), (300, 270), (600, 550)])
def test_group_does_not_see_the_rest_of_the_batch(n: int, size: int) -> None:
    rewards, at = _members(n, size, seed=n)
    ids = torch.arange(n) // 100 + 10
    ids[at] = -7
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1))
    packed = _in_every_order(lambda *order: _advantages_with_grad(rewards, ids, upstream, *order))
    alone = _advantages_with_grad(rewards[at], torch.zeros(size, dtype=torch.int64), upstream[at])
    for name, x in alone.items():
        assert torch.equal(packed[name][at], x), name
    centred = rewards[at].double() - rewards[at].double().mean()
    expected = centred / (rewards[at].double().std() + 1e-6)
    torch.testing.assert_close(alone["advantages"].double(), expected, rtol=1e-6, atol=1e-6)


def test_trajectory_does_not_see_the_rest_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 200, generator=generator)
    mask = torch.rand(200, generator=generator) > 0.3
    bounds = torch.tensor([0, 5, 5, 111, 112, 200])
    with on_gpu():
        packed = tk.gae(rewards, values, bounds, gamma=0.9, mask=mask).advantages
        for a, b in pairwise(bounds.tolist()):
            alone = tk.gae(rewards[a:b], values[a:b], torch.tensor([0, b - a]), gamma=0.9, mask=mask[a:b]).advantages
            assert torch.equal(packed[a:b], alone)


@pytest.mark.parametrize("blocks", (1, 2, 7))
def test_whiten_over_any_number_of_blocks(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = _library(90)
    one = library.whiten_scratch(1)
    monkeypatch.setattr(library.module, "whiten_scratch", lambda n: one * blocks)
    spec = spec_of("whiten")
    inputs = spec.inputs(next(c for c in spec.cases if c.name == "large_mean"), torch.float32)
    with on_gpu():
        outcome = run(spec, tk.whiten, inputs)
    assert max(budget_shares(spec, outcome, inputs).values()) <= 1


@pytest.mark.parametrize("bounds", ((2, 6, 8), (0, 6, 7), (0, 99, 10), (-5, 3, 10), (0, 7, 3, 10), (4, 4)))
def test_gae_keeps_to_the_tokens_whatever_the_boundaries(bounds: tuple[int, ...]) -> None:
    """On a GPU nobody checks them; tokens outside every trajectory become NaN."""
    room = torch.full((30,), 55.0)
    rewards, out, cu_seqlens = torch.ones(10), room[10:20], torch.tensor(bounds)
    library = _library(90)
    tokens = [t for a, b in pairwise(bounds) for t in range(max(a, 0), min(b, 10))]
    twice = len(set(tokens)) < len(tokens)  # two trajectories write one token
    race = pytest.raises(KernelFault, match="nothing orders them") if twice else nullcontext()
    with launching(library), race:
        pack = cu_seqlens.data_ptr(), 0, len(bounds) - 1, 10
        library.gae(0, pack, rewards.data_ptr(), 0, 0, 1.0, 1.0, out.data_ptr(), (0, 0, 0))
    assert (room[:10] == 55).all() and (room[20:] == 55).all()
    assert torch.isnan(out[: max(bounds[0], 0)]).all() and torch.isnan(out[bounds[-1] :]).all()
    assert not (out == 55).any()


def test_warp_and_block_sums(primitives: CudaLibrary) -> None:
    blocks, threads = 2, 96
    x = torch.randn(blocks, threads, dtype=torch.float64)

    def sums(*order) -> dict[str, Tensor]:
        out = {name: torch.full_like(x, torch.nan) for name in ("warp", "block", "squares")}
        with launching(primitives, *order):
            primitives.sums(x.data_ptr(), blocks, threads, *(o.data_ptr() for o in out.values()))
        return out

    got = _in_every_order(sums)
    by_warp = [[sum(row[w : w + 32]) for w in range(0, threads, 32)] for row in x.tolist()]
    torch.testing.assert_close(got["warp"], torch.tensor(by_warp, dtype=torch.float64).repeat_interleave(32, 1))
    for name, values in (("block", x), ("squares", x * x)):
        expected = torch.tensor([[sum(row)] * threads for row in values.tolist()], dtype=torch.float64)
        torch.testing.assert_close(got[name], expected)
        assert (got[name] == got[name][:, :1]).all(), f"threads disagree on {name}"


def test_affine_scan(primitives: CudaLibrary) -> None:
    blocks = 2
    scale, shift = torch.randn(2, blocks, 32, dtype=torch.float64)
    scale[0, 7], scale[1, 3], shift[1, 3] = 0.0, 1.0, 0.0  # a segment starts; a lane passes on
    out_scale, out_shift = torch.full((2, blocks, 32), torch.nan, dtype=torch.float64)
    with launching(primitives):
        primitives.scan(scale.data_ptr(), shift.data_ptr(), blocks, out_scale.data_ptr(), out_shift.data_ptr())
    for b in range(blocks):
        a, c = 1.0, 0.0
        for k in range(32):
            a, c = float(scale[b, k]) * a, float(scale[b, k]) * c + float(shift[b, k])
            assert float(out_scale[b, k]) == pytest.approx(a, rel=1e-12, abs=1e-15)
            assert float(out_shift[b, k]) == pytest.approx(c, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("lanes", (0, 1, 0x80000000, 0xFFFFFFFF, 0x00F0A001))
def test_lanes_and_sets_of_lanes(lanes: int, primitives: CudaLibrary) -> None:
    blocks, threads = 2, 64
    out = torch.full((blocks * threads, 6), -99)
    with launching(primitives):
        primitives.lanes(lanes, blocks, threads, out.data_ptr())
    members = [k for k in range(32) if lanes >> k & 1]
    for i, row in enumerate(out.tolist()):
        below = [k for k in members if k < i % 32]
        assert row[:3] == [i % 32, i % threads // 32, i // 32]
        assert row[3:] == [max(below, default=-1), max(members, default=-1), len(below)]


@pytest.mark.parametrize("order", ("lowest", "random"))
def test_a_missing_barrier_is_a_race(order: str, primitives: CudaLibrary) -> None:
    out = torch.full((32,), -1)
    with launching(primitives, order):
        primitives.neighbour(True, out.data_ptr())
    assert torch.equal(out, torch.arange(1, 33) % 32 + 100)
    with launching(primitives, order), pytest.raises(KernelFault, match="nothing orders them") as caught:
        primitives.neighbour(False, out.data_ptr())
    assert caught.value.kernel == "neighbour_kernel"
    assert all(place.source.startswith("primitives.cu:") for place in caught.value.places)


MISUSES = {  # in the order of primitives.h
    "absent_lane": "lanes wait for others that never come: 31 wait at .vote.*, 33 have returned",
    "two_sites": "lanes wait for others that never come: 16 wait at .*, 16 wait at ",
    "divergent_barrier": "lanes wait for others that never come: 32 wait at .bar.*, 32 have returned",
    "two_barriers": "lanes wait for others that never come: 32 wait at .bar.*, 32 wait at .bar",
    "foreign_source": "reads lane 9, which is not in its mask",
    "not_in_own_mask": "not in its own mask",
    "shared_overrun": "writes bytes 64 to 64 of shared memory",
}


@pytest.mark.parametrize("misuse", MISUSES)
@pytest.mark.parametrize("order", ("lowest", "random"))
def test_misuse_is_an_error(misuse: str, order: str, primitives: CudaLibrary) -> None:
    with launching(primitives, order, 3), pytest.raises(KernelFault, match=MISUSES[misuse]):
        primitives.misuse(list(MISUSES).index(misuse))


def _forest_and_parts() -> tuple[list[tk.Tree], tk.Tree]:
    g = torch.Generator().manual_seed(0)
    parts = [tree.star(2500), tree.comb(40), tree.regular_tree(4, 7), tree.random_tree(g, 300), tree.chain(3)]
    return parts, tree.joined(parts)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_tree_does_not_see_the_rest_of_the_forest(op: str) -> None:
    """Summaries of 32 and of 1,024 leaves begin anew in each tree."""
    parts, forest = _forest_and_parts()
    values = torch.randn(forest.num_leaves, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(forest.num_nodes, generator=torch.Generator().manual_seed(2))

    def both(x: Tensor, where: tk.Tree, up: Tensor, *order) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        with on_gpu(*order):
            out = tk.subtree_reduce(x, where, op)
            out.backward(up)
        return {"out": out.detach(), "grad": x.grad}

    whole = _in_every_order(lambda *order: both(values, forest, upstream, *order))
    node = leaf = 0
    for part in parts:
        nodes, leaves = slice(node, node + part.num_nodes), slice(leaf, leaf + part.num_leaves)
        alone = both(values[leaves], part, upstream[nodes])
        assert torch.equal(whole["out"][nodes], alone["out"]) and torch.equal(whole["grad"][leaves], alone["grad"])
        node, leaf = nodes.stop, leaves.stop
    expected = reference.subtree_reduce(values.double(), forest, op)
    torch.testing.assert_close(whole["out"].double(), expected, rtol=1e-6, atol=1e-6)


def test_without_sources_or_with_a_compiler_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="run this from a checkout of trajkern"):
        trajkern_library(90, tmp_path, tmp_path)
    (tmp_path / "wrong.cu").write_text("int f() { return missing; }\n")
    with pytest.raises(RuntimeError, match="nvcc.*wrong.cu.* failed:(.|\n)*missing"):
        CudaLibrary("_wrong", [tmp_path / "wrong.cu"], 90, tmp_path)
