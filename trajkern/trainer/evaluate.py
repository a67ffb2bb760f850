"""Accuracy on questions that were never trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trajkern.trainer.policy import Policy
from trajkern.trainer.sampling import sample
from trajkern.trainer.tasks import Question, Task

_SEED = 20_260_101  # every evaluation draws the same random numbers, apart from training's


class Accuracy(NamedTuple):
    """Shares of questions answered: by a sample on average, by any of k samples, by the most likely text."""

    pass_at_1: float
    pass_at_k: float
    greedy: float | None


def rewards_of(policy: Policy, task: Task, questions: list[Question], completions: list[list[int]]) -> torch.Tensor:
    """The verifier's 0 or 1 for each completion of its question, ``[N]``."""
    pairs = zip(questions, completions, strict=True)
    return torch.tensor([task.reward(question, policy.text(tokens)) for question, tokens in pairs])


def each(items: list, copies: int) -> list:
    """Every item ``copies`` times, copies adjacent."""
    return [item for item in items for _ in range(copies)]


def evaluate(
    policy: Policy,
    task: Task,
    questions: list[Question],
    *,
    samples: int,
    max_new: int,
    greedy: bool = False,
    batch: int = 128,
) -> Accuracy:
    """Sample each question ``samples`` times at temperature 1, and once greedily where asked; ``batch`` at a time."""
    generator = torch.Generator().manual_seed(_SEED)
    passed, best = [], []
    for begin in range(0, len(questions), batch):
        some = questions[begin : begin + batch]
        prompts = [policy.prompt(question) for question in some]
        drawn = sample(policy, prompts, copies=samples, max_new=max_new, generator=generator)
        passed.append(rewards_of(policy, task, each(some, samples), drawn.completions()).view(-1, samples))
        if greedy:
            likely = sample(policy, prompts, copies=1, max_new=max_new, generator=generator, greedy=True)
            best.append(rewards_of(policy, task, some, likely.completions()))
    rewards = torch.cat(passed)
    return Accuracy(
        rewards.mean().item(), rewards.amax(1).mean().item(), torch.cat(best).mean().item() if greedy else None
    )
