"""Rollouts with everything that a credit may read."""

from __future__ import annotations

from typing import Any

import torch

import trajkern as tk
from trajkern import credit


def rollouts_of(seed: int, dtype: torch.dtype = torch.float64, **replaced: Any) -> credit.Rollouts:
    """Three groups of four rollouts of 4 to 9 tokens, with calls in most, and NaN nowhere."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.arange(3).repeat_interleave(4)
    lengths = torch.randint(4, 10, (12,), generator=g)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    tokens = int(bounds[-1])
    mask = torch.rand(tokens, generator=g) < 0.7
    mask[bounds[:-1]] = False
    start = bounds[:-1] + 1
    has = torch.rand(12, generator=g) < 0.8
    owner = torch.arange(12)[has].repeat_interleave(2)
    index = torch.arange(2).repeat(int(has.sum()))
    begin = start[owner] + index
    calls = tk.Spans(begin, begin + 1, owner, index, tokens)
    logprobs = -torch.rand(tokens, generator=g, dtype=dtype)
    batch = tk.PackedBatch(
        torch.randint(0, 9, (tokens,), generator=g),
        bounds,
        mask,
        groups,
        torch.randint(0, 2, (12,), generator=g).to(dtype),
        sampler_logprobs=logprobs,
    )
    known: dict[str, Any] = {
        "rewards": {"reward": batch.rewards, "tone": torch.randn(12, generator=g, dtype=dtype)},
        "spans": {"call": calls},
        "span_rewards": {"call": torch.randn(len(calls), generator=g, dtype=dtype)},
        "flags": {
            "ok": torch.rand(12, generator=g) < 0.7,
            "fine": torch.rand(12, generator=g) < 0.8,
        },
        "teacher_logprobs": -torch.rand(tokens, generator=g, dtype=dtype),
    }
    return credit.Rollouts(batch, **(known | replaced))
