"""Where a run stands: what a checkpoint holds beside tensors, and its schema."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from trajkern.trainer.evaluate import Accuracy
from trajkern.trainer.schema import Count, NotNegative, conform

Phase = Literal["warmup", "main", "then"]


@dataclass
class Clock:
    """Tokens and seconds of sampling and of optimisation."""

    sampled: Count = 0
    scored: Count = 0  # beside those sampled and trained: what a reward asked the policy about
    sampling: NotNegative = 0.0
    trained: Count = 0
    shared: Count = 0  # of those trained, what a prefix shared with another rollout saved
    training: NotNegative = 0.0

    @contextlib.contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Add the seconds of a block to "sampling" or "training"."""
        began = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - began)

    @property
    def drawn(self) -> int:
        """Tokens sampled and scored."""
        return self.sampled + self.scored

    @property
    def rate(self) -> float:
        """Tokens a second through both."""
        return (self.sampled + self.trained) / max(self.sampling + self.training, 1e-9)

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens a second, sampled and trained."""
        return self.sampled / max(self.sampling, 1e-9), self.trained / max(self.training, 1e-9)


@dataclass(frozen=True)
class Start:
    """Where a stage begins: the steps taken before it, and the tokens sampled and scored."""

    step: Count = 0
    tokens: Count = 0


@dataclass(frozen=True)
class Place:
    """The JSON data of a checkpoint.

    Args:
        config: the run's settings, of all stages; :meth:`trajkern.trainer.config.TrainConfig.from_json` checks them.
        phase: what the next step belongs to.
        step: steps taken in the warm-up, or after it.
        start: where the stage began.
        before: accuracy after the warm-up, where it is known on the run's own held-out questions and samples.
        system: what the recipe remembers.
        data: fingerprint of the data behind the questions.
        clock: tokens and seconds so far.
        metrics: marks of the metrics file's lines; see :class:`trajkern.trainer.report.Metrics`.
    """

    config: dict[str, Any]
    phase: Phase
    step: Count
    start: Start
    before: Accuracy | None
    system: Any
    data: str
    clock: Clock
    metrics: str

    def __post_init__(self) -> None:
        if self.phase == "warmup" and self.before is not None:
            raise ValueError("place.before must be None in the warmup")
        if self.start.step > self.step:
            raise ValueError(f"place.start.step must be at most step = {self.step}, got {self.start.step}")


def read_place(data: Any) -> Place:
    """The place that JSON data hold. Raises ValueError naming what is missing, unknown or of another kind."""
    place: Place = conform("place", data, Place)
    return place
