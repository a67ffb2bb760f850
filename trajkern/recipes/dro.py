"""DRO (arXiv 2506.13351): which rollouts, and which prompts, are worth training on; and its reward for length.

The reflection reward itself weighs a reference answer's tokens; here stand the filters and the gates around it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from trajkern import group_advantages
from trajkern._checks import check_choice, check_count, check_number, check_sequence, describe, readable, suggesting
from trajkern._dtypes import FLOATS, accumulator
from trajkern._values import check_values
from trajkern.ops.advantage import INTEGERS
from trajkern.recipes._groups import check_ids, check_packing, check_vector, group_sum, pair_ids, widened

Prompt = TypeVar("Prompt", bound=Hashable)
GATES = ("drop_rollout", "reject_group_if_any_fails", "reject_group_if_all_fail", "pass_rate")
SLACK = 1e-9  # a product such as 0.07 * 100 lands above its integer
ROUNDING = 2.0**-40  # of a share, which is formed from the group's mean


@suggesting
def rank_filter(
    ranks: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    group_ids: Tensor,  # [N]
    *,
    worst_fraction: float,
    top_k: int,
) -> Tensor:
    """Whether a prompt is within reach of the policy; bool ``[N]``, one value for all rollouts of a group.

    For each rollout, the mean rank of the reference tokens that it makes least likely: the worst
    ceil(worst_fraction * n) of its n. A group is kept where at least one rollout has that mean at most top_k.

    Args:
        ranks: int64 or int32 ``[P]``, at least 1 (checked on the CPU); the place of each reference token among the
            vocabulary under its rollout's reasoning, 1 for the likeliest. The reference is packed once per rollout.
        cu_seqlens: int64 or int32 ``[N+1]``, the boundaries of the rollouts in ``ranks`` (checked on the CPU). A
            rollout without reference tokens is out of reach.
        group_ids: int64 or int32 ``[N]``; equal ids share a prompt.
        worst_fraction: in (0, 1]. The paper does not say how it rounds; here up, so that one token always counts.
        top_k: at least 1.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("ranks", ranks, None, "", None, INTEGERS)
    total, device = ranks.shape[0], ranks.device
    count = check_packing(cu_seqlens, total, device)
    check_ids("group_ids", group_ids, count, "one id a rollout", device)
    worst_fraction = check_number("worst_fraction", worst_fraction, low=0, above=0, high=1)
    most = check_number("top_k", top_k, low=1)
    if readable(ranks):
        check_values("ranks", ranks, 1)
    lengths = cu_seqlens.diff().long()
    owner = torch.repeat_interleave(torch.arange(count, device=device), lengths, output_size=total)
    order = ranks.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]  # the rollouts in order, the worst ranks of each first
    chosen = _share_of(lengths, worst_fraction)
    counted = torch.arange(total, device=device) - cu_seqlens[owner]
    worst = torch.where(counted < chosen[owner], ranks[order].long(), 0)
    mean = torch.zeros_like(lengths).scatter_add(0, owner, worst).double() / chosen
    return group_sum(mean <= most, pair_ids(group_ids)) > 0  # without tokens the mean is 0 / 0, which is no rank


def _share_of(lengths: Tensor, fraction: float) -> Tensor:  # [N]
    """ceil(fraction * n) of each n, at least one where there is one."""
    return (lengths.double() * fraction - SLACK).ceil().long().clamp_min(1).minimum(lengths)


@suggesting
def keep_groups(
    group_score: Tensor,  # [G]
    *,
    drop_fraction: float,
) -> Tensor:
    """The prompts to train on: all but the floor(drop_fraction * G) of lowest score; bool ``[G]``.

    Args:
        group_score: float ``[G]``, finite (checked on the CPU): how far a group's rollouts differ on its reference, the
            largest per-token standard deviation. Of equal scores the first are dropped first.
        drop_fraction: in [0, 1).
    """
    check_vector("group_score", group_score, None, "", None)
    drop_fraction = check_number("drop_fraction", drop_fraction, low=0, high=1)
    if drop_fraction == 1:
        raise ValueError("drop_fraction must be less than 1, got 1")
    count = group_score.shape[0]
    dropped = min(math.floor(drop_fraction * count + SLACK), max(count - 1, 0))
    place = torch.arange(group_score.shape[0], device=group_score.device)
    return torch.empty_like(place, dtype=torch.bool).scatter(0, group_score.argsort(stable=True), place >= dropped)


@suggesting
def length_reward(
    lengths: Tensor,  # [N]
    reference_lengths: Tensor,  # [N]
    *,
    beta: float,
) -> Tensor:
    """r = 1 - beta * abs(reference length - length) / reference length; ``[N]``.

    Args:
        lengths: float or integer ``[N]``, at least 0 (checked on the CPU): the tokens of each rollout's answer.
        reference_lengths: float or integer ``[N]``, at least 1 (checked on the CPU).
        beta: at least 0; the paper gives no value.

    Returns:
        float32 (float64 for float64 lengths). Negative where a rollout is further off than 1 / beta references.
    """
    both = (*FLOATS, *INTEGERS)
    check_vector("lengths", lengths, None, "", None, both)
    check_vector("reference_lengths", reference_lengths, lengths.shape[0], "one a rollout", lengths.device, both)
    beta = check_number("beta", beta, low=0, dtype=accumulator(lengths))
    if readable(lengths):
        check_values("lengths", lengths, 0)
        check_values("reference_lengths", reference_lengths, 1)
    reference = widened(reference_lengths)
    return 1 - beta * (reference - widened(lengths)).abs() / reference


