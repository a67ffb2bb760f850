"""The arguments that every way to a policy loss shares, as one value, and as the kernels read them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trajkern._checks import laid_out
from trajkern.losses.config import PolicyLoss
from trajkern.losses.inputs import LossInputs


class LossArguments(NamedTuple):
    """Arguments of :func:`trajkern.policy_loss` under their names; a token is a pair inside the head."""

    config: PolicyLoss
    old_logprobs: Tensor | None  # [T]; None: the policy has not moved
    advantages: Tensor | None  # [N] or [T]; None where there is a branch
    cu_seqlens: Tensor  # [N+1]
    mask: Tensor | None  # [T]
    ref_logprobs: Tensor | None  # [T]
    sampler_logprobs: Tensor | None  # [T]
    branch: Any  # Branch, Paths or None
    normalizer: Any  # a number or a tensor; once checked a tensor []
    per_token: bool | None  # once checked a bool
    sequence_group: Any = None  # the ranks over which the trajectories' tokens are spread
    supervised_weights: Tensor | None = None  # [T]
    supervised_normalizer: Any = None  # as normalizer
    kl_weights: Tensor | None = None  # [T]
    kl_normalizer: Any = None  # likewise

    def laid_out(self, dtype: torch.dtype) -> LossArguments:
        """Contiguous, the floats of ``dtype``."""
        return LossArguments(  # a third of _replace's time
            self.config,
            laid_out(self.old_logprobs, dtype),
            laid_out(self.advantages, dtype),
            laid_out(self.cu_seqlens, torch.int64),
            laid_out(self.mask, torch.bool),
            laid_out(self.ref_logprobs, dtype),
            laid_out(self.sampler_logprobs, dtype),
            self.branch,
            self.normalizer,
            self.per_token,
            self.sequence_group,
            laid_out(self.supervised_weights, dtype),
            self.supervised_normalizer,
            laid_out(self.kl_weights, dtype),
            self.kl_normalizer,
        )

    def inputs(self) -> LossInputs:
        """As the kernels read them; a branch's rows stand in ``advantages`` by now."""
        assert self.advantages is not None
        return LossInputs(
            self.old_logprobs,
            self.advantages,
            self.cu_seqlens,
            self.mask,
            self.ref_logprobs,
            self.sampler_logprobs,
            self.normalizer,
            self.supervised_weights,
            self.supervised_normalizer,
            self.kl_weights,
            self.kl_normalizer,
            [*self.config.kernel_options, int(bool(self.per_token))],
            self.config.kernel_params,
        )
