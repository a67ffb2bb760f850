"""Rollouts that are spread over ranks have the credit that they have in one process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg

import trajkern as tk
from tests.credit.conftest import rollouts_of
from tests.credit.test_scored import Host
from tests.ranks import over_ranks
from trajkern import credit
from trajkern.recipes import dro

RANKS = 2
SPECS = {
    "outcome": credit.outcome(),
    "batch": credit.outcome("tone", within="batch"),
    "gated": credit.outcome().gate("ok", "pass_rate", 0.6).asymmetric(0.1),
    "spans": credit.spans("call") + credit.spans("call", within="index").gate("fine"),
    "whitened": (credit.outcome() + credit.directive(where="failed")).whiten(),
    "srl": credit.recipe("srl"),
    "toolpo": credit.recipe("toolpo", action="tone"),
    "delta_belief": credit.recipe("delta_belief", reward="turn"),
    "dro": credit.recipe("dro", drop_fraction=0.4),
    "w_reinforce": credit.recipe("w_reinforce"),
    "tokens": credit.tree_terms.OfTokens() + credit.tree_terms.OfTokens(observations=False).gate("ok"),
}


def everything() -> credit.Rollouts:
    x = rollouts_of(11)
    begin, end = x.batch.cu_seqlens[:-1] + 1, x.batch.cu_seqlens[1:] - 1
    number = torch.arange(len(x))
    reasoning = tk.Spans(begin, end, number, torch.zeros_like(number), x.batch.num_tokens)
    g = torch.Generator().manual_seed(1)
    turns = torch.randn(len(x.spans["turn"]), generator=g, dtype=torch.float64)
    return rollouts_of(
        11,
        rewards=x.rewards | {"similarity": torch.rand(len(x), generator=g, dtype=torch.float64)},
        spans={"call": x.spans["call"], "reasoning": reasoning},
        span_rewards=x.span_rewards | {"turn": turns},
        rows=[{"reference": f"r{group}"} for group in x.batch.group_ids.tolist()],
        score=Host(),
    )


def share(x: credit.Rollouts, first: int, last: int, group: Any) -> credit.Rollouts:
    """The rollouts [first, last)."""
    batch, bounds = x.batch, x.batch.cu_seqlens
    low, high = int(bounds[first]), int(bounds[last])
    packed = tk.PackedBatch(
        batch.tokens[low:high],
        bounds[first : last + 1] - low,
        batch.loss_mask[low:high],
        batch.group_ids[first:last],
        batch.rewards[first:last],
        sampler_logprobs=batch.sampler_logprobs[low:high],
    )
    spans, rewards = {}, {}
    for name, whole in x.spans.items():
        here = (whole.trajectory >= first) & (whole.trajectory < last)
        start, end = whole.start[here] - low, whole.end[here] - low
        spans[name] = tk.Spans(start, end, whole.trajectory[here] - first, whole.index[here], high - low)
        if name in x.span_rewards:
            rewards[name] = x.span_rewards[name][here]
    return credit.Rollouts(
        packed,
        {name: reward[first:last] for name, reward in x.rewards.items()},
        spans,
        rewards,
        {name: flag[first:last] for name, flag in x.flags.items()},
        rows=x.rows[first:last],
        score=x.score,
        teacher_logprobs=x.teacher_logprobs[low:high],
        process_group=group,
    )


def _of_rank(rank: int) -> dict[str, Any]:
    """Every credit of this rank's rollouts."""
    world = torch.distributed.group.WORLD
    mine = share(everything(), *((0, 5), (5, 12))[rank], world)  # the second group is on both
    found = {name: spec(mine) for name, spec in SPECS.items()}
    saved: dict[str, Any] = {name: (x.advantages, x.mask, x.keep) for name, x in found.items()}
    saved["gate"] = dro.gate(mine.flags["ok"], mine.batch.group_ids, threshold=0.6, process_group=world)
    extra = {"spans": {} if rank else {"step": mine.spans["turn"]}}
    with pytest.raises(ValueError, match="spans must have the same names on every rank"):
        credit.Rollouts(mine.batch, process_group=world, **extra)
    return saved


def of_processes(folder: Path) -> list[dict[str, Any]]:
    return over_ranks(RANKS, _of_rank, folder)


def of_threads(folder: Path) -> list[dict[str, Any]]:
    """With torch's process group of threads: no process to start, no package to load again."""
    store = torch.distributed.HashStore()

    def work(rank: int) -> dict[str, Any]:
        torch.distributed.init_process_group("threaded", rank=rank, world_size=RANKS, store=store)
        try:
            return _of_rank(rank)
        finally:
            torch.distributed.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    try:
        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(work, range(RANKS)))
    finally:
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


@pytest.mark.parametrize("started", (of_threads, pytest.param(of_processes, marks=pytest.mark.slow)))
def test_over_ranks(started: Callable[[Path], list[dict[str, Any]]], tmp_path: Path) -> None:
    of_ranks, x = started(tmp_path), everything()
    for name, spec in SPECS.items():
        found = spec(x)
        advantages, mask, keep = (torch.cat(parts) for parts in zip(*(r[name] for r in of_ranks), strict=True))
        torch.testing.assert_close(advantages, found.advantages, rtol=1e-12, atol=1e-12, msg=name)
        assert torch.equal(mask, found.mask) and torch.equal(keep, found.keep), name
    gate = torch.cat([r["gate"] for r in of_ranks])
    assert torch.equal(gate, dro.gate(x.flags["ok"], x.batch.group_ids, threshold=0.6)) and 0 < gate.sum() < len(x)
