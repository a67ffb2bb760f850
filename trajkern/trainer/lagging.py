"""Copies of the policy that lag behind it: the anchor of a KL term, a policy that scores, a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from trajkern.recipes import sdpo
from trajkern.trainer.ranks import own_shards

ANCHOR = "anchor"  # of the loss's KL term
SCORER = "scorer"  # in the policy's place where a reward asks it
TEACHER = "teacher"  # in the policy's place where it teaches under a hint


@dataclass(frozen=True)
class Lag:
    """How a copy follows the policy: every ``every`` steps it goes ``rate`` of the way to it.

    A rate of 0 keeps it as the main loop found the policy, 1 copies the policy, one between averages over its past.
    """

    rate: float = 0.0
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"the rate of a lag must be in [0, 1], got {self.rate}")
        if self.every < 1:
            raise ValueError(f"the steps between a lag's moves must be at least 1, got {self.every}")


def follow(copies: Mapping[str, nn.Module], lags: Mapping[str, Lag], policy: nn.Module, step: int) -> None:
    """Move each copy that is due after ``step`` steps."""
    for name, lag in lags.items():
        if lag.rate and step % lag.every == 0:
            own_shards(copies[name])
            sdpo.update_teacher(copies[name], policy, lag.rate)
