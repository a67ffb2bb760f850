"""The policy as its own teacher: what it would have said, had it been given the task's hint."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern.trainer.packing import runs
from trajkern.trainer.systems.base import Played, System
from trajkern.trainer.systems.scoring import score_pieces
from trajkern.trainer.tasks.base import Question
from trajkern.trainer.tasks.capabilities import HintTask

MARK = "|"  # between a hint and the question, for a model of characters


def hinted(question: Question, hint: str) -> Question:
    return question._replace(prompt=f"{hint}{MARK}{question.prompt}", text=f"{question.text}\nHint: {hint}")


def hinted_prompts(system: System, played: Played) -> list[list[int] | None]:
    """Each rollout's prompt with the task's hint before it; None where there is no hint, as for what was right."""
    assert isinstance(system.task, HintTask)
    prompts: list[list[int] | None] = []
    for question, text, reward in zip(played.questions, played.texts, played.rewards.tolist(), strict=True):
        hint = None if reward > 0 else system.task.hint(question, text)
        prompts.append(None if hint is None else system.policy.prompt(hinted(question, hint)))
    return prompts


def hinted_logprobs(system: System, played: Played, prompts: list[list[int] | None]) -> Tensor:
    """log p of every token under the system's teacher that reads these prompts, ``[T]``; the sampler's where there is
    none."""
    batch = played.batch
    assert batch.sampler_logprobs is not None
    bounds, taught, pieces = batch.cu_seqlens.tolist(), [], []
    for n, prompt in enumerate(prompts):
        if prompt is None:
            continue
        tokens, scored = (x[bounds[n] : bounds[n + 1]].tolist() for x in (batch.tokens, batch.loss_mask))
        taught.append(n)
        pieces.append([(prompt, False), *runs(tokens, scored)[1:]])
    if not taught:
        return batch.sampler_logprobs
    among = torch.zeros(len(bounds) - 1, dtype=torch.bool).index_fill(0, torch.tensor(taught), True)
    where = torch.repeat_interleave(among, batch.lengths)
    scores = score_pieces(system.teacher, pieces, batch.group_ids[taught], temperature=system.temperature)
    system.scored += len(scores.logprobs)
    logprobs = scores.logprobs.to(batch.sampler_logprobs.dtype)
    return batch.sampler_logprobs.masked_scatter(where & batch.loss_mask, logprobs)
