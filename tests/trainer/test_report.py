"""The live line, as a terminal of few columns shows it."""

from __future__ import annotations

import io
import os
import re
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


@pytest.mark.parametrize("kept", [LINES, LINES + b'{"phase": "ma'])
def test_a_resumed_run_has_its_past_at_every_moment(tmp_path: Path, kept: bytes) -> None:
    """Also where it is killed before its first step: what a file holds counts, not what a buffer does."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(kept + b"and more\n")
    metrics = Metrics(path, history=path, size=len(kept), tensorboard=None)
    assert path.read_bytes() == LINES
    assert metrics.size == len(LINES)
    metrics.write("main", 3, {})
    assert path.read_bytes() == LINES + b'{"phase": "main", "step": 3}\n'
    metrics.close()
    assert [x.name for x in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", [b"{}", b"[1]", b"\xff\x00", b'{"phase": 1, "step": 2}', b"[" * 100_000, b""])
def test_a_damaged_past_is_refused_and_left_alone(tmp_path: Path, line: bytes) -> None:
    path, content = tmp_path / "metrics.jsonl", LINES + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} must hold the metrics of the run to resume, .*; line 3 is damaged"):
        Metrics(path, history=path, size=10**6, tensorboard=None)
    assert path.read_bytes() == content


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
