"""Memory that runs out, in whichever of its forms."""

from __future__ import annotations

import re
import traceback

_NO_MEMORY = "can't allocate memory|[Cc]annot allocate memory|out of memory|bad_alloc|size calculation overflowed"


def ran_out(error: BaseException) -> str | None:
    """That memory ran out, in words, and what could not be had; None of another error. torch has several for it."""
    text = str(error)
    plain = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if isinstance(error, (OSError, ValueError, ImportError)) or not (plain or re.search(_NO_MEMORY, text)):
        return None
    traceback.clear_frames(error.__traceback__)  # which hold what there is: the words need some, too
    size = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)|with sizes=(\[.*?\])", text) or re.search(
        r"[Uu]nable to allocate ([\d.]+ \w+)()", text
    )
    return f"memory ran out: {size[1] or f'a tensor of sizes {size[2]}'} could not be had" if size else "memory ran out"
