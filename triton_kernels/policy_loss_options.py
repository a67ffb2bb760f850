"""What the launcher of the policy loss tells its kernels, by the names in :mod:`trajkern.losses.kinds`."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from trajkern.losses.inputs import LossInputs
from trajkern.losses.kinds import (
    AGGREGATES,
    FORMS,
    KINDS,
    KL_ESTIMATORS,
    OPTIONS,
    RATIO_LEVELS,
    SAMPLER_CORRECTIONS,
)

MEMBERS: dict[str, tuple[str, ...]] = {  # of the options that are enumerations
    "form": tuple(FORMS),
    "ratio_level": RATIO_LEVELS,
    "kl": ("none", *KL_ESTIMATORS),
    "aggregate": AGGREGATES,
    "sampler_correction": SAMPLER_CORRECTIONS,
}
BY_TRAJECTORY = {kind.form for kind in KINDS.values() if kind.by_trajectory}
CLIPS_RATIO = {"clip", "cispo"}
NUMBERS = 4  # that a form can read


class Options(NamedTuple):
    """kinds.OPTIONS, an enumeration's number as its member's name."""

    form: str
    ratio_level: str
    kl: str
    aggregate: str
    sampler_correction: str
    per_token: bool
    need_logprobs: bool
    need_entropy: bool

    @classmethod
    @cache  # looking the names up again would take a launch's time
    def of(cls, numbers: tuple[int, ...]) -> Options:
        pairs = zip(OPTIONS, numbers, strict=True)
        values: dict[str, Any] = {name: MEMBERS[name][x] if name in MEMBERS else bool(x) for name, x in pairs}
        return cls(**values)

    @property
    def sequence(self) -> bool:
        return self.ratio_level == "sequence"

    @property
    def reads_means(self) -> bool:
        """Whether a token's loss reads its trajectory's means."""
        return self.sequence or self.form in BY_TRAJECTORY

    @property
    def spreads(self) -> bool:
        """Whether the loss has a derivative in a trajectory's mean, which is spread over its tokens."""
        return self.need_logprobs and (self.sequence or self.form == "gmpo")

    def switches(self) -> dict[str, Any]:
        """The compile-time options that the kernels over tokens share."""
        return {
            "FORM": self.form,
            "SEQUENCE": self.sequence,
            "CORRECTION": self.sampler_correction,
            "PER_TOKEN": self.per_token,
        }


def form_numbers(form: str, inputs: LossInputs) -> list[float]:
    """What the form reads, in FORMS' order, filled up with 0; where it clips the ratio, the bounds of the ratio."""
    bounds = {}
    if form in CLIPS_RATIO:
        bounds = {"clip_low": 1 - inputs.parameter("clip_low"), "clip_high": 1 + inputs.parameter("clip_high")}
    numbers = [bounds[name] if name in bounds else inputs.parameter(name) for name in FORMS[form]]
    return numbers + [0.0] * (NUMBERS - len(numbers))
