"""The command line before anything else is imported: its streams, and Ctrl-C, which ends it in a line from here on.

Imports of compiled modules may turn Python's KeyboardInterrupt into other errors, and there is nothing yet to put away.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any, NoReturn, TextIO


def is_program() -> bool:
    """Whether this process is the command, and no program that imports the package."""
    words = sys.orig_argv
    as_module = any(words[n : n + 2] == ["-m", "trajkern"] for n in range(1, len(words)))
    script = os.path.splitext(os.path.basename(sys.argv[0]))[0] if sys.argv else ""
    return as_module or script in ("trajkern", "trajkern-script")


def begin() -> None:
    """Heed Ctrl-C at once from here on, if this is the command."""
    if is_program():
        open_streams()
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if plain and threading.current_thread() is threading.main_thread() and is_program():
        signal.signal(signal.SIGINT, _leave)


def open_streams() -> None:
    """Put nothing in the place of each that is closed: who writes would fail, or write into a file that took it."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(os.devnull, mode, errors="backslashreplace"))


def say(text: str) -> None:
    """A line for who started the command, whatever names are in it, if there is one: a disk may be full."""
    try:
        line = "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # of one that is closed
        forget(sys.stderr)


def forget(stream: TextIO) -> None:
    """Leave what could not be written: at its end the interpreter would try again, and complain."""
    with contextlib.suppress(OSError, ValueError):  # of an output that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(status: int) -> NoReturn:
    """End a rank of torchrun's at once: threads of its process group may hold tensors that the interpreter, at its own
    end, has them give back."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def began() -> None:
    """Ctrl-C is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    os.write(2, b"trajkern: stopped by Ctrl-C\n")
    os._exit(128 + signal.SIGINT)


begin()
