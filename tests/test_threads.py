"""Ops and layouts in several Python threads at once, and in processes that were forked after some."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import trajkern as tk
from trajkern.testing import SPECS, run

THREADS = 6
WORK = [(spec, case) for spec in SPECS for case in spec.cases[:3] if not case.large]


def result(number: int) -> dict[str, torch.Tensor]:
    """Every output and gradient of one piece of work."""
    spec, case = WORK[number]
    return run(spec, getattr(tk, spec.name), spec.inputs(case, torch.float32))


def test_every_op_in_six_threads() -> None:
    """Each thread does all of the work in an order of its own: the bits are those of one thread."""
    cores, expected = torch.get_num_threads(), [result(n) for n in range(len(WORK))]
    meeting = threading.Barrier(THREADS, timeout=120)

    def work(seed: int) -> list[str]:
        torch.set_num_threads(cores)  # it is the thread's own, and decides about the BLAS library's bits
        meeting.wait()
        wrong = []
        for n in random.Random(seed).sample(range(len(WORK)), len(WORK)):
            for name, x in result(n).items():
                if not torch.equal(x.nan_to_num(), expected[n][name].nan_to_num()):
                    wrong.append(f"{WORK[n][0].name} {WORK[n][1].name} {name}")
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert [found for found in pool.map(work, range(THREADS)) if found] == []


def pack(seed: int) -> tk.PackedBatch:
    """Eight rollouts in two groups, which share some prefixes."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (8,), generator=g)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    mask = torch.ones(int(lengths.sum()), dtype=torch.bool)
    mask[cu_seqlens[:-1]] = False
    tokens = torch.randint(0, 2, mask.shape, generator=g)
    return tk.PackedBatch(tokens, cu_seqlens, mask, torch.arange(8) // 4, torch.randn(8, generator=g))


def described(seed: int) -> list[list[int]]:
    """What the layouts of a batch derive."""
    batch = pack(seed)
    tree = tk.Tree.from_trajectories(batch)
    turns = tk.Spans.turns(batch.loss_mask, batch.cu_seqlens)
    return [x.tolist() for x in (tree.parent, tree.flat_index, tree.token_node, turns.start, turns.end)]


def test_layouts_in_six_threads() -> None:
    expected = [described(seed) for seed in range(40)]
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(lambda _: [described(seed) for seed in range(40)], range(THREADS)):
            assert found == expected


def longest_silence(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of ``work``, and the longest in which this thread got no turn."""
    done, ticks = threading.Event(), [time.perf_counter()]

    def run_it() -> None:
        work()
        done.set()

    thread = threading.Thread(target=run_it)
    thread.start()
    while not done.is_set():
        time.sleep(0)
        ticks.append(time.perf_counter())
    thread.join()
    return ticks[-1] - ticks[0], max(b - a for a, b in zip(ticks, ticks[1:], strict=False))


@pytest.mark.slow
def test_layouts_let_other_threads_run() -> None:
    """The interpreter's lock is not held while a tree is derived, laid flat or found in a batch."""
    nodes = torch.arange(3_000_000)
    parent, lengths = torch.where(nodes > 0, (nodes - 1) // 8, -1), torch.ones_like(nodes)
    tree = tk.Tree(parent, lengths)
    offsets = torch.arange(0, 4_000_001, 4)
    tokens = torch.randint(0, 3, (4_000_000,), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(4_000_000) % 4 > 0).contiguous()
    batch = tk.PackedBatch(tokens, offsets, mask, torch.zeros(1_000_000, dtype=torch.int64))
    for work in (
        lambda: tk.Tree(parent, lengths),
        lambda: tree.flat_index,
        lambda: tk.Tree.from_trajectories(batch),
    ):
        took, silent = longest_silence(work)
        assert silent < max(0.2 * took, 0.05), (took, silent)


class Batches(Dataset):
    """What a collating process would make of rollouts: layouts, and ops over several threads' worth of tokens."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> tuple[list[list[int]], str]:
        return described(seed), advantages(seed)


def advantages(seed: int) -> str:
    """The bits of as many as are shared out among threads."""
    rewards = torch.randn(200_000, generator=torch.Generator().manual_seed(seed))
    found = tk.whiten(tk.group_advantages(rewards, torch.arange(200_000) // 8))
    return hashlib.sha256(found.numpy().tobytes()).hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_a_data_loader_forks_after_ops_had_threads() -> None:
    """Its processes have one thread each, so that OpenMP's, which no fork has, are not waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [(described(seed), advantages(seed)) for seed in range(4)]
    finally:
        torch.set_num_threads(before)
    loader = DataLoader(Batches(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    assert [tuple(x) for x in loader] == expected


FORK = """
import os, sys, torch, trajkern as tk
torch.set_num_threads(2)
x, ids = torch.randn(200_000), torch.arange(200_000) // 8
expected = tk.group_advantages(x, ids)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(tk.group_advantages(x, ids), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_a_plain_fork_asks_for_one_thread() -> None:
    assert subprocess.run([sys.executable, "-c", FORK], timeout=600).returncode == 0
