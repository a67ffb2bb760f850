"""``python bench/gpu_tests.py FILE PYTEST_ARGUMENTS``: a line of JSON for each test, written when it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest


class Lines:
    """A plugin; with pytest-xdist it runs where all workers report."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return  # a test's set-up and the like, which is a result where it fails or skips
        why = None if report.passed else str(report.longrepr)[-2000:]
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), "why": why}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[2:], plugins=[Lines(Path(sys.argv[1]))]))
