"""Accuracy on questions that were never trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trajkern.trainer.calibration import calibration
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.ranks import ALONE, Ranks
from trajkern.trainer.sampling import environment, sample
from trajkern.trainer.tasks.base import Answer, Question, Task
from trajkern.trainer.tasks.capabilities import FamilyTask
from trajkern.trainer.votes import votes

FIGURES = ("pass", "greedy", "distinct", "vote", "weighted_vote", "meta_vote")  # an evaluation's, up to an @
_SEED = 20_260_101  # every evaluation draws the same random numbers, apart from training's


@dataclass(frozen=True)
class Accuracy:
    """Shares of questions answered: by a sample on average, by any of k samples, by the most likely text.

    ``details`` holds pass@2, pass@4, ... up to the number of samples, vote@2, vote@4, ... where the task's answers can
    be voted on, and what the task reports besides; ``families`` holds pass@1 of the questions of each family, where the
    task has families. ``pass_at`` holds pass@1, pass@2, ..., pass@k; ``distinct`` is how many different texts of a
    question's samples are right, on average over questions. Where answers state a confidence, ``reliability`` holds a
    bin a tenth: how many stated one of it, their mean, and the share of them that is right; a confidence on a border is
    in the bin above it.
    """

    pass_at_1: float
    pass_at_k: float
    greedy: float | None
    details: dict[str, float | None] = field(default_factory=dict)
    families: dict[str, float] = field(default_factory=dict)
    pass_at: list[float] = field(default_factory=list)
    distinct: float | None = None
    reliability: list[list[float]] = field(default_factory=list)


def rewards_of(policy: Policy, task: Task, questions: Sequence[Question], completions: list[list[int]]) -> Tensor:
    """The verifier's reward for each completion of its question, ``[N]``."""
    pairs = zip(questions, completions, strict=True)
    earned = [task.reward(question, policy.text(tokens)) for question, tokens in pairs]
    return torch.tensor(earned, dtype=torch.float32)  # a count or a verdict is a reward, too


def each(items: Sequence, copies: int) -> list:
    """Every item ``copies`` times, copies adjacent."""
    return [item for item in items for _ in range(copies)]


def pass_at(rewards: Tensor) -> list[float]:  # [Q, n]
    """The best reward among k of the n samples of a question, drawn without replacement, as is to be expected: where
    rewards are 0 or 1, the chance that they hold a right one. The means for k = 1, ..., n."""
    n = rewards.shape[1]
    ordered = rewards.double().sort(1).values.mean(0).tolist()
    chances = [[math.comb(at, k - 1) / math.comb(n, k) for at in range(n)] for k in range(1, n + 1)]
    return [sum(chance * x for chance, x in zip(some, ordered, strict=True)) for some in chances]


def distinct_right(rewards: Tensor, texts: Sequence[str]) -> float:  # [Q, n], Q n texts
    """How many different right texts the samples of a question hold, on average."""
    n = rewards.shape[1]
    right = {
        (at // n, text)
        for at, (text, reward) in enumerate(zip(texts, rewards.flatten().tolist(), strict=True))
        if reward > 0
    }
    return len(right) / len(rewards)


def reliability(answers: Sequence[Answer]) -> list[list[float]]:
    """Of the answers that state a confidence, a bin a tenth: how many, their mean confidence, the share that is right;
    zeros where there are none."""
    stated = [(a.confidence, float(a.correct)) for a in answers if a.confidence is not None]
    bins: list[list[tuple[float, float]]] = [[] for _ in range(10)]
    for confidence, correct in stated:
        bins[min(int(10 * confidence + 1e-9), 9)].append((confidence, correct))
    means = [[sum(x) / len(some) for x in zip(*some, strict=True)] if some else [0.0, 0.0] for some in bins]
    return [[len(some), *mean] for some, mean in zip(bins, means, strict=True)]


def evaluate(
    policy: Policy,
    task: Task,
    questions: list[Question],
    *,
    samples: int,
    max_new: int,
    greedy: bool = False,
    batch: int = 128,
    prompt: Callable[[Question], list[int]] | None = None,
    rate: Callable[[Sequence[Question], Sequence[str]], Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> Accuracy:
    """Sample each question ``samples`` times at temperature 1, and once greedily where asked; ``batch`` at a time.

    The ranks share the samples, and all get the result. ``rate`` says how likely texts are right, for the votes.
    """
    generator, prompt = torch.Generator(ranks.device).manual_seed(_SEED), prompt or policy.prompt
    passed, best, asked, texts = [], [], [], []
    for begin in range(0, len(questions), batch):
        some = questions[begin : begin + batch]
        prompts, many = [prompt(question) for question in some], each(some, samples)
        where: dict[str, Any] = {"max_new": max_new, "generator": generator, "ranks": ranks}
        drawn = sample(policy, prompts, copies=samples, environment=environment(policy, task, many), **where)
        completions = ranks.gather(drawn.completions())
        passed.append(rewards_of(policy, task, many, completions).view(-1, samples))
        asked += many
        texts += [policy.text(tokens) for tokens in completions]
        if greedy:
            talk = environment(policy, task, some)
            likely = sample(policy, prompts, copies=1, environment=talk, greedy=True, **where)
            best.append(rewards_of(policy, task, some, ranks.gather(likely.completions())))
    rewards = torch.cat(passed)
    by_k, powers = pass_at(rewards), [2**i for i in range(1, samples.bit_length()) if 2**i < samples]
    details: dict[str, float | None] = {f"pass@{k}": by_k[k - 1] for k in powers}
    details |= votes(task, asked, texts, rewards, rate(asked, texts) if rate else None)
    details |= calibration(task, asked, texts)
    own = task.statistics(asked, texts)
    if taken := [name for name in own if name in details or name.partition("@")[0] in FIGURES]:
        raise ValueError(f"statistics of task {task.name} must not have the names of an evaluation, got {taken[0]!r}")
    details |= own
    return Accuracy(
        rewards.mean().item(),
        rewards.amax(1).mean().item(),
        torch.cat(best).mean().item() if greedy else None,
        {k: None if v is None or v != v else float(v) for k, v in details.items()},  # JSON has no NaN
        by_family(task, questions, rewards),
        by_k,
        distinct_right(rewards, texts),
        reliability([task.read(q, t) for q, t in zip(asked, texts, strict=True)]) if task.states_confidence else [],
    )


def by_family(task: Task, questions: Sequence[Question], rewards: Tensor) -> dict[str, float]:  # [Q, n]
    """The mean reward of each family's questions; empty where the task has no families."""
    if not isinstance(task, FamilyTask):
        return {}
    means: dict[str, list[float]] = {}
    for question, mean in zip(questions, rewards.mean(1, dtype=torch.float64).tolist(), strict=True):
        means.setdefault(task.family(question), []).append(mean)
    return {family: sum(some) / len(some) for family, some in means.items()}
