"""verl's advantage estimators on padded rows, in trajkern's ops; :mod:`trajkern.integrations.verl` registers them.

All of them take what verl gives (``token_level_rewards``, ``response_mask`` ``[B, L]``, ``index`` the uids ``[B]``) and
return (advantages, returns) ``[B, L]``, which are 0 wherever the mask is; verl's own leave some numbers there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import trajkern as tk
from trajkern import recipes
from trajkern.integrations._adapter import PaddedRows, padded_rows

Pair = tuple[Tensor, Tensor]


class Groups(NamedTuple):
    """Which rows share a uid, counted on the host, where the uids are."""

    ids: Tensor  # [B], dense, in order of first appearance
    size: Tensor  # [B], the members of each row's group
    start: Tensor  # [G], where each group begins among the rows sorted by id

    @classmethod
    def of(cls, index: Any, count: int, device: torch.device) -> Groups:
        if index is None:
            raise ValueError("index must hold the uid of every row for an estimator that compares groups; got None")
        uids = list(index.tolist() if isinstance(index, (np.ndarray, Tensor)) else index)
        if len(uids) != count:
            raise ValueError(f"index must hold {count} uids, one a row; got {len(uids)}")
        seen: dict[Any, int] = {}
        ids = np.fromiter((seen.setdefault(uid, len(seen)) for uid in uids), np.int64, count)
        sizes = np.bincount(ids, minlength=len(seen))
        parts = ids, sizes[ids], np.cumsum(sizes) - sizes
        return cls(*(torch.from_numpy(np.ascontiguousarray(x, np.int64)).to(device) for x in parts))

    def sum(self, x: Tensor) -> Tensor:  # [B, ...]
        """Each group's sum, ``[G, ...]``, in the order of the rows; float64 for floats."""
        wide = x.double() if x.is_floating_point() else x.long()
        # unlike index_add, index_put sorts on a GPU, so the order of a sum does not depend on the run
        out = wide.new_zeros((self.start.shape[0], *x.shape[1:]))
        return out.index_put((self.ids,), wide, accumulate=True)

    def top_two(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each group's row of largest x (of equals the first), that x, and the next (itself in a group of one)."""
        order = x.argsort(descending=True, stable=True)
        order = order[self.ids[order].argsort(stable=True)]
        next_one = torch.where(self.size[order[self.start]] > 1, self.start + 1, self.start)
        return order[self.start], x[order[self.start]], x[order[next_one]]


class _Batch(NamedTuple):
    rows: PaddedRows
    rewards: Tensor  # [B, L]
    scores: Tensor  # [B]
    groups: Groups | None

    @property
    def group(self) -> Groups:
        assert self.groups is not None
        return self.groups


def _read(token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, *, grouped: bool = True) -> _Batch:
    rows = padded_rows("response_mask", response_mask)
    rows.pack("token_level_rewards", token_level_rewards)
    groups = Groups.of(index, rows.shape[0], response_mask.device) if grouped else None
    return _Batch(rows, token_level_rewards, token_level_rewards.sum(-1), groups)


def _option(config: Any, name: str, default: Any) -> Any:
    return default if config is None else config.get(name, default)


def _whitened(rows: PaddedRows, x: Tensor) -> Tensor:  # [B, L]
    return rows.pad(tk.whiten(rows.pack("advantages", x), mask=rows.mask))


def _reward_to_go(batch: _Batch, gamma: float = 1.0) -> Tensor:
    rows = batch.rows
    flat = rows.pack("token_level_rewards", batch.rewards)
    return rows.pad(tk.discounted_returns(flat, rows.cu_seqlens, gamma=gamma, mask=rows.mask))


def gae(token_level_rewards, response_mask, values=None, gamma=1.0, lam=1.0, **_: Any) -> Pair:
    """As ``gae``: A_t = sum of (gamma lam)^k delta, whitened over the batch; returns = A + V before whitening.

    A mask of one token or none, which verl refuses, gives 0.
    """
    if values is None:
        raise ValueError(
            "values must be given to trajkern_gae; verl hands them to its own 'gae' only: "
            "register(replace=True) puts this estimator in its place"
        )
    rows = padded_rows("response_mask", response_mask)
    with torch.no_grad():
        rewards, v = rows.pack("token_level_rewards", token_level_rewards), rows.pack("values", values)
        out = tk.gae(rewards, v, rows.cu_seqlens, gamma=float(gamma), lam=float(lam), mask=rows.mask)
        return rows.pad(tk.whiten(out.advantages, mask=rows.mask)), rows.pad(out.returns)


def grpo(
    token_level_rewards, response_mask, index=None, epsilon=1e-6, norm_adv_by_std_in_grpo=None, config=None, **_: Any
) -> Pair:
    """As ``grpo``: (r - mean) / (std + epsilon) over the rows of a uid; r alone in its group.

    ``norm_adv_by_std_in_grpo`` None: the configuration's, which verl passes to its own ``grpo`` only. A group of equal
    rewards gets exactly 0, where verl divides its rounding error by epsilon.
    """
    if norm_adv_by_std_in_grpo is None:
        norm_adv_by_std_in_grpo = _option(config, "norm_adv_by_std_in_grpo", True)
    return _of_groups(token_level_rewards, response_mask, index, "std" if norm_adv_by_std_in_grpo else "none", epsilon)


def grpo_vectorized(token_level_rewards, response_mask, index=None, epsilon=1e-6, **_: Any) -> Pair:
    """As ``grpo_vectorized``: as ``grpo``, but over the std whatever the configuration says, as verl's own."""
    return _of_groups(token_level_rewards, response_mask, index, "std", epsilon)


def _of_groups(token_level_rewards, response_mask, index, scale: str, epsilon: float) -> Pair:
    batch = _read(token_level_rewards, response_mask, index)
    a = batch.rows.spread(tk.group_advantages(batch.scores.detach(), batch.group.ids, scale=scale, eps=epsilon))
    return a, a


def gdpo(
    token_level_rewards,
    response_mask,
    index=None,
    epsilon=1e-6,
    norm_adv_by_std_in_grpo=True,
    config=None,
    non_tensor_batch=None,
    batch=None,
    **_: Any,
) -> Pair:
    """As ``gdpo``: GRPO of every reward of ``algorithm.gdpo_reward_keys`` alone, their weighted sum, whitened.

    Without ``non_tensor_batch`` the token rewards are the only one, as in verl, whose configuration does not reach
    ``norm_adv_by_std_in_grpo`` here.
    """
    read = _read(token_level_rewards, response_mask, index)
    rewards, weights = [read.scores.detach()], None
    if config is not None and non_tensor_batch is not None and batch is not None:
        keys = list(config.get("gdpo_reward_keys", None) or [])
        missing = [key for key in keys if key not in non_tensor_batch]
        if not keys or missing:
            raise ValueError(
                f"gdpo_reward_keys must name rewards of the batch, which has {sorted(non_tensor_batch)}; got {keys}"
            )
        arrays = (np.asarray(non_tensor_batch[key], dtype=np.float32) for key in keys)
        rewards = [torch.tensor(x, device=response_mask.device) for x in arrays]
        weights = config.get("gdpo_reward_weights", None)
    weights = [1.0] * len(rewards) if weights is None else list(weights)
    if len(weights) != len(rewards):
        raise ValueError(f"gdpo_reward_weights must hold {len(rewards)} numbers, one a reward key; got {len(weights)}")
    scale = "std" if norm_adv_by_std_in_grpo else "none"
    parts = (tk.group_advantages(r, read.group.ids, scale=scale, eps=epsilon) for r in rewards)
    total = torch.stack([w * a for w, a in zip(weights, parts, strict=True)]).sum(0)
    a = _whitened(read.rows, read.rows.spread(total))
    return a, a


def grpo_passk(token_level_rewards, response_mask, index=None, epsilon=1e-6, config=None, **_: Any) -> Pair:
    """As ``grpo_passk`` (arXiv 2503.19595): the best row of a uid gets the distance to the second best, over std."""
    batch = _read(token_level_rewards, response_mask, index)
    groups, scores = batch.group, batch.scores.detach()
    if bool((groups.size < 2).any()):
        raise ValueError("index must name at least 2 rows with every uid for grpo_passk; one stands alone")
    at, best, second = groups.top_two(scores)
    gain = best - second
    if _option(config, "norm_adv_by_std_in_grpo", True):
        centred = tk.group_advantages(scores.double(), groups.ids, scale="none")
        std = (groups.sum(centred.square()) / (groups.size[at] - 1)).sqrt()
        gain = gain / (std + epsilon)
    a = batch.rows.spread(torch.zeros_like(scores).index_put((at,), gain.to(scores.dtype)))
    return a, a


def reinforce_plus_plus_baseline(token_level_rewards, response_mask, index=None, **_: Any) -> Pair:
    """As ``reinforce_plus_plus_baseline`` (arXiv 2501.03262): r - mean over the rows of a uid, whitened over tokens."""
    batch = _read(token_level_rewards, response_mask, index)
    centred = tk.group_advantages(batch.scores.detach(), batch.group.ids, scale="none")
    a = _whitened(batch.rows, batch.rows.spread(centred))
    return a, a


def reinforce_plus_plus(token_level_rewards, response_mask, config=None, **_: Any) -> Pair:
    """As ``reinforce_plus_plus``: the discounted rewards to come, whitened. ``config.gamma`` must be given."""
    if config is None:
        raise ValueError("config must be given for reinforce_plus_plus, which reads its gamma; got None")
    batch = _read(token_level_rewards.detach(), response_mask, grouped=False)
    returns = _reward_to_go(batch, float(config.gamma))
    return _whitened(batch.rows, returns), returns


def remax(token_level_rewards, response_mask, reward_baselines=None, **_: Any) -> Pair:
    """As ``remax`` (arXiv 2310.10505): the rewards to come less ``reward_baselines`` ``[B]``."""
    if reward_baselines is None:
        raise ValueError("reward_baselines must be given to remax; got None")
    batch = _read(token_level_rewards.detach(), response_mask, grouped=False)
    returns = _reward_to_go(batch)
    return returns - batch.rows.spread(reward_baselines.to(returns.dtype)), returns


def rloo(token_level_rewards, response_mask, index=None, **_: Any) -> Pair:
    """As ``rloo`` (arXiv 2402.14740): r less the mean of the others of its uid; r alone in its group."""
    return _leave_one_out(token_level_rewards, response_mask, index, "raw")


def rloo_vectorized(token_level_rewards, response_mask, index=None, **_: Any) -> Pair:
    """As ``rloo_vectorized``: as ``rloo``, but 0 alone in its group."""
    return _leave_one_out(token_level_rewards, response_mask, index, "zero")


def _leave_one_out(token_level_rewards, response_mask, index, singleton: str) -> Pair:
    batch = _read(token_level_rewards, response_mask, index)
    a = tk.group_advantages(
        batch.scores.detach(), batch.group.ids, baseline="leave_one_out", scale="none", singleton=singleton
    )
    a = batch.rows.spread(a)
    return a, a


def opo(token_level_rewards, response_mask, index=None, **_: Any) -> Pair:
    """As ``opo`` (arXiv 2505.23585): r less the mean of its uid weighted by length; r alone in its group."""
    batch = _read(token_level_rewards, response_mask, index)
    scores, groups = batch.scores.detach(), batch.group
    lengths = 2 * batch.rows.pad(batch.rows.mask).sum(-1)  # twice, so that no total of 1 is taken for a lone rollout
    centred = tk.group_advantages(scores, groups.ids, scale="none", weights=lengths.to(scores.dtype))
    a = batch.rows.spread(torch.where(groups.size == 1, scores, centred))
    return a, a


def gpg(token_level_rewards, response_mask, index=None, f_norm=1.0, **_: Any) -> Pair:
    """As ``gpg`` (arXiv 2504.02546): (r - mean) * (rows / rows with a reward that is not 0) / f_norm."""
    batch = _read(token_level_rewards, response_mask, index)
    scores = batch.scores.detach()
    alpha = scores.shape[0] / torch.count_nonzero(scores).clamp(min=1)
    a = batch.rows.spread(alpha * tk.group_advantages(scores, batch.group.ids, scale="none") / f_norm)
    return a, a


def optimal_token_baseline(
    token_level_rewards,
    response_mask,
    index=None,
    old_log_probs=None,
    sum_pi_squared=None,
    rollout_is_weights=None,
    handle_zero_tail=True,
    epsilon=1e-8,
    **_: Any,
) -> Pair:
    """As ``optimal_token_baseline``: G_t - B_t, B_t = sum G_t W_t / (sum W_t + epsilon) over the rows of a uid.

    W_t is the running sum of (1 - 2 pi + sum of pi^2) times the squared rollout weight. Behind the end of the second
    longest row, the longest has no baseline (``handle_zero_tail``); nor has a row alone in its group.
    """
    batch = _read(token_level_rewards.detach(), response_mask, index)
    returns, weights = _reward_to_go(batch), _path_variance(batch, old_log_probs, sum_pi_squared, rollout_is_weights)
    mask = batch.rows.pad(batch.rows.mask)
    a = returns - _token_baseline(returns, weights, mask, batch.group, batch.group.size, handle_zero_tail, epsilon)
    return torch.where(mask, a, 0), returns


def tir_optimal_token_baseline(
    token_level_rewards,
    response_mask,
    index=None,
    old_log_probs=None,
    sum_pi_squared=None,
    rollout_is_weights=None,
    handle_zero_tail=True,
    epsilon=1e-8,
    **_: Any,
) -> Pair:
    """As ``tir_optimal_token_baseline``: as the one above, where t counts the unmasked tokens of a row only."""
    batch = _read(token_level_rewards.detach(), response_mask, index)
    returns, weights = _reward_to_go(batch), _path_variance(batch, old_log_probs, sum_pi_squared, rollout_is_weights)
    mask, groups = batch.rows.pad(batch.rows.mask), batch.group
    order = (~mask).long().argsort(dim=1, stable=True)  # the unmasked tokens first
    g, w, m = (x.gather(1, order) for x in (returns, weights, mask))
    counted = groups.sum(mask.any(1))[groups.ids]
    a = g - _token_baseline(g, w, m, groups, counted, handle_zero_tail, epsilon)
    return torch.zeros_like(returns).scatter(1, order, torch.where(m, a, 0)), returns


def _path_variance(batch: _Batch, old_log_probs, sum_pi_squared, rollout_is_weights) -> Tensor:
    for name, x in (("old_log_probs", old_log_probs), ("sum_pi_squared", sum_pi_squared)):
        if x is None:
            raise ValueError(
                f"{name} must be given to the optimal token baseline; verl hands it to its own estimators only: "
                f"register(replace=True) puts these in their place"
            )
        batch.rows.pack(name, x)
    w = 1 - 2 * old_log_probs.detach().exp() + sum_pi_squared.detach()
    if rollout_is_weights is not None:
        w = w * rollout_is_weights.detach().square()
    return torch.where(batch.rows.pad(batch.rows.mask), w, 0).cumsum(-1)


def _token_baseline(returns, weights, mask, groups: Groups, counted, zero_tail: bool, epsilon: float) -> Tensor:
    """B_t ``[B, L]`` at every position, from the rows of each group that have a token there."""
    w = torch.where(mask, weights, 0)
    baseline = (groups.sum(returns * w) / (groups.sum(w) + epsilon)).to(returns.dtype)[groups.ids]
    has_one = (counted > 1)[:, None].expand_as(mask)
    if zero_tail:
        at, longest, second = groups.top_two(mask.sum(-1))
        column = torch.arange(mask.shape[1], device=mask.device)
        alone = (column >= second[:, None]) & (longest > second)[:, None]
        has_one = has_one.index_put((at,), has_one[at] & ~alone)
    return torch.where(has_one, baseline, 0)


def _by_sign(kind: str):
    def estimator(token_level_rewards, response_mask, **_: Any) -> Pair:
        batch = _read(token_level_rewards.detach(), response_mask, grouped=False)
        a = batch.rows.spread(recipes.nsr.advantages(batch.scores, kind=kind)[0])
        return a, a

    estimator.__doc__ = (
        f"The recipe {kind} (arXiv 2506.01347), as verl's registry calls it: what it leaves out gets 0 and counts in "
        "the loss's mean. In verl's trainers it is the credit of that name, and what it leaves out leaves the loss."
    )
    return estimator


VERL = {
    f.__name__: f
    for f in (
        gae,
        grpo,
        grpo_vectorized,
        gdpo,
        grpo_passk,
        reinforce_plus_plus_baseline,
        reinforce_plus_plus,
        remax,
        rloo,
        rloo_vectorized,
        opo,
        gpg,
        optimal_token_baseline,
        tir_optimal_token_baseline,
    )
}
OWN = {kind: _by_sign(kind) for kind in recipes.nsr.KINDS}
