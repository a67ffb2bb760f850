"""A run's folder of results: made, locked against other runs, and what stands in it when a file fails."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import weakref
from pathlib import Path
from typing import IO, TypeGuard

from trajkern._files import put
from trajkern.trainer import checkpoint
from trajkern.trainer.checkpoint import CHECKPOINT, WARM
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.tasks import task_label

METRICS = "metrics.jsonl"
LOCK = "lock"
_held = weakref.WeakSet[IO[str]]()  # locks of this process


def _let_go() -> None:
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_let_go)  # a task's child that outlives its run would hold the folder


class ResultsError(Exception):
    """A run cannot go on: which file or whose code failed or what diverged, why, and from where it can be continued."""


class Folder:
    """A folder of results; of :meth:`of`, one that no other process works in until :meth:`close` or this one's end."""

    def __init__(self, path: Path, lock: IO[str] | None = None) -> None:
        self.path, self._lock = path, lock
        self._found = _identity(path) if lock else None

    @classmethod
    def of(cls, config: TrainConfig) -> Folder:
        """Make, lock and tidy up the folder of a run, and write its settings there.

        Raises:
            ValueError: ``out`` cannot be a folder or be written to, another run works in it, or it holds a checkpoint
                that the run does not go on from.
        """
        path = config.out
        try:
            if path is None:
                path = _new(config)
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, _locked(path))
        except OSError as error:
            raise ValueError(f"out must be a folder that can be written to; got {path or 'runs'}: {error}") from None
        if config.out is not None:
            try:
                check_free(path, config.resume)
            except ValueError:
                folder.close()
                raise
        checkpoint.clear(path)
        put(path / "config.json", (json.dumps(config.to_json(), indent=2) + "\n").encode())
        return folder

    def check(self) -> None:
        """Raise OSError where the path leads to another folder by now, which nobody has locked, or to none; and where
        the lock has been removed."""
        if self._found is not None and _identity(self.path) != self._found:
            raise OSError(f"{self.path} is another folder than the run began in: it was moved or replaced")
        if self._lock is not None:
            held, lock = os.fstat(self._lock.fileno()), self.path / LOCK
            if not os.path.lexists(lock) or _identity(lock) != (held.st_dev, held.st_ino):
                raise OSError(
                    f"{lock} is no more the file by which the run has locked its folder: others may work in it"
                )

    def close(self) -> None:
        """Let others work in it."""
        if self._lock:
            self._lock.close()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def check_free(out: Path, resumed: Path | None) -> None:
    """Raise ValueError where ``out`` is no folder, or holds a checkpoint, but for the run's own that goes on from the
    newest: what is written from there on would take the past of the others away."""
    check_folder("out", out)
    held = [path for name in (CHECKPOINT, WARM) if os.path.lexists(path := out / name)]
    if held and resumed is None:
        raise ValueError(f"out must be a new folder, or resume given; {out} already holds {held[0].name}")
    if held and not (continues(resumed, out) and (last := checkpoint.newest(out)) and last.name == resumed.name):
        raise ValueError(
            f"out must be a new folder to go on from {resumed}; {out} already holds {held[0].name}, and a run goes on "
            "in its own folder from the newest"
        )


def check_folder(name: str, folder: Path) -> None:
    """Raise ValueError where the setting ``name`` can be no folder that is written to."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:  # of a name that no file has
        raise ValueError(f"{name} must be a folder that can be written to; got {str(folder)!r}: {error}") from None
    if not there.is_dir():
        raise ValueError(f"{name} must be a folder that can be written to; got {folder}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{name} must be a folder that can be written to; got {folder}: {there} is not")


def continues(resumed: Path | None, out: Path) -> TypeGuard[Path]:
    """Whether a run in ``out`` goes on from a checkpoint of this folder's own."""
    return resumed is not None and resumed.name in (CHECKPOINT, WARM) and resumed.parent.resolve() == out.resolve()


def _new(config: TrainConfig) -> Path:
    """A folder that nobody else has made."""
    first = Path("runs") / f"{task_label(config.task)}-{config.label}-seed{config.seed}"
    folder, number = first, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not first.parent.is_dir():
                raise
            number += 1
            folder = first.with_name(f"{first.name}-{number}")


def _locked(folder: Path) -> IO[str]:
    """The file by which the folder is locked: the system lets go of it when the process ends, however it does."""
    made = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # what a link leads to is nobody's to empty
    file = os.fdopen(os.open(folder / LOCK, made, 0o666), "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ValueError(f"out must be a folder that no other run works in; {folder} is {holder}'s") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held.add(file)
    return file


def failure(error: BaseException, folder: Path | None, resumed: Path | None, theirs: str | None = None) -> ResultsError:
    """What a failed file, a step that cannot be taken, or an error of one's own code (``theirs``) means to the run
    whose results go to ``folder`` and which continues ``resumed``."""
    what = theirs or str(error) or type(error).__name__
    if theirs is None and getattr(error, "filename", None) is None and folder is not None:
        what += f"; results go to {folder}"
    stands = (folder and _last(folder)) or resumed
    there = stands is not None and os.path.isfile(stands)
    rest = f"the last checkpoint stands: continue with --resume {stands}" if there else "there is no checkpoint yet"
    return ResultsError(f"{what}; {rest}")


def _last(folder: Path) -> Path | None:
    try:
        return checkpoint.newest(folder)
    except (ValueError, MemoryError):  # who goes on from it is told what is wrong with it
        return next((path for name in (CHECKPOINT, WARM) if (path := folder / name).is_file()), None)
