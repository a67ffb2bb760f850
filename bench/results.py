"""The results of a run: what a file of them holds, and files of former versions read as this one's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trajkern import _files
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
    report = of_format(option, path, 2, FORMAT)
    with of_file(option, path):
        return upgraded(report)


@contextmanager
def of_file(*names: str | Path) -> Iterator[None]:
    """Around what reads results that a file held: what it lacks, or has of another kind, is :class:`Refused`."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        which = " ".join(map(str, names))
        raise Refused(f"{which}: results must be as --json wrote them; {type(error).__name__}: {error}") from None


def upgraded(report: Report) -> Report:
    """Results of format 2 under this version's names."""
    if report["format"] == FORMAT:
        return report
    for case in report["cases"]:
        case["seconds"] = {BARE if name == FLOOR else name: x for name, x in case["seconds"].items()}
        for target in case["targets"]:
            target["rival"] = BARE if target["rival"] == FLOOR else target["rival"]
    return report | {"format": FORMAT}


def of_format(option: str, path: Path, *formats: int) -> Report:
    """The results in a file, which ``option`` names. Raises :class:`Refused`."""
    try:
        report = json.loads(_files.read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{option} {path}: {error}") from None
    if isinstance(report, dict) and "stages" in report:  # what gpu-check wraps around it
        with of_file(option, path):
            report = report["stages"].get("benchmark", {}).get("results") or {}
    version = report.get("format", "none") if isinstance(report, dict) else "none"
    if version not in formats:
        known = " and ".join(map(str, formats))
        raise Refused(f"{option} {path}: results of format {version}; this trajkern reads {known}")
    return report


def check_takes(option: str, path: Path | None) -> None:
    """Raise :class:`Refused` where no file can be written, before anything is measured for it."""
    if path is not None and not _files.takes(path):
        raise Refused(f"{option} {path}: cannot be written")


def write(option: str, path: Path | None, content: str | bytes) -> None:
    """All of it or nothing, and nothing where there is no path. Raises :class:`Refused`."""
    if path is not None:
        try:
            _files.write(path, content)
        except OSError as error:
            raise Refused(f"{option} {path}: cannot be written: {error.strerror}") from None


def save(path: Path | None, report: Report) -> None:
    write("--json", path, json.dumps(report, indent=1) + "\n")
