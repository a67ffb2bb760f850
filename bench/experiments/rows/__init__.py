"""The rows of the comparison, a module each with its value ``ROW``."""

from __future__ import annotations

import importlib
import pkgutil

from trajkern._bench.experiments.comparisons import Comparison

# of the page
ORDER = (
    "tree_grpo",
    "srl",
    "toolpo",
    "delta_belief",
    "dro",
    "skillrl",
    "nsr",
    "feedback",
    "rlcr",
    "judge",
    "composition",
)


def load_rows() -> dict[str, Comparison]:
    """The rows that there are, by name. Raises ValueError for a module that has no place in the order."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    if unplaced := sorted(found - set(ORDER)):
        raise ValueError(f"a row must be one of {', '.join(ORDER)}; got {', '.join(unplaced)}")
    return {row: importlib.import_module(f"{__name__}.{row}").ROW for row in ORDER if row in found}


COMPARISONS = load_rows()
