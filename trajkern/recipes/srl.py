"""Supervised RL (arXiv 2510.25992): the reward of a step is its likeness to the expert's."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from difflib import Match, SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from trajkern import _ext, group_advantages
from trajkern._checks import check_choice, check_count, check_flag, check_number, check_sequence, describe, suggesting
from trajkern.recipes._groups import check_ids, check_vector, group_sum, pair_ids, widened

MAX_STEPS = 10**8
_MOST_STEPS = 2**62


@suggesting
def similarity(
    actions: Sequence[str],
    expert_actions: Sequence[str],
    *,
    autojunk: bool = True,
    max_steps: int = MAX_STEPS,
    beyond: float | None = None,
) -> Tensor:
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

    Cost: to find a block, each character of the action is looked at, and each place in the expert's of the same one: of
    n and m characters, about n·m/15 such steps for prose. Many blocks that lie unevenly take up to n·m·min(n, m) steps
    of a nanosecond or two: texts of 2,000 characters can be made that take seconds. What a policy writes is therefore
    bounded by ``max_steps``; how many a pair takes depends on nothing but its two texts.

    Args:
        actions: what the policy did, one string a rollout, without its monologue, which is not scored.
        expert_actions: what the expert did at that step, one string a rollout.
        autojunk: False gives frequent characters no special treatment, as difflib's argument of this name.
        max_steps: of one pair, at least 1; the default is a fifth of a second, or prose of 20,000 characters.
        beyond: the value of a pair that takes more steps, NaN among them: in a reward, where one such text must not end
            the run. None raises.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; without ``beyond`` also the first
            action that takes more than ``max_steps``.
    """
    autojunk = check_flag("autojunk", autojunk)
    max_steps = check_count("max_steps", max_steps, low=1, high=_MOST_STEPS)
    if beyond is not None and not (isinstance(beyond, float) and math.isnan(beyond)):
        beyond = check_number("beyond", beyond)
    actions, expert_actions = _texts("actions", actions), _texts("expert_actions", expert_actions)
    if len(actions) != len(expert_actions):
        raise ValueError(
            f"expert_actions must have one string for each of the {len(actions)} actions, got {len(expert_actions)}"
        )
    ratios = _ratios(actions, expert_actions, autojunk, max_steps)
    unfinished = ratios.isnan()
    if not bool(unfinished.any()):
        return ratios
    if beyond is None:
        n = int(unfinished.nonzero()[0, 0])
        raise ValueError(
            f"actions must be compared in at most max_steps = {max_steps} steps; number {n}, of {len(actions[n])} "
            f"characters beside the expert's {len(expert_actions[n])}, takes more (beyond= gives it a value instead)"
        )
    return ratios.masked_fill(unfinished, beyond)


def _texts(name: str, texts: Any) -> tuple[str, ...]:
    texts = check_sequence(name, texts, "strings")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a sequence of strings, got {describe(text)}")
    return texts


def _ratios(actions: tuple[str, ...], expert_actions: tuple[str, ...], autojunk: bool, max_steps: int) -> Tensor:
    """float64 ``[N]``, NaN where a pair takes more steps."""
    if not _ext.CPU_BUILT:
        pairs = zip(actions, expert_actions, strict=True)
        return torch.tensor(
            [_Counting(a, b, autojunk, max_steps).bounded() for a, b in pairs], dtype=torch.float64, device="cpu"
        )
    ratios = torch.empty(len(actions), dtype=torch.float64, device="cpu")
    _ext.cpu().similarity(actions, expert_actions, autojunk, max_steps, ratios.data_ptr())
    return ratios


class _Counting(SequenceMatcher):
    """difflib's, by the kernel's steps: of a find, the characters of its range of a and their places in that of b."""

    def __init__(self, a: str, b: str, autojunk: bool, steps: int) -> None:
        super().__init__(None, a, b, autojunk)
        self._steps = steps
        self._texts = a, b
        self._places: dict[str, list[int]] = self.b2j  # type: ignore[attr-defined]

    def find_longest_match(self, alo: int = 0, ahi: int | None = None, blo: int = 0, bhi: int | None = None) -> Match:
        a, b = self._texts
        ahi, bhi = len(a) if ahi is None else ahi, len(b) if bhi is None else bhi
        places = (self._places.get(character, ()) for character in a[alo:ahi])
        self._steps -= ahi - alo + sum(bisect_left(x, bhi) - bisect_left(x, blo) for x in places)
        if self._steps < 0:
            raise TimeoutError
        return super().find_longest_match(alo, ahi, blo, bhi)

    def bounded(self) -> float:
        try:
            return self.ratio()
        except TimeoutError:
            return math.nan


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
