"""Cases of the logprob family: the head's logits of a rollout batch, and a call on tiny input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from trajkern._bench.case import BARE, Problem, Target, TimedCase, with_compiled
from trajkern.testing.numerics import Outcome

VOCABULARY = 151_936
GATE_ROWS = 16  # a row's result does not depend on the others


def token_logprobs(logits: Tensor, targets: Tensor, **_) -> Outcome:
    """Faster here than gather - logsumexp and than cross_entropy."""
    return {"logprobs": logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)}


def entropy(logits: Tensor, targets: Tensor, **_) -> Outcome:
    """Faster here than logsumexp - sum(softmax * logits), as trainers write it."""
    logp = logits.float().log_softmax(-1)
    return {
        "logprobs": logp.gather(-1, targets[:, None]).squeeze(-1),
        "entropy": -torch.linalg.vecdot(logp.exp(), logp),
    }


def _problem(
    op: str,
    rows: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: str,
    *,
    grad: bool = False,
    backward: bool = False,
    inplace: bool = False,
) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator, device=device, dtype=dtype) * 3
    inputs = {"logits": logits, "targets": torch.randint(vocabulary, (rows,), generator=generator, device=device)}
    if inplace:
        inputs["inplace_backward"] = True
    form = entropy if op == "token_stats" else token_logprobs
    outputs = ("logprobs", "entropy") if op == "token_stats" else ("logprobs",)
    upstream = {k: torch.randn(rows, generator=generator, device=device) for k in outputs} if backward else {}
    chosen = torch.linspace(0, rows - 1, min(rows, GATE_ROWS)).long().to(device)
    return Problem(
        op=op,
        inputs=inputs,
        rivals=with_compiled(form),
        bare=_bare(logits, backward, inplace),
        bytes=logits.nbytes * (3 if backward else 1),  # the backward reads the logits again and writes their gradient
        grad=grad or backward,
        upstream=upstream,
        pick=lambda name, x: x[chosen],
    )


def _bare(logits: Tensor, backward: bool, inplace: bool) -> Callable[[], object]:
    """One read forward; one read and one write, into fresh memory or in place, backward."""
    if not backward:
        return logits.sum
    scratch = logits.clone() if inplace else logits
    return lambda: (logits.sum(), scratch.mul_(1) if inplace else logits * 2)


def problem(op: str, rows: int, vocabulary: int, dtype: torch.dtype, **options) -> Callable[[str], Problem]:
    return lambda device: _problem(op, rows, vocabulary, dtype, device, **options)


def _cases(rows: int, dtype: torch.dtype, devices: tuple[str, ...]):
    """Forward, forward + backward, without and with entropy, in place."""
    case = partial(TimedCase, shape=f"{rows:,} × {VOCABULARY:,} {str(dtype)[6:]}", devices=devices)
    make = partial(problem, rows=rows, vocabulary=VOCABULARY, dtype=dtype)
    faster = (Target("fast", 4, "eager"), Target("fast", 3, "torch.compile"))
    in_place = Target("memory", 1.0, devices=("cpu", "cuda"))
    yield case("token_logprobs", "forward", make=make("token_logprobs"), targets=(Target("times", 1.6, BARE),))
    yield case("token_stats", "forward, entropy", make=make("token_stats"), targets=(Target("times", 2.1, BARE),))
    yield case(
        "token_logprobs",
        "forward + backward",
        make=make("token_logprobs", backward=True),
        targets=faster,
        memory_of="logits",
    )
    yield case(
        "token_logprobs",
        "forward + in-place backward",
        make=make("token_logprobs", backward=True, inplace=True),
        targets=(*faster, in_place),
        memory_of="logits",
    )
    yield case(
        "token_stats", "forward + backward, entropy", make=make("token_stats", backward=True), memory_of="logits"
    )


def _tiny(op: str, work: str, targets: tuple[Target, ...] = (), **options) -> TimedCase:
    return TimedCase(op, work, "4 × 32 float32", problem(op, 4, 32, torch.float32, **options), targets, host=True)


CASES = (
    *_cases(256, torch.float32, ("cpu",)),
    *_cases(8192, torch.bfloat16, ("cuda",)),
    _tiny("token_logprobs", "forward with grad", (Target("seconds", 40e-6),), grad=True),
    _tiny("token_logprobs", "forward + backward", backward=True),
)
