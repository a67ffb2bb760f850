"""Cases over ranks: what their exchange costs beside a call that has none."""

from __future__ import annotations

import atexit
import tempfile
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import trajkern as tk
from trajkern._bench.case import BARE, Target, TimedCase
from trajkern._bench.policy_loss import problem
from trajkern._bench.recipes import Exact
from trajkern.testing.numerics import Outcome

TOKENS, TRAJECTORIES, RANKS = 32_768, 64, 2
EXCHANGES = 3  # what the ranks share, the sums of trajectories, loss and metrics
PER_TOKEN = ("logprobs", "old_logprobs", "mask")


def _batch(kind: str) -> dict[str, Any]:
    inputs = problem(TOKENS, TRAJECTORIES, backward=True)("cpu").inputs
    return {k: inputs[k] for k in (*PER_TOKEN, "advantages", "cu_seqlens")} | {"config": tk.PolicyLoss(kind)}


def _share(inputs: dict[str, Any], rank: int) -> dict[str, Any]:
    """Every second token, from the rank's on."""
    share = {k: x[rank::RANKS].contiguous() if k in PER_TOKEN else x for k, x in inputs.items()}
    return share | {"cu_seqlens": (inputs["cu_seqlens"] + RANKS - 1 - rank) // RANKS, "per_token": False}


def _outcome(logprobs: Tensor, **inputs: Any) -> Outcome:
    logprobs = logprobs.detach().requires_grad_()
    loss, _ = tk.policy_loss(logprobs, **inputs)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return {"loss": loss.detach(), "grad": grad}


def _sum(group: dist.ProcessGroup | None) -> None:
    """One exchange, of two numbers a trajectory."""
    dist.all_reduce(torch.zeros(TRAJECTORIES, 2, dtype=torch.float64), group=group)


def _until_gone(call: Callable[[], Any]) -> None:
    try:
        while True:
            call()
    except RuntimeError:  # a connection that is closed
        return


def _answer(kind: str, store: str) -> None:
    """The other rank: makes either call as often as the first rank does, until that is gone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=RANKS)
    share = _share(_batch(kind), 1) | {"sequence_group": dist.group.WORLD}
    other = dist.new_group()
    threading.Thread(target=_until_gone, args=(partial(_sum, other),), daemon=True).start()
    _until_gone(partial(_outcome, **share))


def _one_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as one of several ranks on this machine makes it, which have a thread each."""

    def alone() -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return alone


@lru_cache(maxsize=1)
def _groups(kind: str) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None]:
    """Two of this process and one that answers: in the first with this kind's other share, in the second bare sums."""
    if dist.is_initialized():
        dist.destroy_process_group()
    store = str(Path(tempfile.mkdtemp(prefix="trajkern-bench-")) / "store")
    other = mp.get_context("spawn").Process(target=_answer, args=(kind, store), daemon=True)
    other.start()
    atexit.register(other.kill)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=RANKS)
    assert dist.group.WORLD is not None
    return dist.group.WORLD, dist.new_group()


def _split(kind: str) -> Callable[[str], Any]:
    def make(device: str) -> Exact:
        inputs = _batch(kind)
        share = _share(inputs, 0)
        group, other = _groups(kind)
        split = share | {"sequence_group": group}

        def whole(**_: Any) -> Outcome:
            found = _outcome(**inputs)
            return {"loss": found["loss"], "grad": found["grad"][::RANKS]}

        def bare() -> None:
            _outcome(**share)
            for _ in range(EXCHANGES):
                _sum(other)

        return Exact(
            op="sequence_group",
            inputs={},
            ours=_one_thread(partial(_outcome, **split)),
            eager=_one_thread(whole),
            bare=_one_thread(bare),
            bytes=3 * share["logprobs"].nbytes,
            tolerance=2e-7,
        )

    return make


_WORK = (
    "policy_loss forward + backward, {}; eager is one process with all tokens, the bare pass a share and {} bare sums"
)
CASES = tuple(
    TimedCase(
        "sequence_group",
        _WORK.format(kind, EXCHANGES),
        f"{TOKENS:,} tokens of {TRAJECTORIES} trajectories, {RANKS} gloo ranks",
        _split(kind),
        (Target("times", 1.5, BARE),),
        devices=("cpu",),
        outside="ranks",
    )
    for kind in ("dapo", "gspo")
)
