"""What a row of the comparison is: a recipe's claim, the arms that are to show it, and what decides whether they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

RANDOM = "--control random-rewards"


@dataclass(frozen=True)
class Test:
    """A hypothesis: the row's first arm is better in ``measure`` than the arm ``against``, seed by seed.

    Args:
        measure: a figure of the held-out questions at the end ("pass@1", whatever the task reports), or of the run:
            "tokens", sampled and scored; "seconds"; "steps";
            "tokens to pass@1 >= 0.5" (steps, seconds likewise), by interpolation of the validation's curve, all that
            the run has spent where it does not get there;
            "mean pass@1", that of the validation's curve over the run's tokens;
            "pass@8 at pass@1 = 0.5", that of the validation's curve where it first gets there, None where it does not;
            "pass@8 at equal pass@1", that of each validation's curve where it first gets to the highest that both runs
            get to.
        against: an arm.
        better: the direction that the authors report.
        matters: the smallest difference that would matter, above 0; an interval that excludes it decides against the
            claim. None where only a difference of the other sign does.
    """

    __test__: ClassVar[bool] = False  # for pytest: not a test of this package

    measure: str
    against: str
    better: Literal["higher", "lower"] = "higher"
    matters: float | None = None


@dataclass(frozen=True)
class Panel:
    """A row's picture.

    Args:
        kind: "curve", a measure of the validation over training; "pass@k", the held-out pass@k over k at the end;
            "bars", held-out figures at the end; "calibration", the held-out accuracy over the stated confidence.
        measures: what "bars" shows, a group of bars each; a "curve" has one.
        over: of a curve, its other axis: "tokens" or "steps", or another measure of the validation.
        arms: those that are drawn; all where there are none.
        label: of the vertical axis; by default the measure.
        level: a horizontal line, as of a threshold that a test names.
    """

    kind: Literal["curve", "pass@k", "bars", "calibration"] = "curve"
    measures: tuple[str, ...] = ("pass@1",)
    over: str = "tokens"
    arms: tuple[str, ...] = ()
    label: str | None = None
    level: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A row.

    Args:
        claim: what the authors report, with the paper's number.
        needs: what a task must have for the effect to be there, and how this row's has it.
        flags: of every arm, the warm-up's among them.
        arms: flags of each arm: the recipe's first, then its authors' baselines, then controls.
        tests: what decides whether the row reproduces.
        measures: what the table shows, by the names that a test has for them.
        panel: the picture.
        lesson: what a practitioner takes from it; written when the figures are known.
        shares_warm_up: whether all arms warm up alike.
        seeds: of the committed results: none on which settings were chosen.
    """

    claim: str
    needs: str
    flags: str
    arms: dict[str, str]
    tests: tuple[Test, ...]
    measures: tuple[str, ...] = ("pass@1", "pass@8", "greedy")
    panel: Panel = Panel()
    lesson: str = ""
    shares_warm_up: bool = True
    seeds: tuple[int, ...] = (20, 21, 22, 23, 24, 25)

    def __post_init__(self) -> None:
        for test in self.tests:
            if test.against not in list(self.arms)[1:]:
                others = ", ".join(list(self.arms)[1:])
                raise ValueError(f"against must be an arm beside the first, one of {others}; got {test.against!r}")
            if test.matters is not None and not test.matters > 0:
                raise ValueError(f"matters must be above 0 or None, got {test.matters}")
        if unknown := set(self.panel.arms) - self.arms.keys():
            raise ValueError(f"panel.arms must be arms, {', '.join(self.arms)}; got {', '.join(sorted(unknown))}")
