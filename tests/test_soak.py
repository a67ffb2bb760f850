"""Calls on files are met as a run's soak says, and a sample of what it tries."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="the trainer's extra is not installed")

from trajkern._bench.reliability import calls
from trajkern._bench.reliability.writes import CUT, HALF, KILL, Meeting, Try

pytestmark = pytest.mark.skipif(bool(calls.why_not()), reason=calls.why_not())
SAMPLE = """
import random, sys
from pathlib import Path
from trajkern._bench.reliability.signals import met_alone, tries
from trajkern._bench.reliability.writes import Attack
attack, draw = Attack(Path(sys.argv[1]) / "runs"), random.Random(1)
for tried in draw.sample(attack.tries(), 8):
    print(f"{tried}: {attack.why_wrong(tried)}")
for tried in draw.sample(tries(), 4):
    print(f"{tried}: {met_alone(attack, tried)}")
"""


def written(folder: Path) -> Callable[[], int]:
    """What makes six calls: a folder, a file, two writes with a sync between, and another name; an error's number."""

    def start() -> int:
        os.mkdir(folder)
        file = os.open(folder / "a", os.O_WRONLY | os.O_CREAT)
        try:
            os.write(file, b"0123")
            os.fsync(file)
            os.write(file, b"4567")
            os.rename(folder / "a", folder / "b")
        except OSError as error:
            return error.errno or 99
        return 0

    return start


def met(folder: Path, tried: Try | None) -> tuple[int, Meeting]:
    meeting = Meeting(tried, folder)
    return calls.met(written(folder), folder, meeting), meeting


def test_each_call_is_seen_with_its_paths(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    status, meeting = met(folder, None)
    names = [x.name.removesuffix("at") for x in meeting.seen]
    assert (status, names) == (0, ["mkdir", "open", "write", "fsync", "write", "rename"])
    assert meeting.seen[-1].paths == (f"{folder}/a", f"{folder}/b")
    assert (folder / "b").read_bytes() == b"01234567"


@pytest.mark.parametrize(
    ("what", "number", "status", "left"),
    [
        (KILL, 1, -9, None),
        (KILL, 3, -9, b""),
        (KILL, 6, -9, b"01234567"),
        (HALF, 3, -9, b"01"),
        (HALF, 5, -9, b"012345"),
        (CUT, 4, -9, b""),
        (CUT, 6, -9, b"0123"),
        ("ENOSPC", 3, errno.ENOSPC, b""),
        ("EROFS", 6, errno.EROFS, b"01234567"),
    ],
)
def test_what_meets_a_call_and_what_it_leaves(
    what: str, number: int, status: int, left: bytes | None, tmp_path: Path
) -> None:
    folder = tmp_path / "f"
    ended, meeting = met(folder, Try(False, number, "", what))
    if what == CUT:
        meeting.cut(folder)
    assert ended == status
    assert (folder / "a").read_bytes() == left if left is not None else not folder.exists()


def test_a_sample_of_the_soak(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SAMPLE, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12 and all(line.endswith(": ") for line in lines), done.stdout
