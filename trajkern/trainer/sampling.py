"""Batched sampling through a key-value cache, and packing what was sampled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern.trainer.policy import Policy


class Rollouts(NamedTuple):
    """Left-padded prompts followed by right-padded completions."""

    tokens: Tensor  # [N, L]
    keep: Tensor  # [N, L] bool, True on prompt and completion, its end-of-sequence token included
    sampled: Tensor  # [N, L] bool, True on the completion
    logprobs: Tensor  # [N, L] log-prob each sampled token was drawn with, 0 elsewhere
    prompt_length: int  # columns before the completions

    def completions(self) -> list[list[int]]:
        width = self.prompt_length
        lengths = self.sampled.sum(1).tolist()
        return [row[:n] for row, n in zip(self.tokens[:, width:].tolist(), lengths, strict=True)]


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    *,
    copies: int,
    max_new: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    greedy: bool = False,
) -> Rollouts:
    """Sample ``copies`` completions of each prompt, adjacent, of at most ``max_new`` tokens."""
    width = max(map(len, prompts))
    tokens = torch.full((len(prompts), width + max_new), policy.eos)
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) : width] = torch.tensor(prompt)
        keep[row, width - len(prompt) : width] = True
    cache = policy.start(len(prompts), width + max_new)
    logits = policy.extend(tokens[:, :width], keep[:, :width], cache).repeat_interleave(copies, 0)
    cache = cache.repeat(copies)
    tokens, keep = (x.repeat_interleave(copies, 0) for x in (tokens, keep))
    logprobs = torch.zeros(tokens.shape)
    alive = torch.ones(len(tokens), dtype=torch.bool)
    end = width
    while True:
        logits = logits.float()
        drawn = logits.argmax(-1) if greedy else _draw(logits / temperature, generator)
        tokens[:, end] = torch.where(alive, drawn, policy.eos)
        logprobs[:, end] = tk.token_logprobs(logits, drawn, temperature=temperature) * alive
        keep[:, end] = alive
        alive = alive & (drawn != policy.eos)
        end += 1
        if end == tokens.shape[1] or not alive.any():
            break
        logits = policy.extend(tokens[:, end - 1 : end], keep[:, end - 1 : end], cache)
    sampled = keep[:, :end].clone()
    sampled[:, :width] = False
    return Rollouts(tokens[:, :end], keep[:, :end], sampled, logprobs[:, :end], width)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:  # [N, V] -> [N]
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
