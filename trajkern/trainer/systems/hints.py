"""The policy as its own teacher: what it would have said, had it been given the task's hint."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern.trainer.packing import Piece
from trajkern.trainer.systems.base import Played, System
from trajkern.trainer.systems.scoring import score_pieces
from trajkern.trainer.tasks.base import Question

MARK = "|"  # between a hint and the question, for a model of characters


def hinted(question: Question, hint: str) -> Question:
    return question._replace(prompt=f"{hint}{MARK}{question.prompt}", text=f"{question.text}\nHint: {hint}")


def hinted_logprobs(system: System, played: Played) -> Tensor:
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
    scores = score_pieces(policy, pieces, batch.group_ids[taught], temperature=system.temperature)
    logprobs = scores.logprobs.to(batch.sampler_logprobs.dtype)
    return batch.sampler_logprobs.masked_scatter(where & batch.loss_mask, logprobs)


def _runs(tokens: list[int], scored: list[bool]) -> list[Piece]:
    """Maximal stretches that are scored or not; the first is the prompt."""
    out: list[Piece] = []
    for token, flag in zip(tokens, scored, strict=True):
        if out and out[-1][1] == flag:
            out[-1][0].append(token)
        else:
            out.append(([token], flag))
    return out
