"""Demonstrations and rollouts as packed batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import trajkern as tk
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.sampling import Rollouts

Piece = tuple[list[int], bool]  # tokens, and whether they are scored


def pack_pieces(trajectories: Sequence[Sequence[Piece]], group_ids: Tensor | None = None) -> tk.PackedBatch:
    """A trajectory of each sequence of pieces; by default each is a group of its own."""
    lengths = torch.tensor([0, *map(token_count, trajectories)])
    every = [piece for pieces in trajectories for piece in pieces]
    return tk.PackedBatch(
        tokens=torch.tensor([token for tokens, _ in every for token in tokens], dtype=torch.int64),
        cu_seqlens=lengths.cumsum(0),
        loss_mask=torch.tensor([scored for tokens, scored in every for _ in tokens], dtype=torch.bool),
        group_ids=torch.arange(len(trajectories)) if group_ids is None else group_ids,
    )


def token_count(pieces: Sequence[Piece]) -> int:
    """The tokens of a trajectory, or of a part of one."""
    return sum(len(tokens) for tokens, _ in pieces)


def parted(trajectories: Sequence[Sequence[Piece]], most: int | None) -> list[Sequence[Sequence[Piece]]]:
    """Runs of trajectories of at most ``most`` tokens together; one that is longer stands alone."""
    parts: list[list[Sequence[Piece]]] = []
    room = 0.0
    for trajectory in trajectories:
        length = token_count(trajectory)
        if not parts or length > room:
            parts.append([])
            room = math.inf if most is None else most
        parts[-1].append(trajectory)
        room -= length
    return list(parts)


def runs(tokens: list[int], scored: list[bool]) -> list[Piece]:
    """Maximal stretches of a rollout that are scored or not; the first is the prompt."""
    out: list[Piece] = []
    for token, flag in zip(tokens, scored, strict=True):
        if out and out[-1][1] == flag:
            out[-1][0].append(token)
        else:
            out.append(([token], flag))
    return out


def demonstration(policy: Policy, pieces: Sequence[tuple[str, bool]]) -> list[Piece]:
    """The tokens of an answer in parts, its end included and learned."""
    return [*((policy.encode(text), learned) for text, learned in pieces), ([policy.eos], True)]


def pack_rollouts(rollouts: Rollouts, rewards: Tensor, group_ids: Tensor) -> tk.PackedBatch:  # [N], [N]
    """Rollouts as trajectories of which the completions are scored."""
    return tk.PackedBatch.from_padded(
        rollouts.tokens,
        rollouts.keep,
        loss_mask=rollouts.sampled,
        group_ids=group_ids,
        rewards=rewards,
        sampler_logprobs=rollouts.logprobs,
    )


def select(batch: tk.PackedBatch, keep: Tensor) -> tk.PackedBatch:  # [N] bool
    """The trajectories of a rollout batch marked by ``keep``."""
    assert batch.rewards is not None and batch.sampler_logprobs is not None
    tokens = torch.repeat_interleave(keep, batch.lengths)
    cu_seqlens = torch.cat((batch.cu_seqlens.new_zeros(1), batch.lengths[keep].cumsum(0)))
    return tk.PackedBatch(
        batch.tokens[tokens],
        cu_seqlens,
        batch.loss_mask[tokens],
        batch.group_ids[keep],
        batch.rewards[keep],
        sampler_logprobs=batch.sampler_logprobs[tokens],
    )
