"""Cases of the advantage family: group statistics of many trajectories, and scans over a packed batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajkern._bench.case import Problem, Target, TimedCase, with_compiled
from trajkern.testing.numerics import Outcome

TOKENS, TRAJECTORIES = 2**20, 1024
GATE_TRAJECTORIES = 8  # the reference takes one token at a time
GAMMA, LAM = 0.99, 0.95


def _group_form(dense_ids: Tensor, groups: int) -> Callable[..., Outcome]:
    """Mean, then squared deviations, summed by index; the fastest way to write it here.

    In its favour: it is given dense ids (no unique) and how many there are, and no group of one to make an exception
    of. Sums by scatter_add run faster than by index_add, and one division a group than one a trajectory.
    """

    def form(rewards: Tensor, **_) -> Outcome:
        zero = rewards.new_zeros(groups)
        count = zero.scatter_add(0, dense_ids, torch.ones_like(rewards))
        mean = zero.scatter_add(0, dense_ids, rewards) / count
        d = rewards - mean.gather(0, dense_ids)
        variance = zero.scatter_add(0, dense_ids, d * d) / (count - 1)
        return {"advantages": d * (1 / (variance.sqrt() + 1e-6)).gather(0, dense_ids)}

    return form


def groups(trajectories: int, mean_size: int, grad: bool = False) -> Callable[[str], Problem]:
    """Scores of 0 to 64 points in groups of 2 to 2 * mean_size - 2, shuffled, under ids that are not dense."""

    def make(device: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        groups = trajectories // mean_size
        sizes = uneven(trajectories, groups, (2, 2 * mean_size - 1), generator)
        order = torch.randperm(trajectories, generator=generator)
        dense = torch.repeat_interleave(torch.arange(groups), sizes)[order]
        ids = torch.randperm(4 * groups, generator=generator)[:groups][dense]
        rewards = (torch.randint(65, (trajectories,), generator=generator) / 64).to(device)
        return Problem(
            op="group_advantages",
            inputs={"rewards": rewards, "group_ids": ids.to(device)},
            rivals=with_compiled(_group_form(dense.to(device), groups)),
            bare=rewards.clone,
            bytes=2 * rewards.nbytes + ids.nbytes,
            grad=grad,
        )

    return make


def uneven(total: int, count: int, bounds: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Sizes that add up to ``total``: half drawn within ``bounds``, the others as far on the mean's other side.

    What does not divide goes to the last one.
    """
    mean = total // count
    half = torch.randint(*bounds, (count // 2,), generator=generator)
    sizes = torch.cat([half, 2 * mean - half, torch.full((count % 2,), mean)])
    sizes[-1] += total - sizes.sum()
    return sizes


def scan(op: str, tokens: int = TOKENS, trajectories: int = TRAJECTORIES) -> Callable[[str], Problem]:
    """Over trajectories of a half to one and a half times their mean length.

    The rival is a trainer's loop over the columns of padded rows.
    """

    def make(device: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        mean = tokens // trajectories
        lengths = uneven(tokens, trajectories, (mean // 2, mean + 1), generator)
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(device)
        gated = int(cu_seqlens[: GATE_TRAJECTORIES + 1][-1])
        rewards, values = (torch.randn(tokens, generator=generator).to(device) for _ in range(2))
        inputs = {"rewards": rewards, "cu_seqlens": cu_seqlens, "gamma": GAMMA}
        if op == "gae":
            inputs |= {"values": values, "lam": LAM}
        return Problem(
            op=op,
            inputs=inputs,
            rivals={"eager": _padded_form(op, lengths.to(device), rewards, values)},
            bare=torch.stack([rewards, values]).clone if op == "gae" else rewards.clone,
            bytes=rewards.nbytes * (4 if op == "gae" else 2),
            pick=lambda name, x: x[: GATE_TRAJECTORIES + 1] if name == "cu_seqlens" else x[:gated],
        )

    return make


def _padded_form(op: str, lengths: Tensor, rewards: Tensor, values: Tensor) -> Callable[..., Outcome]:
    """In its favour: it is given padded rows, time first, and the places of their tokens."""
    n, longest = lengths.shape[0], int(lengths.max())
    real = torch.arange(longest, device=lengths.device) < lengths[:, None]  # [N, longest]
    places = torch.arange(longest * n, device=lengths.device).view(longest, n).T[real]  # [T]

    def padded(x: Tensor) -> Tensor:  # [T] -> [longest, N]
        return x.new_zeros(longest * n).index_copy(0, places, x).view(longest, n)

    padded_rewards = padded(rewards)
    padded_values = padded(values if op == "gae" else torch.zeros_like(rewards))
    decay = GAMMA * (LAM if op == "gae" else 1.0)

    def form(**_) -> Outcome:
        out = torch.empty_like(padded_rewards)
        running, next_value = padded_rewards.new_zeros(n), padded_rewards.new_zeros(n)
        for t in range(longest - 1, -1, -1):
            delta = padded_rewards[t] + GAMMA * next_value - padded_values[t]
            running = torch.add(delta, running, alpha=decay, out=out[t])
            next_value = padded_values[t]
        advantages = out.view(-1)[places]
        if op == "gae":
            return {"advantages": advantages, "returns": advantages + values}
        return {"returns": advantages}

    return form


def _whiten_form(x: Tensor, mask: Tensor, **_) -> Outcome:
    count = mask.sum()
    mean = torch.where(mask, x, 0).sum() / count
    centred = torch.where(mask, x - mean, 0)
    return {"whitened": centred * (centred.square().sum() / (count - 1) + 1e-8).rsqrt()}


def masked(tokens: int) -> Callable[[str], Problem]:
    """``whiten`` of 70% of the tokens."""

    def make(device: str) -> Problem:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, generator=generator).to(device)
        mask = (torch.rand(tokens, generator=generator) > 0.3).to(device)
        return Problem(
            op="whiten",
            inputs={"x": x, "mask": mask},
            rivals=with_compiled(_whiten_form),
            bare=x.clone,
            bytes=2 * x.nbytes + mask.nbytes,
        )

    return make


CASES = (
    TimedCase("group_advantages", "forward", "4,096 trajectories, 512 groups", groups(4096, 8)),
    TimedCase(
        "group_advantages",
        "forward",
        "65,536 trajectories, 8,192 groups",
        groups(65_536, 8),
        targets=(Target("fast", 5, "eager"),),
    ),
    TimedCase(
        "group_advantages",
        "forward with grad",
        "16 trajectories, 4 groups",
        groups(16, 4, grad=True),
        targets=(Target("seconds", 40e-6),),
        host=True,
    ),
    TimedCase("discounted_returns", "forward", "1,048,576 tokens", scan("discounted_returns")),
    TimedCase("gae", "forward", "1,048,576 tokens", scan("gae")),
    TimedCase("whiten", "forward", "1,048,576 tokens, mask", masked(TOKENS)),
)
