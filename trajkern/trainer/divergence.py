"""Divergences of the policy from a teacher that reads the task's hint: the terms ``credit.divergence`` of a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern.recipes import sdpo
from trajkern.trainer.forest import Lesson
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.packing import pack_pieces, runs

HINTED = "hinted"  # the column of the rollouts' rows with the tokens of the hinted prompt, None where there is no hint


def divergence_term(policy: Policy, teacher: Policy, lesson: Lesson, temperature: float, count: int) -> Tensor:
    """sum over tokens of weight * divergence, divided by ``count``. The teacher, which may be the policy itself, is not
    trained."""
    batch, tree = lesson.credit.rollouts.batch, lesson.forest.tree
    pack, places = taught(lesson)
    number = torch.zeros(batch.num_tokens, dtype=torch.int64)
    number[places] = torch.arange(len(places))
    hinted = torch.zeros(batch.num_tokens, dtype=torch.bool).index_fill(0, places, True)
    total = torch.zeros(())
    for term, weight in lesson.credit.divergences:
        at = (hinted & (weight != 0)).nonzero().squeeze(1)
        if not len(at):
            continue
        states = policy.hidden(lesson.forest.tokens, tree, tree.rows[tree.flat_index[at]])
        rows = pack.head_inputs().rows[number[at]]
        found = measured(policy, teacher, term, states, pack, rows, temperature)
        if term.max_ratio is not None:
            assert batch.sampler_logprobs is not None
            head = policy.head_arguments()
            with torch.no_grad():
                now = tk.linear_logprobs(states.detach(), targets=batch.tokens[at], temperature=temperature, **head)
            found = found * (now - batch.sampler_logprobs[at]).exp().clamp_max(term.max_ratio)
        total = total + (weight[at] * found).sum()
    return total / count


def taught(lesson: Lesson) -> tuple[tk.PackedBatch, Tensor]:
    """The rollouts that have a hint, with it before them; and the flat token of each of its scored ones."""
    rollouts = lesson.credit.rollouts
    batch, bounds = rollouts.batch, rollouts.batch.cu_seqlens.tolist()
    pieces, taken = [], torch.zeros(len(rollouts), dtype=torch.bool)
    for n, row in enumerate(rollouts.rows or ()):
        if row[HINTED] is not None:
            tokens, scored = (x[bounds[n] : bounds[n + 1]].tolist() for x in (batch.tokens, batch.loss_mask))
            pieces.append([(row[HINTED], False), *runs(tokens, scored)[1:]])  # without the prompt
            taken[n] = True
    return pack_pieces(pieces), (batch.loss_mask & torch.repeat_interleave(taken, batch.lengths)).nonzero().squeeze(1)


def measured(
    policy: Policy, teacher: Policy, term: Any, states: Tensor, pack: tk.PackedBatch, rows: Tensor, temperature: float
) -> Tensor:
    """The divergence of each of ``states`` from the teacher's at ``rows`` of ``pack``, ``[S]``."""
    head: dict[str, Any] = policy.head_arguments()
    if term.k is None:
        with torch.no_grad():
            taught = teacher.hidden(pack.tokens, pack.cu_seqlens, rows)
        theirs = teacher.head_arguments().items()
        of_teacher = {f"teacher_{name}": x.detach() if isinstance(x, Tensor) else x for name, x in theirs}
        both = {**head, **of_teacher, "teacher_hidden": taught}
        return tk.linear_divergence(states, beta=term.beta, temperature=temperature, **both)
    with torch.no_grad():
        likely = sdpo.topk(teacher(pack.tokens, pack.cu_seqlens, rows), term.k, temperature=temperature)
    each = torch.arange(len(rows)).repeat_interleave(likely.ids.shape[1])
    of_policy = tk.linear_logprobs(states, targets=likely.ids.flatten(), rows=each, temperature=temperature, **head)
    return tk.topk_divergence(of_policy.view_as(likely.logprobs), likely.logprobs, beta=term.beta)
