"""What the policy loss reads, as one value from the checks to the kernels."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from trajkern.losses.kinds import METRICS, OPTIONS, PARAMETERS, WITH_SUPERVISED, computed


class LossInputs(NamedTuple):
    """What the policy loss reads beside the policy's own log-probs, laid out for a kernel; per pair inside the head."""

    old_logprobs: Tensor | None  # [T]; None: the policy has not moved, these are its own log-probs
    advantages: Tensor  # [N] or [T]; a branch's rows of them, [6, N] or [6, T]
    cu_seqlens: Tensor  # [N+1]
    mask: Tensor | None  # [T]
    ref_logprobs: Tensor | None  # [T]
    sampler_logprobs: Tensor | None  # [T]
    normalizer: Tensor | None  # []
    # terms with weights of their own, None: no such term; a normalizer that is None is how many weights are not 0
    supervised_weights: Tensor | None  # [T]
    supervised_normalizer: Tensor | None  # []
    kl_weights: Tensor | None  # [T], of the KL, in the place of the mask
    kl_normalizer: Tensor | None  # []
    options: list[int]  # in the order of kinds.OPTIONS, but for the last two
    params: list[float]  # in the order of kinds.PARAMETERS

    @property
    def per_token(self) -> bool:
        """Whether an advantage is a token's, not a trajectory's (with a branch: a node's)."""
        return bool(self.options[OPTIONS.index("per_token")])

    @property
    def has_streams(self) -> bool:
        """Whether a term has weights of its own."""
        return self.supervised_weights is not None or self.kl_weights is not None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, in their order."""
        return metric_names(self.supervised_weights)

    def parameter(self, name: str) -> float:
        return self.params[PARAMETERS.index(name)]


def metric_names(supervised_weights: Tensor | None) -> tuple[str, ...]:
    """As ``LossInputs.metrics``: torch 2.10 traces no property of a tuple."""
    return tuple(METRICS) if supervised_weights is None else WITH_SUPERVISED


def joined(mask: Tensor | None, *of_streams: Tensor | None) -> Tensor | None:
    """The tokens of ``mask`` and those that have one of the weights, ``[T]``; None: all."""
    for weights in of_streams:
        if mask is not None and weights is not None:
            mask = mask | (weights != 0)
    return mask


def fill_without_tokens(metrics: Tensor, **given: Tensor | None) -> None:
    """Sets them to what they are of no token: 0, or NaN without the argument that they need."""
    metrics.zero_()
    numbers = computed(*(name for name, x in given.items() if x is not None))
    for is_number, places in groupby(range(len(numbers)), numbers.__getitem__):
        first, *rest = places
        if not is_number:
            metrics[first : first + 1 + len(rest)].fill_(float("nan"))
