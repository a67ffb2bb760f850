"""Results as they are kept: a JSON file a row, with what they were made with, from which the page is made."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import trajkern as tk
from trajkern._bench import ceilings
from trajkern._bench.experiments.arms import WARM_UP
from trajkern._bench.experiments.comparisons import Comparison

RESULTS = Path("bench/reproduction")
COMMON = "--time-limit 1e9 --threads 1 --checkpoint-every 0 --eval.validation 128"
_PACKAGE, _HERE = Path(tk.__file__).resolve().parent, Path(__file__).resolve().parent
_RUN = (":/trajkern", ":/csrc", ":/bench/experiments")  # what a run's figures come from: not its page, for one
_OURS = re.compile(r"trajkern\._bench\.experiments\.([\w.]+):")


class Row:
    """A row's results.

    Attributes:
        comparison: the row as it is now.
        about: machine, versions, commit, date and the flags that the results were made with.
        seeds: that were asked for.
        warm_ups: results of the shared warm-ups, by seed; empty where each arm warms up by itself.
        arms: results by arm, then by seed; those that failed are not there.
    """

    def __init__(self, comparison: Comparison, data: dict[str, Any]) -> None:
        self.comparison, self.about = comparison, data["about"]
        self.seeds: list[int] = data["seeds"]
        self.warm_ups = {r["seed"]: r for r in data["results"] if r["arm"] == WARM_UP}
        self.arms: dict[str, dict[int, dict[str, Any]]] = {
            arm: {r["seed"]: r for r in data["results"] if r["arm"] == arm} for arm in comparison.arms
        }

    @property
    def stale(self) -> list[str]:
        """The arms whose flags are no longer those that their results were made with, or that have none."""
        flags, made = flags_of(self.comparison), self.about["flags"]
        return [arm for arm in flags if made.get(arm) != flags[arm]]

    @property
    def missing(self) -> list[tuple[str, int]]:
        """The arms and seeds that have no result."""
        return [(arm, seed) for arm, runs in self.arms.items() for seed in self.seeds if seed not in runs]


def flags_of(comparison: Comparison) -> dict[str, str]:
    """All flags of each arm but the seed."""
    return {arm: " ".join(filter(None, (COMMON, comparison.flags, flags))) for arm, flags in comparison.arms.items()}


def save(folder: Path, row: str, comparison: Comparison, seeds: list[int], results: Iterable[dict[str, Any]]) -> Path:
    """Write a row's results, a line each, in the order of seeds and arms."""
    order = [WARM_UP, *comparison.arms]
    ordered = sorted(results, key=lambda r: (r["seed"], order.index(r["arm"])))
    about = {
        "machine": ceilings.machine("cpu"),
        "versions": ceilings.versions(),
        "commit": commit(),
        "date": ceilings.now(),
        "flags": flags_of(comparison),
    }
    lines = ",\n".join(json.dumps(result) for result in ordered)
    path = folder / f"{row}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(
        f'{{"row": "{row}", "seeds": {seeds}, "about": {json.dumps(about)}, "results": [\n{lines}\n]}}\n'
    )
    os.replace(partial, path)
    return path


def load(folder: Path, rows: dict[str, Comparison]) -> dict[str, Row]:
    """The rows that have results, in the page's order."""
    files = {row: folder / f"{row}.json" for row in rows}
    return {row: Row(rows[row], json.loads(file.read_text())) for row, file in files.items() if file.exists()}


def version(comparison: Comparison) -> str:
    """Of what the row's runs compute: torch, and without their comments the sources of trainer, credit and recipes, and
    of the task and the credit that the row names here."""
    sources = [path for name in ("trainer", "credit", "recipes") for path in sorted((_PACKAGE / name).rglob("*.py"))]
    named = sorted(set(_OURS.findall(" ".join(flags_of(comparison).values()))))
    sources += [_HERE / f"{name.replace('.', '/')}.py" for name in named] + sorted((_HERE / "tasks").glob("_*.py"))
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sources:
        digest.update(file.name.encode() + _code(file).encode())
    return digest.hexdigest()[:16]


def _code(file: Path) -> str:
    """What the interpreter sees, but for docstrings and a row: its flags are known, its words compute nothing."""
    tree = ast.parse(file.read_text())
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.Assign) and ast.unparse(node).startswith("ROW ="))
    ]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return ast.dump(tree)


def commit() -> str:
    """The checkout's, with "+" where the sources of a run differ from it; "unknown" where it is none."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=_HERE, capture_output=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", *_RUN],
            cwd=_HERE,
            capture_output=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.decode().strip() + ("+" if changed.stdout.strip() else "")
