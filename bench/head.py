"""Cases of the head: log-probs and the policy loss from hidden states, beside the bare products of the same shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import trajkern as tk
from trajkern._bench.case import BARE, Function, Problem, Target, TimedCase, with_compiled
from trajkern._bench.policy_loss import token_weights
from trajkern.testing.numerics import Outcome
from trajkern.testing.registry import Inputs

CONFIG = tk.PolicyLoss("grpo")
TRAJECTORIES = 8
GATE_ROWS = 16


def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **_) -> Outcome:
    """The whole logits, as a trainer without a fused head forms them."""
    logits = (hidden @ weight.t()).float()
    return {"logprobs": logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)}


def _loss_form(of: Function, trajectory: Tensor, weights: Tensor) -> Function:
    """The clipped objective of the log-probs that ``of`` finds; each token's trajectory and weight are given."""

    def form(hidden: Tensor, weight: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, **_) -> Outcome:
        count = targets.shape[0]
        a = advantages[trajectory[:count]]
        ratio = (of(hidden=hidden, weight=weight, targets=targets)["logprobs"] - old_logprobs).exp()
        loss = -torch.minimum(ratio * a, ratio.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high) * a)
        shares = weights if count == weights.shape[0] else 1 / count  # the gate's few are a trajectory
        return {"loss": (loss * shares).sum()}

    return form


def _inputs(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> Inputs:
    g = torch.Generator(device).manual_seed(0)
    return {
        "hidden": torch.randn(rows, width, generator=g, device=device, dtype=dtype),
        "weight": torch.randn(vocabulary, width, generator=g, device=device, dtype=dtype) / width**0.5,
        "targets": torch.randint(vocabulary, (rows,), generator=g, device=device),
    }


def _loss_inputs(inputs: Inputs, trajectories: int) -> Inputs:
    """Old log-probs a step away from the policy, so that some tokens are clipped."""
    rows, device = inputs["targets"].shape[0], inputs["hidden"].device
    with torch.no_grad():
        old = tk.linear_logprobs(**inputs)
    moved = 0.1 * torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(device)
    return inputs | {
        "old_logprobs": old + moved,
        "advantages": torch.randn(trajectories, generator=torch.Generator().manual_seed(2)).to(device),
        "cu_seqlens": torch.arange(trajectories + 1, device=device) * rows // trajectories,
        "config": CONFIG,
    }


def _products(x: Inputs, count: int) -> Callable[[], object]:
    """The bare matrix products: the logits', and those of both gradients."""
    hidden, weight = x["hidden"], x["weight"]

    def run() -> None:
        logits = hidden @ weight.t()
        if count == 3:
            _ = logits @ weight, logits.t() @ hidden

    return run


def _bytes(x: Inputs, backward: bool) -> int:
    return (x["hidden"].nbytes + x["weight"].nbytes) * (2 if backward else 1)


def forward_problem(rows: int, width: int, vocabulary: int, dtype: torch.dtype) -> Callable[[str], Problem]:
    def make(device: str) -> Problem:
        x = _inputs(rows, width, vocabulary, dtype, device)
        return Problem(
            op="linear_logprobs",
            inputs=x,
            rivals=with_compiled(logprobs),
            bare=_products(x, 1),
            bytes=_bytes(x, False),
            small=_inputs(GATE_ROWS, width, vocabulary, dtype, device),
            flops=2 * rows * width * vocabulary,
        )

    return make


def loss_problem(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, **options: object
) -> Callable[[str], Problem]:
    def make(device: str) -> Problem:
        trajectories = min(TRAJECTORIES, rows)
        x = _loss_inputs(_inputs(rows, width, vocabulary, dtype, device), trajectories) | options
        few = rows < GATE_ROWS * TRAJECTORIES  # no trajectory holds the gate's rows
        small = None if few else _loss_inputs(_inputs(GATE_ROWS, width, vocabulary, dtype, device), 1)
        lengths = x["cu_seqlens"].cpu().diff()
        trajectory = torch.repeat_interleave(torch.arange(trajectories), lengths).to(device)
        weights = token_weights(torch.ones(rows, dtype=torch.bool), x["cu_seqlens"].cpu()).to(device)
        return Problem(
            op="linear_policy_loss",
            inputs=x,
            rivals=with_compiled(_loss_form(logprobs, trajectory, weights)),
            bare=_products(x, 3),
            bytes=_bytes(x, True),
            grad=True,
            upstream={"loss": torch.ones((), device=device)},
            small=small,
            flops=6 * rows * width * vocabulary,
            compose=lambda of: _loss_form(of, trajectory, weights),
        )

    return make


def _less(
    change: Callable[[Inputs], Inputs], share: float, rows: int, width: int, vocabulary: int
) -> Callable[[str], Problem]:
    """A batch with less to do, this share of it; the bare pass is the time of the whole one."""

    def make(device: str) -> Problem:
        whole = loss_problem(rows, width, vocabulary, torch.float32)(device)
        assert whole.small is not None
        return Problem(
            op=whole.op,
            inputs=change(whole.inputs),
            rivals={},
            bare=whole.step("trajkern"),
            bytes=whole.bytes,
            grad=True,
            upstream=whole.upstream,
            small=change(whole.small),
            flops=int(share * whole.flops),
        )

    return make


def _masked(x: Inputs) -> Inputs:
    rows = x["targets"].shape[0]
    return x | {"mask": torch.arange(rows) % 10 < 3}


def _half_zero(x: Inputs) -> Inputs:
    return x | {"advantages": x["advantages"] * (torch.arange(len(x["advantages"])) % 2)}


def _cases(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: str, bounds: tuple[float, float]):
    shape = f"{rows:,} × {width:,} × {vocabulary:,} {str(dtype)[6:]}"
    forward, loss = ((Target("times", bound, BARE, (device,)),) for bound in bounds)
    yield TimedCase(
        "linear_logprobs", "forward", shape, forward_problem(rows, width, vocabulary, dtype), forward, (device,)
    )
    yield TimedCase(
        "linear_policy_loss",
        "forward + backward",
        shape,
        loss_problem(rows, width, vocabulary, dtype),
        loss,
        (device,),
        memory_of="weight",
    )


_SMALL = (1024, 1024, 32768)
CASES = (
    *_cases(*_SMALL, torch.float32, "cpu", (1.10, 1.10)),
    *_cases(512, 512, 151_936, torch.float32, "cpu", (1.10, 1.10)),
    TimedCase(
        "linear_policy_loss",
        "forward + backward, workspace of 256 MiB",
        "512 × 512 × 151,936 float32",
        loss_problem(512, 512, 151_936, torch.float32, workspace_bytes=2**28),
        (Target("times", 1.10, BARE),),
        ("cpu",),
        memory_of="weight",
    ),
    TimedCase(
        "linear_policy_loss",
        "forward + backward, 30% scored",
        "1,024 × 1,024 × 32,768 float32",
        _less(_masked, 0.3, *_SMALL),
        (Target("times", 0.36, BARE),),
        ("cpu",),
    ),
    TimedCase(
        "linear_policy_loss",
        "forward + backward, half the advantages 0",
        "1,024 × 1,024 × 32,768 float32",
        _less(_half_zero, 0.5, *_SMALL),
        (Target("times", 0.70, BARE),),
        ("cpu",),
    ),
    *_cases(8192, 4096, 131_072, torch.bfloat16, "cuda", (1.10, 1.15)),
)
