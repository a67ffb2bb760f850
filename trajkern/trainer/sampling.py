"""Batched sampling through a key-value cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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


class Drawn(NamedTuple):
    """Right-padded continuations, a column a draw."""

    tokens: Tensor  # [N, S], the end-of-sequence token on padding
    keep: Tensor  # [N, S] bool
    logprobs: Tensor  # [N, S], 0 on padding


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
    tokens, keep = left_padded(prompts, policy.eos)
    logits, cache = read_prompts(policy, tokens, keep, copies, max_new)
    most = torch.full((len(logits),), max_new)
    drawn = draw(policy, logits, cache, most, generator=generator, temperature=temperature, greedy=greedy)
    tokens, keep = (x.repeat_interleave(copies, 0) for x in (tokens, keep))
    return Rollouts(
        torch.cat((tokens, drawn.tokens), 1),
        torch.cat((keep, drawn.keep), 1),
        torch.cat((torch.zeros_like(keep), drawn.keep), 1),
        F.pad(drawn.logprobs, (tokens.shape[1], 0)),
        tokens.shape[1],
    )


def left_padded(prompts: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Token ids and where they are real, ``[N, longest]`` each."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[value] * (width - len(prompt)) + prompt for prompt in prompts])
    keep = torch.arange(width) >= width - torch.tensor([[len(prompt)] for prompt in prompts])
    return tokens, keep


@torch.no_grad()
def read_prompts(policy: Policy, tokens: Tensor, keep: Tensor, copies: int, room: int) -> tuple[Tensor, Any]:
    """The logits after each prompt, ``copies`` times, and a cache with ``room`` more columns; each is read once."""
    cache = policy.start(len(tokens), tokens.shape[1] + room)
    logits = policy.extend(tokens, keep, cache).repeat_interleave(copies, 0)
    return logits, cache.repeat(copies)


@torch.no_grad()
def draw(
    policy: Policy,
    logits: Tensor,  # [N, V]
    cache: Any,
    most: Tensor,  # [N]
    *,
    generator: torch.Generator,
    temperature: float = 1.0,
    greedy: bool = False,
) -> Drawn:
    """Continue each sequence of the cache until its end-of-sequence token, or to its ``most`` tokens (at least 1)."""
    tokens, keeps, logprobs = [], [], []
    alive, longest = torch.ones(len(logits), dtype=torch.bool), int(most.max())
    while True:
        logits = logits.float()
        drawn = logits.argmax(-1) if greedy else _draw(logits / temperature, generator)
        tokens.append(torch.where(alive, drawn, policy.eos))
        logprobs.append(tk.token_logprobs(logits, drawn, temperature=temperature) * alive)
        keeps.append(alive)
        alive = alive & (drawn != policy.eos) & (len(tokens) < most)
        if len(tokens) == longest or not alive.any():
            return Drawn(*(torch.stack(x, 1) for x in (tokens, keeps, logprobs)))
        logits = policy.extend(tokens[-1][:, None], keeps[-1][:, None], cache)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:  # [N, V] -> [N]
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
