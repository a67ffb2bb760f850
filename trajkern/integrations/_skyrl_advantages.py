"""SkyRL's advantage estimators on padded rows; :mod:`trajkern.integrations.skyrl` registers them.

Advantages outside of ``response_mask`` are 0, and a group of equal rewards gets exactly 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_number, check_tensor, describe, readable
from trajkern._dtypes import FLOATS
from trajkern._values import check_finite
from trajkern.integrations import _verl_advantages
from trajkern.integrations._adapter import padded_rows
from trajkern.integrations._outside import Outside
from trajkern.integrations._verl_advantages import Groups

Pair = tuple[Tensor, Tensor]  # advantages and returns, [B, L] each


def _checked(token_level_rewards: Any, index: Any) -> list[Any]:
    """The uids of the rows, whose rewards must be finite."""
    check_tensor("token_level_rewards", token_level_rewards, dtypes=FLOATS, ndim=2)
    if readable(token_level_rewards):
        check_finite("token_level_rewards", token_level_rewards.sum(-1))
    uids = Outside("index", index).values()
    if len(uids) != len(token_level_rewards):
        raise ValueError(f"index must hold {len(token_level_rewards)} uids, one a row; got {len(uids)}")
    if wrong := [x for x in uids if not isinstance(x, (str, int))]:
        raise TypeError(f"index must hold texts or ints, got {describe(wrong[0])}")
    return uids


def grpo(
    token_level_rewards: Tensor,  # [B, L]
    response_mask: Tensor,  # [B, L]
    index: Any,
    epsilon: float = 1e-6,
    grpo_norm_by_std: bool = True,
    **_: Any,
) -> Pair:
    """As ``grpo``: (r - mean) / (std + epsilon) over the rows of a uid; r alone in its group."""
    index = _checked(token_level_rewards, index)
    return _verl_advantages.grpo(
        token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo=bool(grpo_norm_by_std)
    )


def rloo(
    token_level_rewards: Tensor,  # [B, L]
    response_mask: Tensor,  # [B, L]
    index: Any,
    **_: Any,
) -> Pair:
    """As ``rloo`` (arXiv 2402.14740): r less the mean of the others of its uid; 0 alone in its group."""
    index = _checked(token_level_rewards, index)
    return _verl_advantages.rloo_vectorized(token_level_rewards, response_mask, index)


def maxrl(
    token_level_rewards: Tensor,  # [B, L]
    response_mask: Tensor,  # [B, L]
    index: Any,
    epsilon: float = 1e-6,
    **_: Any,
) -> Pair:
    """As ``maxrl``: (r - mean) / (mean + epsilon) over the rows of a uid; r alone in its group."""
    index = _checked(token_level_rewards, index)
    rows = padded_rows("response_mask", response_mask)
    rows.pack("token_level_rewards", token_level_rewards)
    scores = token_level_rewards.detach().sum(-1)
    groups = Groups.of(index, rows.shape[0], response_mask.device)
    mean = (groups.sum(scores) / groups.sum(torch.ones_like(scores)))[groups.ids]
    centred = tk.group_advantages(scores, groups.ids, scale="none")
    found = torch.where(groups.size > 1, centred / (mean + epsilon).to(scores.dtype), scores)
    a = rows.spread(found)
    return a, a


def reinforce_plus_plus(
    token_level_rewards: Tensor,  # [B, L]
    response_mask: Tensor,  # [B, L]
    gamma: float,
    **_: Any,
) -> Pair:
    """As ``reinforce++`` (arXiv 2501.03262): the discounted rewards to come, whitened.

    They are summed as far as the next token outside of ``response_mask``, without it. A mask of one token or none,
    which SkyRL refuses, gives 0.
    """
    rows = padded_rows("response_mask", response_mask)
    rewards = rows.pack("token_level_rewards", token_level_rewards).detach()
    place = torch.arange(rewards.shape[0], device=rewards.device)
    begins = ~rows.mask | (place % max(rows.shape[1], 1) == 0)
    bounds = torch.cat((place[begins], place.new_tensor([rewards.shape[0]])))
    returns = rows.pad(tk.discounted_returns(rewards, bounds, gamma=float(check_number("gamma", gamma, low=0, high=1))))
    return rows.pad(tk.whiten(rows.pack("returns", returns), mask=rows.mask)), returns


def gae(
    token_level_rewards: Tensor,  # [B, L]
    values: Tensor | None,  # [B, L]
    response_mask: Tensor,  # [B, L]
    gamma: float,
    lambd: float,
    **_: Any,
) -> Pair:
    """As ``gae``: A_t = sum of (gamma lambd)^k delta over all columns, whitened; returns = A + V before whitening.

    A mask of one token or none, which SkyRL refuses, gives 0.
    """
    if values is None:
        raise ValueError("values must be given to gae: trainer.critic.model.path must name a critic; got None")
    rows = padded_rows("response_mask", response_mask)
    check_tensor("token_level_rewards", token_level_rewards, dtypes=FLOATS)
    check_tensor("values", values, dtypes=FLOATS)
    with torch.no_grad():
        rewards, v = rows.pack("token_level_rewards", token_level_rewards), rows.pack("values", values)
        out = tk.gae(
            rewards,
            v,
            rows.cu_seqlens,
            gamma=float(check_number("gamma", gamma, low=0, high=1)),
            lam=float(check_number("lambd", lambd, low=0, high=1)),
        )
        return rows.pad(tk.whiten(out.advantages, mask=rows.mask)), rows.pad(out.returns)
