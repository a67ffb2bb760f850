"""No argument kills the process, gets through in silence or is refused without its name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.hostile_calls import good

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = [function.__qualname__ for function in good()]


def _run(step: int) -> dict[str, list[str]]:
    """What went wrong with each function's cases; a process that died is begun again behind the case that killed it."""
    wrong: dict[str, list[str]] = {}
    wrong, first = defaultdict(list), 0
    while True:
        command = [sys.executable, "-m", "tests.hostile_calls", str(first), str(step)]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        lines = [json.loads(line) for line in found.stdout.splitlines()]
        for _, label, *verdict in lines:
            if verdict:
                wrong[label.partition("(")[0]].extend(f"{label}: {x}" for x in verdict if x)
        if found.returncode == 0:
            return wrong
        assert lines and len(lines[-1]) == 2, found.stderr
        number, label = lines[-1]
        wrong[label.partition("(")[0]].append(f"{label}: the process ended with {found.returncode}")
        first = number + 1


@pytest.fixture(scope="module")
def sample() -> dict[str, list[str]]:
    return _run(7)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_sample_of_hostile_arguments(function: str, sample: dict[str, list[str]]) -> None:
    assert function in sample  # its good call at least
    assert not sample[function]


@pytest.mark.slow
def test_all_hostile_arguments() -> None:
    found = _run(1)
    assert set(found) == set(FUNCTIONS)
    assert not any(found.values()), found
