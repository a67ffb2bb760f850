"""How a run is asked to stop: Ctrl-C, and the signals of schedulers and of terminals that close."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_replaced: dict[int, Any] = {}  # the handlers in whose place a run's stand
_mask = threading.local()


def _put_back() -> None:
    for number, handler in _replaced.items():
        signal.signal(number, handler)


def _hold() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _replaced)


def _deliver() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _begin_child() -> None:
    _put_back()
    _deliver()


# what a task forks must end by the SIGTERM that a run outlives, also by one that is there before it has begun
os.register_at_fork(before=_hold, after_in_parent=_deliver, after_in_child=_begin_child)


class Interrupted(Exception):
    """A signal came; a checkpoint was written to ``path``."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(path, number)
        self.path, self.number = path, number

    @property
    def status(self) -> int:
        """Of the process that ends by it."""
        return 128 + self.number

    def __str__(self) -> str:
        name = "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name
        return f"stopped by {name}; continue with --resume {self.path}"


class Interrupt(threading.Event):
    """Set by a signal, whose ``number`` it keeps."""

    number: int = signal.SIGINT

    @property
    def signal(self) -> int:
        """The number of the signal that came, or 0."""
        return self.number if self.is_set() else 0


@contextlib.contextmanager
def interruptible(patient: bool) -> Iterator[Interrupt]:
    """An event that Ctrl-C, SIGTERM and SIGHUP set, so that the step in progress ends first; of each, a second one does
    what it did before. A signal that was ignored, as nohup has it of SIGHUP, still is.

    Unless ``patient``: torchrun passes on the Ctrl-C that every rank gets from the terminal, too.
    """
    event = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {n: signal.getsignal(n) for n in SIGNALS}
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def heed(number: int, frame: Any) -> None:
        if not event.is_set():
            event.number = number
        event.set()
        if not patient:
            signal.signal(number, before[number])

    _replaced.update(before)
    for number in before:
        signal.signal(number, heed)
    try:
        yield event
    finally:
        _put_back()
        _replaced.clear()
