"""Supervised RL (arXiv 2510.25992): the reward of a step is its likeness to the expert's."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from trajkern import _ext, group_advantages
from trajkern._checks import check_choice, check_flag, check_number, describe, suggesting
from trajkern.recipes._groups import check_ids, check_vector, group_sum, pair_ids, widened


@suggesting
def similarity(actions: Sequence[str], expert_actions: Sequence[str], *, autojunk: bool = True) -> Tensor:
    """2 M / T of each pair, identical to ``difflib.SequenceMatcher(None, action, expert).ratio()``; float64 ``[N]``.

    T is the number of characters of both, M the number in matching blocks: the longest common block, then the longest
    left and right of it, and so on. Its quirks are the reward's:

    - it is not symmetric: the policy's action comes first, the expert's second;
    - in an expert action of n >= 200 characters, one that stands there more than n // 100 + 1 times starts no block but
      at the front of what is compared ("autojunk"), so that long prose can score low however alike it is;
    - M is at most the length of the longest common subsequence, and often less;
    - two empty actions have ratio 1.

    The paper compares sequences and does not say of what; characters are what its replications compare. The pairs are
    shared out among torch's threads, without the interpreter's lock.

    Args:
        actions: what the policy did, one string a rollout, without its monologue, which is not scored.
        expert_actions: what the expert did at that step, one string a rollout.
        autojunk: False gives frequent characters no special treatment, as difflib's argument of this name.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    for name, texts in (("actions", actions), ("expert_actions", expert_actions)):
        if not isinstance(texts, Sequence):
            raise TypeError(f"{name} must be a sequence of strings, got {describe(texts)}")
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            wrong = texts if isinstance(texts, str) else next(text for text in texts if not isinstance(text, str))
            raise TypeError(f"{name} must be a sequence of strings, got {describe(wrong)}")
    if len(actions) != len(expert_actions):
        raise ValueError(
            f"expert_actions must have one string for each of the {len(actions)} actions, got {len(expert_actions)}"
        )
    autojunk = check_flag("autojunk", autojunk)
    if not _ext.CPU_BUILT:
        pairs = zip(actions, expert_actions, strict=True)
        ratios = [SequenceMatcher(None, one, other, autojunk).ratio() for one, other in pairs]
        return torch.tensor(ratios, dtype=torch.float64)
    out = torch.empty(len(actions), dtype=torch.float64)
    _ext.cpu().similarity(tuple(actions), tuple(expert_actions), autojunk, out.data_ptr())
    return out


@suggesting
def rewards(
    similarity: Tensor,  # [N]
    well_formed: Tensor,  # [N]
    *,
    penalty: float = -1.0,
) -> Tensor:
    """The similarity of a well-formed rollout, the penalty of another; ``[N]`` float32 (float64 for float64).

    Args:
        similarity: float ``[N]``; what stands at a rollout that is not well-formed is not read.
        well_formed: bool ``[N]``; whether monologue and action could be told apart.
        penalty: the paper's is -1.
    """
    check_vector("similarity", similarity, None, "", None, finite=False)
    check_vector("well_formed", well_formed, similarity.shape[0], "one flag", similarity.device, (torch.bool,))
    penalty = check_number("penalty", penalty, dtype=widened(similarity).dtype)
    return torch.where(well_formed, widened(similarity), penalty)


@suggesting
def keep_groups(
    rewards: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    *,
    min_std: float,
    ddof: int = 1,
) -> Tensor:
    """Which rollouts belong to a group whose rewards differ: standard deviation above ``min_std``; bool ``[N]``.

    Args:
        rewards: float ``[N]``, finite (checked on the CPU).
        group_ids: int64 or int32 ``[N]``; equal ids share a step's prompt.
        min_std: at least 0. The paper keeps a query whose deviation exceeds a small threshold that it does not give;
            replications take 1e-4, or a variance of 0.01.
        ddof: 1 or 0; the paper does not say. 1, as in the advantage that follows. A lone rollout has deviation 0.

    Returns:
        keep, one value for the whole group. Equal rewards have a deviation of exactly 0 and are never kept.
    """
    check_vector("rewards", rewards, None, "", None)
    check_ids("group_ids", group_ids, rewards.shape[0], "one id a reward", rewards.device)
    min_std, ddof = check_number("min_std", min_std, low=0), check_choice("ddof", ddof, (0, 1))
    ids = pair_ids(group_ids)
    centred = group_advantages(rewards.double(), ids, scale="none", singleton="zero")
    size = group_sum(torch.ones_like(ids), ids)
    return (group_sum(centred.square(), ids) / (size - ddof).clamp_min(1)).sqrt() > min_std
