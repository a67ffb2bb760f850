"""What the policy loss reads, as one value from the checks to the kernels."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from trajkern.losses.kinds import OPTIONS, PARAMETERS, computed


class LossInputs(NamedTuple):
    """What the policy loss reads beside the policy's own log-probs, laid out for a kernel; per pair inside the head."""

    old_logprobs: Tensor | None  # [T]; None: the policy has not moved, these are its own log-probs
    advantages: Tensor  # [N] or [T]; a branch's rows of them, [6, N] or [6, T]
    cu_seqlens: Tensor  # [N+1]
    mask: Tensor | None  # [T]
    ref_logprobs: Tensor | None  # [T]
    sampler_logprobs: Tensor | None  # [T]
    normalizer: Tensor | None  # []
    options: list[int]  # in the order of kinds.OPTIONS, but for the last two
    params: list[float]  # in the order of kinds.PARAMETERS

    @property
    def per_token(self) -> bool:
        """Whether an advantage is a token's, not a trajectory's (with a branch: a node's)."""
        return bool(self.options[OPTIONS.index("per_token")])

    def parameter(self, name: str) -> float:
        return self.params[PARAMETERS.index(name)]


def fill_without_tokens(metrics: Tensor, **given: Tensor | None) -> None:
    """Sets them to what they are of no token: 0, or NaN without the argument that they need."""
    metrics.zero_()
    numbers = computed(*(name for name, x in given.items() if x is not None))
    for is_number, places in groupby(range(len(numbers)), numbers.__getitem__):
        first, *rest = places
        if not is_number:
            metrics[first : first + 1 + len(rest)].fill_(float("nan"))
