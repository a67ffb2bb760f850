"""Ctrl-C while the command line is still being imported: a line and status 130, as of Ctrl-C later.

Imports of compiled modules may turn Python's KeyboardInterrupt into other errors, and there is nothing yet to put away.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any


def is_program() -> bool:
    """Whether this process is the command, and no program that imports the package."""
    words = sys.orig_argv
    as_module = any(words[n : n + 2] == ["-m", "trajkern"] for n in range(1, len(words)))
    script = os.path.splitext(os.path.basename(sys.argv[0]))[0] if sys.argv else ""
    return as_module or script in ("trajkern", "trajkern-script")


def begin() -> None:
    """Heed Ctrl-C at once from here on, if this is the command."""
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if plain and threading.current_thread() is threading.main_thread() and is_program():
        signal.signal(signal.SIGINT, _leave)


def began() -> None:
    """Ctrl-C is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    os.write(2, b"trajkern: stopped by Ctrl-C\n")
    os._exit(128 + signal.SIGINT)


begin()
