"""The result tuples that ops and references share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics of softmax(logits / temperature). What was not asked for is None."""

    logprobs: Tensor  # log p of the target
    entropy: Tensor | None = None  # -sum_j p_j log p_j
    sum_sq_probs: Tensor | None = None  # sum_j p_j^2, no gradient
    is_top1: Tensor | None = None  # bool: no other logit is larger than the target's
    mean_logit: Tensor | None = None  # of the logits over the temperature, no gradient; the head's ops only


class TopK(NamedTuple):
    """The k likeliest tokens of softmax(logits / temperature), the likeliest first; of equal ones the lower id."""

    logprobs: Tensor  # [P, k] log p
    ids: Tensor  # [P, k] int64
    tail: Tensor  # [P] log of the mass of all others, -inf where there is none
    target_logprobs: Tensor | None = None  # [P] or [P, M] log p of the targets, where they were given


class GAE(NamedTuple):
    """Generalised advantage estimates and the value targets advantages + values."""

    advantages: Tensor  # [T]
    returns: Tensor  # [T]


class Reflection(NamedTuple):
    """Reasoning reflection rewards, and the statistics of the reference tokens that they are made of."""

    rewards: Tensor  # [N]
    weights: Tensor  # [P], the same for all rollouts of a group
    std: Tensor  # [P], likewise
    group_score: Tensor  # [G], the largest std of each group, in ascending group id


class Branch(NamedTuple):
    """What the leaves below each node (or each token's node) add up to, with leaf weights w and advantages A."""

    positive: Tensor  # sum of w A over A > 0
    negative: Tensor  # sum of w A over A < 0
    leaf_count: Tensor  # sum of w, no gradient
    positive_count: Tensor  # leaves with A > 0 and w not 0, no gradient
    negative_count: Tensor  # leaves with A < 0 and w not 0, no gradient
    zero_count: Tensor  # leaves with A = 0 and w not 0, no gradient

    @classmethod
    def of(cls, advantages: Tensor, weights: Tensor, counts: Tensor) -> Branch:
        """Of single leaves, ``counts`` of them in each place: what sums over leaves are made of.

        The advantage of a leaf of weight 0 is not read.
        """
        advantages = advantages.where(weights != 0, 0)
        signs = (advantages > 0, advantages < 0, advantages == 0)
        positive, negative = weights * advantages.relu(), -weights * (-advantages).relu()
        return cls(positive, negative, weights, *(counts * sign for sign in signs))
