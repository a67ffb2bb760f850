"""Ranks that were given different things refuse to begin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trajkern.trainer.checkpoint import Checkpoint
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.setup import OWN, check_alike


class Told:
    """Rank 1, which is told what rank 0 has said."""

    number = 1

    def __init__(self, first: Any = None) -> None:
        self.first = first

    def told(self, value: Any) -> Any:
        self.said = value
        return value if self.first is None else self.first


def said(config: TrainConfig, place: dict[str, Any] | None = None, data: str = "", first: Any = None) -> Any:
    ranks: Any = Told(first)
    stored = Checkpoint(Path(), {}, place) if place else None
    check_alike(config, stored, SimpleNamespace(fingerprint=data), ranks)  # type: ignore[arg-type]
    return ranks.said


def changed() -> Iterator[tuple[str, Any]]:
    """Each setting with another value than rank 0's."""
    for field in dataclasses.fields(TrainConfig):
        if field.name not in OWN:
            yield field.name, TrainConfig().to_json()[field.name]


@pytest.mark.parametrize(("name", "value"), [*changed()], ids=str)
def test_another_setting_is_refused_by_its_name(name: str, value: Any) -> None:
    first = said(TrainConfig()) | {name: "another"}
    told = re.escape(f"{name} must be the same on all ranks; got {value!r} on rank 1, 'another' on rank 0")
    with pytest.raises(ValueError, match=f"^{told}$"):
        said(TrainConfig(), first=first)


def test_other_data_and_another_checkpoint_are_refused() -> None:
    place = {"phase": "main", "step": 3, "metrics": "0123"}
    first = said(TrainConfig(), place, "a")
    said(dataclasses.replace(TrainConfig(), out=Path("mine"), threads=1), place, "a", first)
    with pytest.raises(
        ValueError, match="^task's data must be the same on all ranks; got 'b' on rank 1, 'a' on rank 0"
    ):
        said(TrainConfig(), place, "b", first)
    for other in (None, place | {"step": 2}, place | {"phase": "then"}, place | {"metrics": "4567"}):
        with pytest.raises(ValueError, match="^checkpoint to resume must be the same on all ranks; got"):
            said(TrainConfig(), other, "a", first)
