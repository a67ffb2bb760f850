"""Log-probs of given texts in given contexts, whatever contexts share computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import trajkern as tk
from trajkern.trainer.models.policy import Policy
from trajkern.trainer.packing import Piece, pack_pieces


class Scores(NamedTuple):
    """Of the scored tokens of each trajectory, packed: log-probs ``[P]``; ranks ``[P]``, 1 for the likeliest, if asked
    for; and the trajectories' boundaries ``[N+1]``."""

    logprobs: Tensor
    cu_seqlens: Tensor
    ranks: Tensor | None


@torch.no_grad()
def score_pieces(
    policy: Policy,
    trajectories: Sequence[Sequence[Piece]],
    group_ids: Tensor,
    *,
    temperature: float = 1.0,
    ranks: bool = False,
) -> Scores:
    """Score the pieces that are marked. Trajectories of a group share the prefixes they have in common."""
    batch = pack_pieces(trajectories, group_ids)
    tree = tk.Tree.from_trajectories(batch)
    tokens, mask = batch.tokens[tree.source], batch.loss_mask[tree.source]
    pairs = tree.pairs(tokens, mask)
    if ranks:
        logits = policy(tokens, tree, pairs.rows)
        chosen = logits.gather(1, pairs.targets[:, None])
        logprobs = tk.token_logprobs(logits, pairs.targets, temperature=temperature)
        rank = 1 + (logits > chosen).sum(1)
    else:
        hidden = policy.hidden(tokens, tree, pairs.rows)
        logprobs = tk.linear_logprobs(hidden, targets=pairs.targets, temperature=temperature, **policy.head_arguments())
    scored = mask[tree.flat_index]
    index = (mask.cumsum(0) - 1)[tree.flat_index[scored]]
    counted = torch.cat((scored.new_zeros(1, dtype=torch.int64), scored.cumsum(0)))
    return Scores(logprobs[index], counted[tree.flat_cu_seqlens], rank[index] if ranks else None)


def score(
    policy: Policy, contexts: Sequence[Any], targets: Sequence[Any], *, temperature: float = 1.0, ranks: bool = False
) -> tuple[Tensor, ...]:
    """Log-probs of each target in its context, the targets' boundaries and, with ``ranks``, the tokens' places."""
    before, after = ([encoded(policy, x) for x in some] for some in (contexts, targets))
    pieces: list[list[Piece]] = [[(x, False), (y, True)] for x, y in zip(before, after, strict=True)]
    shortest = min(map(len, before), default=0)
    begins: dict[tuple[int, ...], int] = {}  # prefixes are sought among contexts of one beginning
    groups = torch.tensor([begins.setdefault(tuple(x[:shortest]), len(begins)) for x in before], dtype=torch.int64)
    scores = score_pieces(policy, pieces, groups, temperature=temperature, ranks=ranks)
    return (scores.logprobs, scores.cu_seqlens) if scores.ranks is None else (*scores[:2], scores.ranks)


def encoded(policy: Policy, x: Any) -> list[int]:
    """A text, a list of token ids, or a tuple of such, as tokens."""
    if isinstance(x, str):
        return policy.encode(x)
    return [token for part in x for token in encoded(policy, part)] if isinstance(x, tuple) else list(x)
