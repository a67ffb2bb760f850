"""Three calls, of which the second kills the process: what the runner itself is tried on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

from tests.attack.case import Case


def cases() -> Iterator[Case]:
    yield Case("f", "first", lambda: None, (), may_pass=True)
    yield Case("f", "second", lambda: os.kill(os.getpid(), signal.SIGSEGV), ("x",))
    yield Case("f", "third", lambda: None, (), may_pass=True)
