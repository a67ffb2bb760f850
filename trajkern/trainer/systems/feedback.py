"""Evaluative and directive feedback: a verdict on the rollout, and what the policy would say that was given a hint."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from trajkern.recipes import feedback
from trajkern.trainer.packing import Piece, demonstration
from trajkern.trainer.systems.base import Found, Played, System
from trajkern.trainer.systems.scoring import score_pieces
from trajkern.trainer.tasks.base import Question

MARK = "|"  # between a hint and the question, for a model of characters


class HintedTeacher(System):
    """The policy is its own teacher. Rollouts that the task has no hint for (the right ones) take no directive term.

    A share of the warm-up's demonstrations are shown with a hint, so that the policy can read one.
    """

    def demonstration(self, question: Question) -> list[Piece]:
        number = zlib.crc32(question.prompt.encode())
        if number % 1000 >= 1000 * self.config.feedback.hinted:
            return super().demonstration(question)
        lines = question.answer.split("\n")
        at = number // 1000 % len(lines)
        hint = self.task.hint(question, "\n".join(lines[:at]))
        shown = self.policy.prompt(hinted(question, hint or ""))
        return [(shown, False), *demonstration(self.policy, self.task.pieces(question))]

    def credit(self, played: Played, signals: dict[str, Tensor]) -> Found:
        settings, batch = self.config.feedback, played.batch
        assert batch.sampler_logprobs is not None
        verdict = 2 * (signals["rewards"] > 0).float() - 1
        teacher = teacher_logprobs(self, played, self.config.temperature)
        advantages = feedback.token_advantages(
            verdict,
            teacher,
            batch.sampler_logprobs,
            batch.loss_mask,
            batch.cu_seqlens,
            reward_weight=settings.reward_weight,
            directive_weight=settings.directive_weight,
        )
        gap = (teacher - batch.sampler_logprobs)[batch.loss_mask]
        return Found(advantages, per_token=True, values={"directive": gap})


def hinted(question: Question, hint: str) -> Question:
    return question._replace(prompt=f"{hint}{MARK}{question.prompt}", text=f"{question.text}\nHint: {hint}")


def teacher_logprobs(system: System, played: Played, temperature: float) -> Tensor:
    """log p of every token under the policy that is shown the task's hint, ``[T]``; its own where there is no hint."""
    batch, policy = played.batch, system.policy
    assert batch.sampler_logprobs is not None
    bounds, taught, pieces = batch.cu_seqlens.tolist(), [], []
    for n, (question, text) in enumerate(zip(played.questions, played.texts, strict=True)):
        hint = None if played.rewards[n] else system.task.hint(question, text)
        if hint is None:
            continue
        tokens, scored = (x[bounds[n] : bounds[n + 1]].tolist() for x in (batch.tokens, batch.loss_mask))
        taught.append(n)
        rest = _runs(tokens, scored)[1:]  # without the prompt
        pieces.append([(policy.prompt(hinted(question, hint)), False), *rest])
    if not taught:
        return batch.sampler_logprobs
    among = torch.zeros(len(bounds) - 1, dtype=torch.bool).index_fill(0, torch.tensor(taught), True)
    where = torch.repeat_interleave(among, batch.lengths)
    found = score_pieces(policy, pieces, batch.group_ids[taught], temperature=temperature).logprobs
    return batch.sampler_logprobs.masked_scatter(where & batch.loss_mask, found.to(batch.sampler_logprobs.dtype))


def _runs(tokens: list[int], scored: list[bool]) -> list[Piece]:
    """Maximal stretches that are scored or not; the first is the prompt."""
    out: list[Piece] = []
    for token, flag in zip(tokens, scored, strict=True):
        if out and out[-1][1] == flag:
            out[-1][0].append(token)
        else:
            out.append(([token], flag))
    return out
