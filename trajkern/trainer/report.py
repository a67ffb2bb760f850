"""What a run shows and leaves behind: a live display, a JSONL file, TensorBoard events."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trajkern._files import is_file, put
from trajkern.trainer.optional import require

Scalar = float | int | None
# What a step shows, the dearest first: a narrow terminal has no room for the last ones.
_SHOWN = ("reward", "loss", "val_pass@1", "tokens/s", "live_groups", "val_pass@k", "entropy")
_BAR, _SHORT_BAR = 24, 10  # columns of it, from 80 of the terminal and below
_CLOCK = len("0:00:00")
_MARK = 8  # hexadecimal digits
_PLAIN_INTERVAL = 5.0  # seconds between progress lines where the output is no terminal


def _past(history: Path, marks: str) -> list[bytes]:
    """The lines that ``marks`` are of; none without the file. Raises ValueError where one is not as it was written."""
    if not history.exists():
        return []
    lines, digest, why = list[bytes](), hashlib.sha256(), ""
    with open(history, "rb") if is_file(history) else io.BytesIO() as file:
        for number, at in enumerate(range(0, len(marks), _MARK), start=1):
            lines.append(line := file.readline())
            digest.update(line)
            if digest.hexdigest()[:_MARK] != marks[at : at + _MARK]:
                why = f"line {number} is {'not' if line else 'missing'}"
                break
    if why:
        raise ValueError(
            f"{history} must be as its run wrote it up to the checkpoint to resume; {why}: without the file the run "
            "goes on, and without its past"
        )
    return lines


class Metrics:
    """One JSON object a line, written through at once; TensorBoard scalars beside it on request.

    Args:
        path: the file.
        history: the file that a resumed run continues. Its first lines, of which ``marks`` are, are kept and the rest
            is dropped, so that the run leaves the file that one without a stop would.
        marks: of each line that was written before a checkpoint the first digits of a SHA-256 of all up to its end.
        tensorboard: folder for event files.
        quiet: write nothing, on all ranks but the first.
    """

    def __init__(
        self, path: Path, *, history: Path | None, marks: str, tensorboard: Path | None, quiet: bool = False
    ) -> None:
        if quiet:
            path, history, tensorboard = Path(os.devnull), None, None
        self._quiet, self._digest, self._marks = quiet, hashlib.sha256(), list[str]()
        for line in (past := _past(history, marks) if history else []):
            self._mark(line)
        if not quiet:
            put(path, b"".join(past))  # all of it, at every moment at which the run may be killed
        self._file = open(path, "ab")
        self._board = Board(tensorboard) if tensorboard else None

    @property
    def marks(self) -> str:
        """Of the lines so far."""
        return "".join(self._marks)

    def sync(self) -> None:
        """Wait until what was written is on the disk: no checkpoint may say more than that."""
        if not self._quiet:
            os.fsync(self._file.fileno())

    def _mark(self, line: bytes) -> None:
        self._digest.update(line)
        self._marks.append(self._digest.hexdigest()[:_MARK])

    def write(self, phase: str, step: int, values: Mapping[str, Scalar]) -> None:
        line = json.dumps({"phase": phase, "step": step, **values}).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._mark(line)
        if self._board:
            scalars = {f"{phase}/{k}": float(x) for k, x in values.items() if isinstance(x, (int, float))}
            self._board.add(step, scalars)

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


class Board:
    """TensorBoard's scalars, written at once: its own writer does so in a thread, which would fail there."""

    def __init__(self, folder: Path) -> None:
        self._events = require("tensorboard.compat.proto.event_pb2")
        self._path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        with self._named():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "ab", buffering=0)
            self._records = require("tensorboard.summary.writer.record_writer").RecordWriter(self._file)
            self._write(file_version="brain.Event:2")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        with self._named():
            self._write(step=step, summary={"value": [{"tag": k, "simple_value": x} for k, x in scalars.items()]})

    def close(self) -> None:
        self._file.close()

    def _write(self, **event: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **event).SerializeToString())

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """A write's error names no file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


class Display:
    """A progress bar on a terminal, a line every few seconds elsewhere; nothing where ``quiet``."""

    def __init__(self, quiet: bool = False, **console: Any) -> None:
        """``console``: options of rich's Console, such as its file and width."""
        options: dict[str, Any] = {"soft_wrap": True, "highlight": False, "emoji": False, "quiet": quiet} | console
        self._console = require("rich.console").Console(**options)
        self._console.on_broken_pipe = self._without  # the library's own ends the process
        self._bar: Any = None
        self._task: Any = None
        self._printed = 0.0

    def say(self, text: str) -> None:
        if getattr(self._console.file, "closed", False):  # by code of a task's, say
            return
        try:
            self._console.print(text, markup=False)
        except OSError:  # a full disk, a terminal that has closed
            self._without()

    def _without(self) -> None:
        """Nobody reads what is shown any more: the run goes on without."""
        self._console.quiet = True
        with contextlib.suppress(OSError, ValueError):  # what was not written would be again, at the interpreter's end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._console.file.fileno())

    def begin(self, name: str, total: int, done: int) -> None:
        """Start the display of a phase of ``total`` steps, of which ``done`` are behind us."""
        self._name, self._total = name, total
        self._latest: dict[str, Scalar] = {}
        if self._console.is_terminal:
            self._bar_width = _BAR if self._console.width >= 80 else _SHORT_BAR
            progress = require("rich.progress")
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=self._bar_width),
                progress.TextColumn("{task.completed}/{task.total}"),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.fields[values]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task(name, total=total, completed=done, values="")
            self._bar.start()

    def step(self, step: int, values: Mapping[str, Scalar]) -> None:
        self._latest |= {k: v for k, v in values.items() if k in _SHOWN and v is not None}
        if self._bar:
            taken = (
                len(self._name) + self._bar_width + len(f"{step}/{self._total}") + _CLOCK + 4
            )  # columns stand one apart
            text = shown(self._latest, max(self._console.width - taken, 0))
            self._bar.update(self._task, completed=step, values=text)
        elif time.monotonic() - self._printed > _PLAIN_INTERVAL or step == self._total:
            self._printed = time.monotonic()
            self.say(f"{self._name} {step}/{self._total}  {shown(self._latest)}")

    def end(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def shown(values: Mapping[str, Scalar], room: int | None = None) -> str:
    """As many of a step's values as ``room`` columns hold, the dearest first; by default all."""
    text = ""
    for name in _SHOWN:
        if name in values:
            value = values[name]
            word = f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
            longer = f"{text}  {word}" if text else word
            if room is not None and len(longer) > room:
                break
            text = longer
    return text
