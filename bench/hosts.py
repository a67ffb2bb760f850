"""Cases of the adapters: a host's loss over its packed sequences, in one call and sequence by sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trajkern._bench.case import Target, TimedCase
from trajkern._bench.recipes import Exact
from trajkern.integrations import prime_rl
from trajkern.testing.numerics import Outcome

TOKENS, SEQUENCES = 32_768, 256
LOW = HIGH = 0.2
KL_TAU = 1e-3


def _rl_loss_fn() -> Callable[..., Any]:
    """As prime-rl's ``setup_rl_loss_fn`` makes it of a custom loss."""
    custom_fn, kwargs = prime_rl.policy_loss, {"kind": "default", "kl_tau": KL_TAU}
    return lambda inputs: custom_fn(inputs, **kwargs)


def _mean(x: Tensor, where: Tensor) -> Tensor:
    return x[where].sum() / where.sum().clamp_min(1)


def _sequence(new: Tensor, old: Tensor, a: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    """DPPO's loss with a squared log-ratio, and the seven metrics that prime-rl tells of a sequence."""
    log_ratio = new - old
    ratio = log_ratio.exp()
    moved, up = new.exp() - old.exp(), a > 0
    far = torch.where(up, moved > HIGH, moved < -LOW)
    dropped, kept = mask & far, mask & ~far
    loss = (mask * KL_TAU * log_ratio.square() - kept * a * ratio).sum()
    mismatch = ratio - log_ratio - 1
    told = ((mismatch, dropped), (mismatch, kept), (far, mask), (far & (a < 0), mask), (far & up, mask))
    return loss, [_mean(x, where) for x, where in (*told, (up, dropped), (a < 0, dropped))]


def _backward(new: Tensor, loss: Tensor, metrics: Tensor) -> Outcome:
    (grad,) = torch.autograd.grad(loss, new)
    return {"loss": loss.detach(), "metrics": metrics.detach(), "grad": grad}


def _loop(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, lengths: list[int]) -> Outcome:
    new = new.detach().requires_grad_()
    streams = (x.split(lengths) for x in (new, old, advantages, mask))
    losses, metrics = zip(*(_sequence(*x) for x in zip(*streams, strict=True)), strict=True)
    loss = losses[0]
    for x in losses[1:]:
        loss = loss + x
    stacked = torch.stack([torch.stack(x) for x in zip(*metrics, strict=True)])
    return _backward(new, loss / TOKENS, stacked)


def _packed(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, lengths: list[int]) -> Outcome:
    new = new.detach().requires_grad_()
    streams = [x.split(lengths) for x in (new, old, advantages, mask)]
    none, scales = (None, None, None), (TOKENS, 1, 1)
    loss, metrics = prime_rl.compute_loss(
        streams[0], streams[1], None, streams[2], streams[3], *none, _rl_loss_fn(), *scales
    )
    return _backward(new, loss, torch.stack(list(metrics.values())))


def _compute_loss(device: str) -> Exact:
    generator = torch.Generator().manual_seed(0)
    cuts = (torch.randperm(TOKENS - 1, generator=generator)[: SEQUENCES - 1] + 1).sort().values
    bounds = torch.cat((torch.tensor([0]), cuts, torch.tensor([TOKENS])))
    old = -torch.rand(TOKENS, generator=generator) * 2
    inputs = {
        "new": old + 0.3 * torch.randn(TOKENS, generator=generator),
        "old": old,
        "advantages": torch.randn(TOKENS, generator=generator),
        "mask": torch.rand(TOKENS, generator=generator) < 0.7,
    }
    inputs = {name: x.to(device) for name, x in inputs.items()}
    return Exact(
        op="prime_rl.compute_loss",
        inputs={**inputs, "lengths": bounds.diff().tolist()},
        ours=_packed,
        eager=_loop,
        bare=torch.stack([inputs["new"]] * 2).clone,
        bytes=4 * inputs["new"].nbytes + inputs["mask"].nbytes,
        tolerance=2e-6,
    )


CASES = (
    TimedCase(
        "prime_rl.compute_loss",
        "forward + backward with its metrics; eager is the loop over sequences",
        f"{TOKENS:,} tokens of {SEQUENCES} sequences",
        _compute_loss,
        (Target("fast", 5, "eager"),),
        outside="hosts",
    ),
)