@suggesting
def propagated(
    logprobs: Tensor,  # [P]
    cu_seqlens: Tensor,  # [N+1]
    std: Tensor,  # [P]
    *,
    gamma: float,
    fraction: float,
) -> Tensor:
    """Log-probs of a reference that pass on the doubt in its reasoning-reflective tokens; ``[P]``.

    After a poor rollout a reflective token k is unlikely, but once the reference has said it the next tokens are likely
    again. They are discounted, less with the distance:

        x'_j = x_j + sum over reflective k < j of log(p_k + (1 - p_k) (1 - exp(-gamma (j - k)))),   p_k = exp(x_k)

    The rewards are then sum_j w_j x'_j, with the weights of :func:`trajkern.variance_weights` from ``logprobs``. The
    paper offers this and the masked baseline of :func:`trajkern.reflection_rewards` for the same purpose.

    Args:
        logprobs: float ``[P]``, finite (checked on the CPU), of each reference token under its rollout's reasoning; the
            reference is packed once per rollout.
        cu_seqlens: int64 or int32 ``[N+1]``, the boundaries of the rollouts (checked on the CPU).
        std: float ``[P]``, at least 0 (checked on the CPU): how far the group's rollouts differ on each token, as
            :func:`trajkern.reflection_rewards` returns it.
        gamma: above 0, the decay a token; the sum takes 37 / gamma passes over the tokens, beyond which a doubt is less
            than a rounding.
        fraction: in (0, 1], the share of a reference's tokens, rounded up, that are reflective: those of largest std,
            of equal ones the first, and never one of std 0. The paper does not say how many are.

    Returns:
        float32 (float64 for float64 log-probs); the arithmetic is float64.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """
    check_vector("logprobs", logprobs, None, "", None)
    total, device = logprobs.shape[0], logprobs.device
    count = check_packing(cu_seqlens, total, device)
    check_vector("std", std, total, "one a log-prob", device)
    gamma = check_number("gamma", gamma, above=0, dtype=accumulator(logprobs))
    fraction = check_number("fraction", fraction, above=0, high=1)
    if readable(std):
        check_values("std", std, 0)
    lengths = cu_seqlens.diff().long()
    owner = torch.repeat_interleave(torch.arange(count, device=device), lengths, output_size=total)
    order = std.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    first = torch.arange(total, device=device) - cu_seqlens[owner] < _share_of(lengths, fraction)[owner]
    reflective = torch.empty_like(first).scatter(0, order, first) & (std > 0)
    x = logprobs.double()
    doubt = torch.where(reflective, -x.clamp_max(0).expm1(), 0)  # 1 - p_k
    passed_on = torch.zeros_like(x)
    for distance in range(1, min(total, math.ceil(37 / gamma) + 1)):
        factor = (-math.exp(-gamma * distance) * doubt[:-distance]).log1p()
        passed_on[distance:] += torch.where(owner[distance:] == owner[:-distance], factor, 0)
    return (x + passed_on).to(accumulator(logprobs))


@suggesting
def gate(
    passed: Tensor,  # [N]
    group_ids: Tensor,  # [N]
    *,
    mode: str = "pass_rate",
    threshold: float = 0.5,
    process_group: Any = None,
) -> Tensor:
    """Which rollouts a rubric lets through; bool ``[N]``. A rubric accepts or rejects: it never becomes a reward.

        drop_rollout               those that passed
        reject_group_if_any_fails  the groups of which all passed
        reject_group_if_all_fail   the groups of which one passed
        pass_rate                  the groups of which a share of at least ``threshold`` passed, to within 2^-40

    The last three give one value to the whole group. The revised paper enforces its rubric "at the rollout group level"
    and says no more that could be read, so each reading has its name. The default is of groups: the middle one, which
    at ``threshold`` 1 asks all of a group to pass.

    Args:
        passed: bool ``[N]``.
        group_ids: int64 or int32 ``[N]``; equal ids share a prompt.
        mode: one of the above.
        threshold: in [0, 1]; read by "pass_rate" only.
        process_group: of torch.distributed, over whose ranks groups are spread, as for
            :func:`trajkern.group_advantages`; every rank must make the call.

    Returns:
        keep, to be given to ``trajkern.group_advantages`` as its gate and to be taken from the loss mask. It may be all
        False: such a batch has nothing to train on.
    """
    check_vector("passed", passed, None, "", None, (torch.bool,))
    check_ids("group_ids", group_ids, passed.shape[0], "one id a rollout", passed.device)
    mode = check_choice("mode", mode, GATES)
    threshold = check_number("threshold", threshold, low=0, high=1)
    if mode == "drop_rollout":
        return passed.clone()
    x = passed.double() + 1  # from 1 to 2, where subtracting twice is exact
    mean = x - group_advantages(x, group_ids, scale="none", singleton="zero", process_group=process_group)
    if mode == "reject_group_if_any_fails":
        return mean == 2
    if mode == "reject_group_if_all_fail":
        return mean > 1
    return mean >= 1 + threshold - ROUNDING


