"""The results of a run: what a file of them holds, and files of former versions read as this one's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trajkern._bench import ceilings
from trajkern._bench.case import BARE

FORMAT = 3
FLOOR = "floor"  # the bare pass in format 2

Report = dict[str, Any]


class Refused(Exception):
    """Why nothing is run or shown."""


def new_report(device: str, *, quick: bool = False, gated: bool = True) -> Report:
    """What is known before the first case."""
    return {
        "format": FORMAT,
        "date": ceilings.now(),
        "device": device,
        "quick": quick,
        "gated": gated,
        "complete": False,
        "machine": ceilings.machine(device),
        "versions": ceilings.versions(),
        "cases": [],
    }


def load(option: str, path: Path) -> Report:
    """The results in a file, which ``option`` names. Raises :class:`Refused`."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{option} {path}: {error}") from None
    if isinstance(report, dict) and "stages" in report:  # what gpu-check wraps around it
        report = report["stages"].get("benchmark", {}).get("results") or {}
    version = report.get("format", "none") if isinstance(report, dict) else "none"
    if version not in (2, FORMAT):
        raise Refused(f"{option} {path}: results of format {version}; this trajkern reads formats 2 and {FORMAT}")
    return upgraded(report)


def upgraded(report: Report) -> Report:
    """Results of format 2 under this version's names."""
    if report["format"] == FORMAT:
        return report
    for case in report["cases"]:
        case["seconds"] = {BARE if name == FLOOR else name: x for name, x in case["seconds"].items()}
        for target in case["targets"]:
            target["rival"] = BARE if target["rival"] == FLOOR else target["rival"]
    return report | {"format": FORMAT}


def write(path: Path | None, content: str) -> None:
    """All of it or nothing, and nothing where there is no path."""
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(content)
        partial.replace(path)


def save(path: Path | None, report: Report) -> None:
    write(path, json.dumps(report, indent=1) + "\n")
