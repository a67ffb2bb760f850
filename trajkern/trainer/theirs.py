"""Errors of code that flags name, a task's, a credit's or a rubric's: whose they are, in a line."""

from __future__ import annotations

from types import FrameType
from typing import NamedTuple

from trajkern.trainer.config import TrainConfig

CHECKS = ("_checks", "checked", "compose")  # modules of the package that look at what functions return


class Place(NamedTuple):
    """A line of a module that a flag names."""

    flag: str
    value: str
    frame: FrameType
    line: int


def blamed(error: BaseException, config: TrainConfig) -> str | None:
    """Which flag's code raised the error, what, and where; None where no module that a flag names took part."""
    flags = {"task": config.task, "credit": config.credit, "compose.rubric": config.compose.rubric}
    flags["then.credit"] = config.then.credit
    modules = {value.partition(":")[0]: flag for flag, value in flags.items() if value and ":" in value}
    found: Place | None = None
    traceback = error.__traceback__
    while traceback is not None:  # from the outermost call to the innermost
        frame = traceback.tb_frame
        if flag := modules.get(frame.f_globals.get("__name__", "")):
            found = Place(flag, flags[flag] or "", frame, traceback.tb_lineno)
        traceback = traceback.tb_next
    if found is None:
        return blamed(error.__cause__, config) if error.__cause__ is not None else None
    code, words = found.frame.f_code, _words(error)
    what = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return (
        f"{found.flag} {found.value} raised {what} ({code.co_filename}:{found.line}, in {code.co_name}; python -X dev "
        "-m trajkern train shows the traceback)"
    )


def is_refusal(error: TypeError) -> bool:
    """Whether a check of the package raised it, of what a function of one's own has returned; else it is a mistake."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    name = "" if traceback is None else traceback.tb_frame.f_globals.get("__name__", "")
    package, _, module = name.rpartition(".")
    return package.startswith("trajkern") and module in CHECKS


def _words(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())
    except Exception:  # of an error that cannot tell
        return ""