def right_minus_wrong(
    rewards: Tensor,  # [N]
    correct: Tensor,  # [N]
    group_ids: Tensor,  # [N]
) -> Tensor:
    """How far a reward tells right rollouts from wrong ones: mean of the right less mean of the wrong, a group's gap.

    The mean over the groups that have both; NaN where none has. A reward whose gap is not above 0 teaches nothing of
    what makes an answer right: to be looked at before it trains.

    Args:
        rewards: float ``[N]``, finite (checked on the CPU), such as :func:`trajkern.reflection_rewards`.
        correct: bool ``[N]``, by a verifier that the training does not need.
        group_ids: int64 or int32 ``[N]``; equal ids share a prompt.

    Returns:
        A scalar, float64.
    """
    check_vector("rewards", rewards, None, "", None)
    count, device = rewards.shape[0], rewards.device
    check_vector("correct", correct, count, "one flag a rollout", device, (torch.bool,))
    check_ids("group_ids", group_ids, count, "one id a rollout", device)
    ids, r = pair_ids(group_ids), rewards.double()
    right, size = group_sum(correct, ids), group_sum(torch.ones_like(ids), ids)
    of_right = group_sum(torch.where(correct, r, 0), ids) / right
    of_wrong = group_sum(torch.where(correct, 0, r), ids) / (size - right)
    mixed = (right > 0) & (right < size)
    # every rollout of a group holds its gap: together they weigh one
    weight = torch.where(mixed, 1 / size.double(), 0)
    return (weight * torch.where(mixed, of_right - of_wrong, 0)).sum() / weight.sum()


@suggesting
class Curriculum(Generic[Prompt]):
    """Which prompts the next round trains on: those that the filters keep, and some of the last round's.

    A round samples candidates, filters them (:func:`rank_filter`, then :func:`keep_groups`) and trains on
    :meth:`next_round`. What is carried over keeps a filter that follows the policy from forgetting what it has learnt
    to do. The authors carry 10 % and do not say which; here by chance, the same for the same seed and rounds.

    Args:
        carry: the share of the last round's prompts that is trained again, in [0, 1], rounded down.
        seed: of the draws.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    def __init__(self, *, carry: float = 0.1, seed: int = 0) -> None:
        self.carry = check_number("carry", carry, low=0, high=1)
        self.seed = check_count("seed", seed)
        self._rounds = 0
        self._last: list[Prompt] = []

    @property
    def last(self) -> tuple[Prompt, ...]:
        """The last round's prompts, those that were carried over included."""
        return tuple(self._last)

    def next_round(self, prompts: Sequence[Prompt], keep: Tensor | Sequence[bool]) -> list[Prompt]:
        """The prompts of the next round: the kept ones in their order, then those carried over, none twice.

        Args:
            prompts: the candidates: texts or numbers, no two alike.
            keep: bool ``[len(prompts)]``, whether the filters keep each.

        Raises:
            TypeError, ValueError: naming the argument, what it must be and what it was; nothing has changed then.
        """
        prompts = check_sequence("prompts", prompts, "texts or numbers")
        if not all(isinstance(prompt, Hashable) for prompt in prompts):
            raise TypeError(f"prompts must be texts or numbers, which can be told apart; got {describe(prompts)}")
        if len(set(prompts)) != len(prompts):
            raise ValueError(f"prompts must be a sequence in which none is twice; got {describe(prompts)}")
        flags = keep.tolist() if isinstance(keep, Tensor) and keep.ndim == 1 else keep
        flags = check_sequence("keep", flags, "flags")
        if len(flags) != len(prompts) or not all(isinstance(flag, bool) for flag in flags):
            raise ValueError(f"keep must be {len(prompts)} flags, one a prompt; got {describe(keep)}")
        kept = [prompt for prompt, flag in zip(prompts, flags, strict=True) if flag]
        count = math.floor(self.carry * len(self._last) + SLACK)
        known = set(kept)
        old = [prompt for prompt in self._last if prompt not in known]
        drawn = random.Random(f"{self.seed} {self._rounds}").sample(range(len(old)), min(count, len(old)))
        self._last = kept + [old[at] for at in sorted(drawn)]
        self._rounds += 1
        return list(self._last)

    def state_dict(self) -> dict[str, Any]:
        """The rounds so far and the last one's prompts: JSON data where prompts are texts or numbers."""
        return {"rounds": self._rounds, "last": list(self._last)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the curriculum would have that gave ``state``.

        Raises:
            ValueError: it is no such state; the curriculum is as it was.
        """
        try:
            rounds, last = check_count("rounds", state["rounds"], low=0), list(state["last"])
            if len(set(last)) != len(last):
                raise ValueError("a prompt is twice in last")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state must be what Curriculum.state_dict returned; {error!r}") from error
        self._rounds, self._last = rounds, last
