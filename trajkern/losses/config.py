"""What the policy loss minimises: the user's choices, checked against the table of kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from trajkern._checks import check_choice, check_number, checked_field, suggesting
from trajkern.losses.kinds import (
    AGGREGATES,
    FORMS,
    KINDS,
    KL_ESTIMATORS,
    PARAMETERS,
    RATIO_LEVELS,
    SAMPLER_CORRECTIONS,
)
from trajkern.losses.published import PUBLISHED

_WITHOUT = {"clip_dual": math.inf, "max_length": 1.0}  # what None is to a kernel


@suggesting
@dataclass(frozen=True)
class PolicyLoss:
    """What :func:`trajkern.policy_loss` minimises. Options that a kind does not use are ignored.

    Defaults are PPO's for every kind; :meth:`published` has those that a kind's paper trained with.

    Args:
        kind: one of ``trajkern.policy_loss_kinds``; the table in :func:`trajkern.policy_loss` defines each.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; the divergence thresholds of
            ``dppo_*``; the bounds of the log-ratio of ``gmpo``.
        clip_dual: with A < 0 the loss is at most -clip_dual * A. TRL's two-sided ``delta`` is the same bound
            (for delta >= 1 + clip_high).
        ratio_level: "token", or "sequence" for exp(mean masked log-ratio of the trajectory). None: the kind's own.
        kl: estimator of KL(policy || reference) per token, with d = logprobs - ref_logprobs: "k1" d, "k2" d^2/2,
            "k3" exp(-d) + d - 1, "k3_corrected" the ratio times k3 (unbiased off-policy, in value and gradient).
        kl_coef, entropy_coef: added to a token's loss as + kl_coef * kl and - entropy_coef * entropy.
        aggregate: how the tokens' losses become one number. None: the kind's own.
        max_length: the fixed length that divides in "seq_mean_token_sum_norm".
        sampler_correction: with w = exp(old_logprobs - sampler_logprobs), "tis" multiplies the policy term by
            min(w, sampler_high), "icepop" by w inside [sampler_low, sampler_high] and by 0 outside,
            "sequence_mask" removes a trajectory whose exp(mean log w) lies outside.
        sapo_tau_pos, sapo_tau_neg: temperatures of ``sapo`` for A > 0 and otherwise.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: shape of ``vespo`` for A >= 0 and otherwise.
        cov_fraction: share of the masked tokens that ``kl_cov`` penalises or ``clip_cov`` drops (at least one).
        cov_low, cov_high: ``clip_cov`` only drops covariances strictly inside this band.
        cov_coef: weight of ``kl_cov``'s penalty.

    Numbers are Python's, numpy's, or CPU tensors without dimensions, and kept as Python's. Those that kernels read in
    float32 are 0 or of a magnitude that it and its reciprocals hold.

    Raises:
        TypeError, ValueError: naming the option, what it must be and what it was.
    """

    kind: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_dual: float | None = None
    ratio_level: str | None = None
    kl: str = "k3"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    aggregate: str | None = None
    max_length: int | None = None
    sampler_correction: str = "none"
    sampler_low: float = 0.5
    sampler_high: float = 2.0
    sapo_tau_pos: float = 1.0
    sapo_tau_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    cov_fraction: float = 0.0002
    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_coef: float = 1.0

    def __post_init__(self) -> None:
        checked_field(self, check_choice, "kind", KINDS)
        checked_field(self, check_choice, "ratio_level", (None, *RATIO_LEVELS))
        checked_field(self, check_choice, "aggregate", (None, *AGGREGATES))
        checked_field(self, check_choice, "kl", KL_ESTIMATORS)
        checked_field(self, check_choice, "sampler_correction", SAMPLER_CORRECTIONS)
        for name in ("clip_low", "clip_high", "sampler_low", "sampler_high", "cov_fraction"):
            self._check_number(name, low=0)
        for name in (*FORMS["sapo"], *FORMS["vespo"]):
            self._check_number(name, above=0)
        for name in ("kl_coef", "entropy_coef", "cov_low", "cov_high", "cov_coef"):
            self._check_number(name)
        if self.clip_dual is not None:
            self._check_number("clip_dual", above=1)
        if self.max_length is not None:
            self._check_number("max_length", low=1)
            if self.max_length != int(self.max_length):
                raise ValueError(f"max_length must be a whole number of tokens, got {self.max_length}")
        if self.ranks_tokens and self.ratio_level == "sequence":
            raise ValueError(f"ratio_level must be 'token' for kind {self.kind!r}, which ranks tokens; got 'sequence'")
        if self.ranks_tokens and self.sampler_correction == "sequence_mask":
            raise ValueError(
                f"sampler_correction must not be 'sequence_mask' for kind {self.kind!r}, which ranks all tokens"
            )
        for low, high in (("sampler_low", "sampler_high"), ("cov_low", "cov_high")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} must be at most {high} = {getattr(self, high)}, got {getattr(self, low)}")
        if self.cov_fraction > 1:
            raise ValueError(f"cov_fraction must be at most 1, got {self.cov_fraction}")
        if self.max_length is None and self.resolved_aggregate == "seq_mean_token_sum_norm":
            raise ValueError(
                f"max_length must be given for aggregate 'seq_mean_token_sum_norm' (kind {self.kind!r}), got None"
            )
        # encoded once: it takes longer than a small kernel
        object.__setattr__(self, "_options", _options(self))
        object.__setattr__(self, "_params", _params(self))

    @classmethod
    def published(cls, kind: str, **options: Any) -> PolicyLoss:
        """The loss with the clip range, or what a kind has instead, that its paper or its authors' code trained with.

            dapo       clip 0.2 below, 0.28 above (arXiv 2503.14476, section 4.1)
            bnpo       clip 0.2 below, 0.28 above, clip_dual 10 (github changyi7231/BNPO, recipe/bnpo/run.sh)
            dr_grpo    clip 0.2 on both sides (github sail-sg/understand-r1-zero: its scripts leave it to oat, ppo.py)
            gspo       clip 3e-4 below, 4e-4 above (arXiv 2507.18071, section 5.1)
            gmpo       log-ratios within 0.4 of 0 (arXiv 2507.20673, section 4)
            luspo      clip 2e-3 below, 2.5e-3 above (arXiv 2602.05261, section 5.1)
            sapo       temperatures 1, and 1.05 with A <= 0 (arXiv 2511.20347)
            vespo      k 2 and lambda 3; with A < 0 k 3 and lambda 2 (arXiv 2602.10693, section 3.4)
            dppo_tv    divergence up to 0.15 (arXiv 2602.04879, the authors' script in verl)
            dppo_kl    divergence up to 0.05 (the same)
            kl_cov     cov_fraction 2e-3, of 7B models (2e-4 of 32B), cov_coef 1 (arXiv 2505.22617 and its scripts)
            clip_cov   cov_fraction 2e-4 in (1, 5), clip 1 below and above, clip_dual 10 (the same)
            gpg        nothing is clipped (arXiv 2504.02546)
            reinforce  likewise (Williams, 1992)

        GRPO's paper (arXiv 2402.03300) names no clip range, nor does CISPO's (2506.13585), which bounds ratios above
        alone: these two are refused, so that nobody takes a default for a published number. KL coefficients, lengths
        and learning rates are not among these options.

        Args:
            kind: as in :class:`PolicyLoss`.
            options: its other options; one that is published can be given another value.

        Raises:
            ValueError: a kind that does not exist, or of which nothing was published.
            TypeError, ValueError: as :class:`PolicyLoss`, of an option.
        """
        kind = check_choice("kind", kind, KINDS)
        found = PUBLISHED[kind]
        if found.options is None:
            raise ValueError(
                f"kind must be one whose clip range was published; of {kind!r} ({found.source}) {found.unless}. "
                f"PolicyLoss({kind!r}, ...) takes one"
            )
        return cls(kind, **found.options | options)

    def _check_number(self, name: str, *, low: float | None = None, above: float | None = None) -> None:
        dtype = torch.float32 if name in PARAMETERS else None
        number = check_number(name, getattr(self, name), low=low, above=above, dtype=dtype)
        object.__setattr__(self, name, number)

    @property
    def resolved_ratio_level(self) -> str:
        return self.ratio_level or KINDS[self.kind].ratio_level

    @property
    def resolved_aggregate(self) -> str:
        return self.aggregate or KINDS[self.kind].aggregate

    @property
    def ranks_tokens(self) -> bool:
        """Whether it chooses tokens by their covariance, so that a batch's loss is not the sum of its parts'."""
        return bool(KINDS[self.kind].selects)

    @property
    def is_token_level(self) -> bool:
        """Whether a token's gradient needs no other token's log-prob."""
        return self.resolved_ratio_level == "token" and not (self.ranks_tokens or KINDS[self.kind].by_trajectory)

    @property
    def kernel_options(self) -> list[int]:
        """What the kernels read: the first of ``trajkern.losses.kinds.OPTIONS``; the rest are a call's."""
        return self.__dict__["_options"]

    @property
    def kernel_params(self) -> list[float]:
        """What the kernels read, in the order of ``trajkern.losses.kinds.PARAMETERS``."""
        if torch.compiler.is_dynamo_compiling():  # a second place of the same numbers would be guarded by itself
            return _params(self)
        return self.__dict__["_params"]

    @property
    def exact_in_tree(self) -> bool:
        """Whether sums over the leaves below a token give it exactly; else it needs the flat rollouts."""
        level = self.resolved_ratio_level
        kl_has_ratio = self.kl_coef != 0 and self.kl == "k3_corrected"
        return level in KINDS[self.kind].in_tree and not (level == "sequence" and kl_has_ratio)

    @property
    def exact_in_parts(self) -> bool:
        """Whether sums over a trajectory's tokens give it exactly, so that ranks can each hold some of them."""
        return self.exact_in_tree or (KINDS[self.kind].by_trajectory and self.resolved_ratio_level == "token")


def _options(config: PolicyLoss) -> list[int]:
    return [
        list(FORMS).index(KINDS[config.kind].form),
        RATIO_LEVELS.index(config.resolved_ratio_level),
        1 + KL_ESTIMATORS.index(config.kl) if config.kl_coef else 0,
        AGGREGATES.index(config.resolved_aggregate),
        SAMPLER_CORRECTIONS.index(config.sampler_correction),
    ]


def _params(config: PolicyLoss) -> list[float]:
    values = {name: getattr(config, name) for name in PARAMETERS}
    return [float(_WITHOUT[name] if value is None else value) for name, value in values.items()]
