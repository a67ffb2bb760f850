"""Where in a pack the actions are that a task finds in texts."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable

import torch

from trajkern import PackedBatch, Spans
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.systems.base import Played
from trajkern.trainer.tasks.base import Task
from trajkern.trainer.tasks.capabilities import Action, ActionTask


def actions_of(task: Task, played: Played) -> list[list[Action]]:
    """Those of each rollout, in characters of its text.

    Raises:
        ValueError: a task whose actions are not ascending and disjoint, or leave the text.
    """
    assert isinstance(task, ActionTask)
    found = []
    for question, text in zip(played.questions, played.texts, strict=True):
        actions, last = task.action_spans(question, text), 0
        for action in actions:
            if not last <= action.begin < action.end <= len(text):
                expected = f"ascending, disjoint and not empty in a text of {len(text)} characters"
                raise ValueError(f"the action_spans of task {task.name} must be {expected}; got {actions}")
            last = action.end
        found.append(actions)
    return found


def action_spans(policy: Policy, played: Played, actions: list[list[Action]]) -> Spans:
    """The tokens of each action, numbered in its rollout; one that only overlaps counts whole, for the earlier action.

    The environment's tokens are no part of the loss, so a span may cover some.
    """
    batch, rows = played.batch, []
    for n, ((begin, last), some) in enumerate(zip(completions(batch), actions, strict=True)):
        tokens = batch.tokens[begin:last].tolist()
        for number, (first, end) in enumerate(token_ranges(policy, tokens, some)):
            rows.append((begin + first, begin + end, n, number))
    start, stop, owner, index = torch.tensor(rows, dtype=torch.int64).view(-1, 4).unbind(1)
    return Spans(start, stop, owner, index, batch.num_tokens)


def completions(batch: PackedBatch) -> list[tuple[int, int]]:
    """The tokens of each rollout after its prompt, the environment's too."""
    bounds = batch.cu_seqlens.tolist()
    masks = batch.loss_mask.split(batch.lengths.tolist())
    return [(begin + int(x.int().argmax()), end) for begin, end, x in zip(bounds, bounds[1:], masks, strict=False)]


def token_ranges(policy: Policy, tokens: list[int], actions: list[Action]) -> list[tuple[int, int]]:
    """The first token of each action in a completion, and the one after its last."""

    ranges, last, (counts, written, cut) = [], 0, _spelt(policy, tokens)
    for action in actions:
        first = max(bisect_right(counts, cut + action.begin, key=written) - 1, last)
        last = max(bisect_left(counts, cut + action.end, key=written), first)
        ranges.append((first, last))
    return ranges


def tokens_within(policy: Policy, tokens: list[int], begin: int, end: int) -> tuple[int, int]:
    """The first token of a completion that lies wholly in characters ``begin:end`` of its text, and the one after the
    last. What stands before the text is part of its beginning."""
    counts, written, cut = _spelt(policy, tokens)
    first, last = (bisect_left(counts, cut + at if at else 0, key=written) for at in (begin, end))
    last -= written(last) > (cut + end if end else 0)
    return first, max(first, last)


def _spelt(policy: Policy, tokens: list[int]) -> tuple[range, Callable[[int], int], int]:
    """How many tokens there may be, how many characters so many write, and where among these the text begins."""
    cut = policy.answer_in(policy.spelling(tokens)).start  # the text that parts are marked in may begin later
    return range(len(tokens) + 1), lambda count: len(policy.spelling(tokens[:count])), cut
