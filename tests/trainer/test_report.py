"""The live line, as a terminal of few columns shows it."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from trajkern.trainer.report import Display, Metrics, shown

VALUES = {"loss": -0.0123, "live_groups": 7, "entropy": 1.2, "reward": 0.062, "tokens/s": 41234, "val_pass@1": 0.25}
IN_ORDER = ["reward 0.062", "loss -0.012", "val_pass@1 0.250", "tokens/s 41234", "live_groups 7", "entropy 1.200"]


def live_line(width: int, name: str) -> str:
    pytest.importorskip("rich")
    terminal = io.StringIO()
    display = Display(file=terminal, force_terminal=True, width=width, legacy_windows=False)
    display.begin(name, 300, 0)
    display.step(123, VALUES)
    display.end()
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width
    return next(line for line in reversed(lines) if "123/300" in line)


@pytest.mark.parametrize("name", ["grpo", "random-rewards"])
@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_keeps_bar_step_and_reward(width: int, name: str) -> None:
    line = live_line(width, name)
    assert line.startswith(name) and "━" in line and "123/300" in line and "reward 0.062" in line


def test_a_wide_terminal_shows_the_rest_in_order() -> None:
    assert live_line(160, "grpo").rstrip().endswith("  ".join(IN_ORDER))


def test_what_has_no_room_is_dropped_from_the_end() -> None:
    whole = "  ".join(IN_ORDER)
    assert shown(VALUES) == shown(VALUES, len(whole)) == whole
    for room in range(len(whole)):
        text = shown(VALUES, room)
        assert len(text) <= room and whole.startswith(text) and text in {"  ".join(IN_ORDER[:n]) for n in range(6)}


LINES = b'{"phase": "main", "step": 1, "reward": 0.5}\n{"phase": "main", "step": 2}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.fixture
def marks(path: Path) -> str:
    """Of two lines that a run has written before its checkpoint."""
    with contextlib.closing(Metrics(path, history=None, marks="", tensorboard=None)) as metrics:
        metrics.write("main", 1, {"reward": 0.5})
        metrics.write("main", 2, {})
        assert path.read_bytes() == LINES
        return metrics.marks


@pytest.mark.parametrize("later", [b"", b"and more\n", b'{"phase": "ma'])
def test_a_resumed_run_has_its_past_at_every_moment(path: Path, marks: str, later: bytes) -> None:
    """Also where it is killed before its first step: what a file holds counts, not what a buffer does."""
    path.write_bytes(LINES + later)
    metrics = Metrics(path, history=path, marks=marks, tensorboard=None)
    assert path.read_bytes() == LINES
    assert metrics.marks == marks
    metrics.write("main", 3, {})
    assert path.read_bytes() == LINES + b'{"phase": "main", "step": 3}\n'
    assert metrics.marks.startswith(marks) and len(metrics.marks) == len(marks) // 2 * 3
    metrics.close()
    assert [x.name for x in path.parent.iterdir()] == ["metrics.jsonl"]


FIRST, SECOND = LINES.splitlines(keepends=True)
OTHER = FIRST.replace(b"0.5", b"0.6")
EDITS = {
    "changed": (OTHER + SECOND, "line 1 is not"),
    "the last one changed": (FIRST + SECOND.replace(b"2", b"3"), "line 2 is not"),
    "removed": (SECOND, "line 1 is not"),
    "the last one removed": (FIRST, "line 2 is missing"),
    "added before": (OTHER + LINES, "line 1 is not"),
    "added between": (FIRST + OTHER + SECOND, "line 2 is not"),
    "doubled": (FIRST + LINES, "line 2 is not"),
    "swapped": (SECOND + FIRST, "line 1 is not"),
    "other ends of lines": (LINES.replace(b"\n", b"\r\n"), "line 1 is not"),
    "a byte-order mark": (b"\xef\xbb\xbf" + LINES, "line 1 is not"),
    "cut": (LINES[:-1], "line 2 is not"),
    "emptied": (b"", "line 1 is missing"),
    "no text": (b"\xff\x00", "line 1 is not"),
}


@pytest.mark.parametrize("content", EDITS)
def test_an_edited_past_is_refused_with_its_line_and_left_alone(path: Path, marks: str, content: str) -> None:
    path.write_bytes(edited := EDITS[content][0])
    told = f"{path} must be as its run wrote it up to the checkpoint to resume; {EDITS[content][1]}: without the file"
    with pytest.raises(ValueError, match=f"^{re.escape(told)} the run goes on, and without its past$"):
        Metrics(path, history=path, marks=marks, tensorboard=None)
    assert path.read_bytes() == edited


def test_a_past_that_is_gone_is_left_out(path: Path, marks: str) -> None:
    path.unlink()
    with contextlib.closing(Metrics(path, history=path, marks=marks, tensorboard=None)) as metrics:
        assert metrics.marks == "" and path.read_bytes() == b""


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(path: Path, marks: str, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)
    with pytest.raises(ValueError, match=f"^{path} must be as its run wrote it .*; line 1 is missing"):
        Metrics(path, history=path, marks=marks, tensorboard=None)


def test_a_pipe_that_nobody_reads_any_more_ends_no_run() -> None:
    """Of which the library would make the end of the process."""
    reader, writer = os.pipe()
    with open(writer, "w") as pipe:
        display = Display(file=pipe)
        display.begin("grpo", 2, 0)
        display.say("read")
        assert os.read(reader, 100) == b"read\n"
        os.close(reader)
        for step in (1, 2):
            display.say("unread")
            display.step(step, VALUES)
        display.end()
