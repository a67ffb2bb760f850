"""What the launcher of the policy loss tells its kernels, by the names in :mod:`trajkern.losses.kinds`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple

from trajkern.losses.kinds import (
    AGGREGATES,
    FORMS,
    KINDS,
    KL_ESTIMATORS,
    OPTIONS,
    PARAMETERS,
    RATIO_LEVELS,
    SAMPLER_CORRECTIONS,
    computed,
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
COEFFICIENTS = ("kl_coef", "entropy_coef", "sampler_low", "sampler_high")
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


@cache
def switches(wanted: Options) -> dict[str, Any]:
    """The compile-time options of the kernel over tokens."""
    return {
        "FORM": wanted.form,
        "SEQUENCE": wanted.sequence,
        "KL": wanted.kl,
        "CORRECTION": wanted.sampler_correction,
        "PER_TOKEN": wanted.per_token,
        "AGGREGATE": wanted.aggregate,
        "MEANS": wanted.reads_means,
    }


@lru_cache(maxsize=64)  # a schedule may move them
def launch_numbers(form: str, params: tuple[float, ...]) -> tuple[float, ...]:
    """The numbers that the kernel over tokens takes: coefficients, the sampler's bounds, then the form's own.

    Those are in FORMS' order, filled up with 0; where the form clips the ratio, its bounds are the ratio's.
    """
    values = dict(zip(PARAMETERS, params, strict=True))
    coefficients = tuple(values[name] for name in COEFFICIENTS)
    if form in CLIPS_RATIO:
        values |= {"clip_low": 1 - values["clip_low"], "clip_high": 1 + values["clip_high"]}
    numbers = tuple(values[name] for name in FORMS[form])
    return coefficients + numbers + (0.0,) * (NUMBERS - len(numbers))


@cache
def computed_metrics(entropy: bool, ref_logprobs: bool, sampler_logprobs: bool) -> tuple[bool, ...]:
    """Of each metric, whether it is a number where these arguments are there or not."""
    given = {"entropy": entropy, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs}
    return computed(*(name for name, is_given in given.items() if is_given))


def bits(flags: Iterable[bool]) -> int:
    """A compile-time set of columns: bit i is flag i."""
    return sum(1 << i for i, flag in enumerate(flags) if flag)
