"""Demonstrations and rollouts as packed batches."""

from __future__ import annotations

import torch
from torch import Tensor

import trajkern as tk
from trajkern.trainer.policy import Policy
from trajkern.trainer.sampling import Rollouts
from trajkern.trainer.tasks import Question


def pack_demonstrations(policy: Policy, questions: list[Question]) -> tk.PackedBatch:
    """Each question's prompt and answer as one trajectory; the answer is scored."""
    pairs = [(policy.prompt(q), policy.answer(q.answer)) for q in questions]
    lengths = torch.tensor([0] + [len(prompt) + len(answer) for prompt, answer in pairs])
    return tk.PackedBatch(
        tokens=torch.tensor([token for prompt, answer in pairs for token in prompt + answer]),
        cu_seqlens=lengths.cumsum(0),
        loss_mask=torch.tensor([scored for p, a in pairs for scored in [False] * len(p) + [True] * len(a)]),
        group_ids=torch.arange(len(pairs)),
    )


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
