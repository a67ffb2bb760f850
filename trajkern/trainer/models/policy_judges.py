"""A policy that recipe judge has trained, as a judge in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trajkern._checks import check_count, check_number, check_sequence, describe
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.sampling import sample
from trajkern.trainer.systems.judge import Judging
from trajkern.trainer.tasks.base import Question


class PolicyJudge:
    """Asks a policy about responses to a question in the words, and reads it by the rule, that it was trained with.

    The same arguments give the same judgements.

    Args:
        policy: the built-in transformer, or any other.
        task: what it was trained on, ``Judging(load_task(name, seed), settings)``.
        max_new: most tokens of a judgement, at least 1.
        samples: judgements of each response or pair (K), at least 1.
        temperature: of sampling, above 0.
        seed: of the draws.
    """

    def __init__(
        self,
        policy: Policy,
        task: Judging,
        *,
        max_new: int,
        samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        for name, value, kind in (("policy", policy, Policy), ("task", task, Judging)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {describe(value)}")
        self.policy, self.task = policy, task
        self._new, self._samples = check_count("max_new", max_new, low=1), check_count("samples", samples, low=1)
        self._temperature, self._seed = check_number("temperature", temperature, above=0), check_count("seed", seed)

    def scores(self, asked: Question, responses: Sequence[str]) -> Tensor:
        """K scores of each response, 0 to 10, NaN for a missing one; float32 ``[K, N]``, what
        :func:`trajkern.recipes.reward_models.vote` adds up once it is complete.

        Raises:
            ValueError: a judge of pairs.
        """
        self._check("pointwise", asked)
        _check_texts("responses", responses)
        said = self._judged([self.task.about(asked, [response]) for response in responses])
        rows = [[self.task.scores(text)[0] for text in texts] for texts in said]
        return torch.tensor(rows, dtype=torch.float32).reshape(-1, self._samples).T.contiguous()

    def about(self, asked: Question) -> Callable[[Sequence[str], Sequence[str]], Tensor]:
        """Its votes on pairs of responses to a question: what :func:`trajkern.recipes.reward_models.round_robin` asks
        for :func:`trajkern.recipes.reward_models.elo`, and ``majority`` for ``knockout``.

        The result takes P firsts and P seconds and returns float32 ``[K, P]``: 1 where the first is better, 0 where the
        second is, 0.5 where both score alike, NaN where nothing could be read.

        Raises:
            ValueError: a judge of single responses.
        """
        self._check("pairwise", asked)

        def prefer(firsts: Sequence[str], seconds: Sequence[str]) -> Tensor:
            for name, texts in (("firsts", firsts), ("seconds", seconds)):
                _check_texts(name, texts)
            if len(firsts) != len(seconds):
                raise ValueError(f"seconds must have one for each of the {len(firsts)} firsts, got {len(seconds)}")
            pairs = zip(firsts, seconds, strict=True)
            questions = [self.task.about(asked, [first, second]) for first, second in pairs]
            rows = [[self.task.preference(text) for text in texts] for texts in self._judged(questions)]
            return torch.tensor(rows, dtype=torch.float32).reshape(-1, self._samples).T.contiguous()

        return prefer

    def _check(self, form: str, asked: Question) -> None:
        if not isinstance(asked, Question):
            raise TypeError(f"asked must be a Question, got {describe(asked)}")
        if self.task.settings.form != form:
            raise ValueError(f"judge.form of the task must be {form}, got {self.task.settings.form}")

    def _judged(self, questions: Sequence[Question]) -> list[list[str]]:
        """K judgements of each question."""
        if not questions:
            return []
        prompts = [self.policy.prompt(question) for question in questions]
        generator = torch.Generator(self.policy.head_arguments()["weight"].device).manual_seed(self._seed)
        options: dict[str, Any] = {"max_new": self._new, "temperature": self._temperature}
        drawn = sample(self.policy, prompts, copies=self._samples, generator=generator, **options)
        texts = [self.policy.text(tokens) for tokens in drawn.completions()]
        return [texts[at : at + self._samples] for at in range(0, len(texts), self._samples)]


def _check_texts(name: str, texts: Sequence[str]) -> None:
    check_sequence(name, texts, "texts")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a sequence of texts, got {describe(text)} in it")
