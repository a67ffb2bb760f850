"""vote@k: how often what k samples of a question answer together is right."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from trajkern.recipes import rlcr
from trajkern.trainer.tasks.base import Question, Task
from trajkern.trainer.tasks.capabilities import VoteTask


def votes(
    task: Task,
    questions: Sequence[Question],
    texts: Sequence[str],
    rewards: Tensor,  # [Q, n]
    ratings: Tensor | None = None,  # [Q n]
) -> dict[str, float]:
    """The mean reward of the answer that k of n samples agree on, for k = 2, 4, ... and n; none where no vote is cast.

    ``vote@k`` is the majority's; of a task whose answers state a confidence also ``weighted_vote@k``, each sample
    counting with its own: :func:`trajkern.recipes.rlcr.vote`, whose rule for ties it is; where there are ratings also
    ``meta_vote@k``, the majority of the better rated half of the k. The mean is over questions and over each question's
    n runs of k consecutive samples, the first following the last.

    Args:
        task: one with ``ballot``; of any other the result is empty.
        questions, texts: Q n of them, the samples of a question adjacent.
        rewards: of each text.
        ratings: of each text, higher where it is likelier right.

    Raises:
        ValueError: texts of one question and one ballot that have different rewards.
    """
    if not isinstance(task, VoteTask):
        return {}
    count, samples = rewards.shape
    ballots = [task.ballot(question, text) for question, text in zip(questions, texts, strict=True)]
    methods = {"vote": "majority"}
    stated = [float("nan")] * len(texts)
    if task.states_confidence:
        methods["weighted_vote"] = "weighted"
        read = [task.read(question, text).confidence for question, text in zip(questions, texts, strict=True)]
        stated = [float("nan") if confidence is None else confidence for confidence in read]
    if ratings is not None:
        methods["meta_vote"] = "majority"
    earned = rewards.flatten().tolist()
    bounds = range(0, count * samples, samples)
    worth = [_worth(task, questions[at], ballots[at : at + samples], earned[at : at + samples]) for at in bounds]
    sizes = sorted({2**i for i in range(1, samples.bit_length())} | {samples} - {1})
    means: dict[str, float] = {}
    for name, method in methods.items():
        rated = ratings.tolist() if ratings is not None and name == "meta_vote" else None
        for k in sizes:
            won = 0.0
            for at, value in zip(bounds, worth, strict=True):
                for first in range(samples):
                    some = [at + (first + n) % samples for n in range(k)]
                    if rated is not None:
                        some = _better_half(some, rated)
                    vote = rlcr.vote([ballots[n] for n in some], [stated[n] for n in some], method=method)
                    won += value[vote.answer]
            means[f"{name}@{k}"] = won / (count * samples)
    return means


def _better_half(samples: list[int], rated: list[float]) -> list[int]:
    """Those rated highest, the earlier of equal ones, in their order; at least one."""
    best = sorted(samples, key=lambda n: -rated[n])[: max(len(samples) // 2, 1)]
    return [n for n in samples if n in best]


def _worth(
    task: Task, question: Question, ballots: Sequence[Hashable | None], rewards: Sequence[float]
) -> dict[Hashable | None, float]:
    """The reward of each answer to a question; 0 for none."""
    worth: dict[Hashable | None, float] = {}
    for ballot, reward in zip(ballots, rewards, strict=True):
        if ballot is not None and worth.setdefault(ballot, reward) != reward:
            expected = f"a ballot of task {task.name} must be worth one reward"
            raise ValueError(f"{expected}; {ballot!r} has {worth[ballot]} and {reward} for {question.prompt!r}")
    return {**worth, None: 0.0}
