"""Cases of the reflection family: a training batch's rollouts, each with its prompt's reference answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajkern._bench.case import Problem, TimedCase, with_compiled
from trajkern.testing.numerics import Outcome

ROLLOUTS, MEMBERS, LENGTH = 4096, 8, 256
OUTPUTS = ("rewards", "weights", "std", "group_score")


def _form(logprobs: Tensor, cu_seqlens: Tensor, baseline: Tensor | None = None, **_) -> Outcome:
    """The fastest way to write it here: Tensor.std takes 20 ms along a dimension that is not the last one.

    In its favour: it is given groups of one size, side by side, under ids that nobody has to read.
    """
    rollouts = cu_seqlens.shape[0] - 1
    x = logprobs.view(rollouts // MEMBERS, MEMBERS, logprobs.shape[0] // rollouts)
    s = (x - x.mean(1, keepdim=True)).square().mean(1).sqrt()
    w = s / s.sum(1, keepdim=True)
    rewards = torch.bmm(x if baseline is None else x - baseline.view_as(x), w[:, :, None])
    weights, std = (y[:, None].expand_as(x).reshape(-1) for y in (w, s))
    return {"rewards": rewards.reshape(-1), "weights": weights, "std": std, "group_score": s.amax(1)}


def problem(
    rollouts: int, length: int, *, baseline: bool = False, upstream: tuple[str, ...] = ()
) -> Callable[[str], Problem]:
    """Rollouts of one length in groups of :data:`MEMBERS`, a backward from the outputs that ``upstream`` names."""
    tokens = rollouts * length
    sizes = dict(zip(OUTPUTS, (rollouts, tokens, tokens, rollouts // MEMBERS), strict=True))

    def make(device: str) -> Problem:
        generator = torch.Generator().manual_seed(0)

        def randn(size: int) -> Tensor:
            return torch.randn(size, generator=generator).to(device)

        logprobs = randn(tokens) - 3
        inputs = {
            "logprobs": logprobs,
            "cu_seqlens": torch.arange(0, tokens + 1, length, device=device),
            "group_ids": torch.arange(rollouts, device=device) // MEMBERS,
        }
        if baseline:
            inputs["baseline"] = randn(tokens) - 3
        passes = (3 + baseline) + (2 + 2 * baseline + len({"weights", "std"} & {*upstream}) if upstream else 0)
        return Problem(
            op="reflection_rewards",
            inputs=inputs,
            rivals=with_compiled(_form),
            bare=torch.stack([logprobs, logprobs]).clone,
            bytes=passes * logprobs.nbytes,
            grad=bool(upstream),
            upstream={name: randn(sizes[name]) for name in upstream},
        )

    return make


_SHAPE = "4,096 rollouts of 256 tokens, groups of 8"

_SIZE = (ROLLOUTS, LENGTH)

CASES = (
    TimedCase("reflection_rewards", "forward", _SHAPE, problem(*_SIZE)),
    TimedCase("reflection_rewards", "forward", f"{_SHAPE}, baseline", problem(*_SIZE, baseline=True)),
    TimedCase(
        "reflection_rewards", "forward + backward of the rewards", _SHAPE, problem(*_SIZE, upstream=("rewards",))
    ),
    TimedCase(
        "reflection_rewards",
        "forward + backward",
        f"{_SHAPE}, baseline",
        problem(*_SIZE, baseline=True, upstream=OUTPUTS),
    ),
)
