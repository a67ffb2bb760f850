"""Cases over ranks: what their exchange costs beside a call that has none."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Callable
from functools import lru_cache
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


def _answer(kind: str, store: str) -> None:
    """The other rank: makes the call as often as the first does, until that is gone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=RANKS)
    share = _share(_batch(kind), 1) | {"sequence_group": dist.group.WORLD}
    while True:
        try:
            _outcome(**share)
        except RuntimeError:  # a connection that is closed
            return


@lru_cache(maxsize=1)
def _group(kind: str) -> dist.ProcessGroup:
    """Of this process and one that answers it with this kind's other share."""
    if dist.is_initialized():
        dist.destroy_process_group()
    store = str(Path(tempfile.mkdtemp(prefix="trajkern-bench-")) / "store")
    other = mp.get_context("spawn").Process(target=_answer, args=(kind, store), daemon=True)
    other.start()
    atexit.register(other.kill)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=RANKS)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _split(kind: str) -> Callable[[str], Any]:
    def make(device: str) -> Exact:
        inputs = _batch(kind)
        share = _share(inputs, 0)
        split = share | {"sequence_group": _group(kind)}

        def whole(**_: Any) -> Outcome:
            found = _outcome(**inputs)
            return {"loss": found["loss"], "grad": found["grad"][::RANKS]}

        return Exact(
            op="sequence_group",
            inputs={},
            ours=lambda: _outcome(**split),
            eager=whole,
            bare=lambda: _outcome(**share),
            bytes=3 * share["logprobs"].nbytes,
            tolerance=2e-7,
        )

    return make


CASES = tuple(
    TimedCase(
        "sequence_group",
        f"policy_loss forward + backward, {kind}; eager is one process with all tokens, the bare pass a share alone",
        f"{TOKENS:,} tokens of {TRAJECTORIES} trajectories, {RANKS} gloo ranks",
        _split(kind),
        (Target("times", 10, BARE),),
        devices=("cpu",),
        outside="ranks",
    )
    for kind in ("dapo", "gspo")
)
