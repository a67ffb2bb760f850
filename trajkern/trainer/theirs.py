"""What ends a run whose task, credit, rubric or other code is a user's own: whose fault it is, in a line."""

from __future__ import annotations

import dataclasses
import dis
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, NamedTuple

from trajkern.trainer import returned
from trajkern.trainer.config import TrainConfig

RETURNED = ("returned", "checked", "compose")  # modules of the package that look at what somebody's code returns
RAISE = dis.opmap["RAISE_VARARGS"]
ASK = returned.ask.__code__  # of the frame from which all code of a user's own is called, but for a credit's


class Place(NamedTuple):
    """A line of somebody's code, and what he calls that."""

    name: str
    frame: FrameType
    line: int


def said(error: BaseException, config: TrainConfig, begun: bool) -> str | None:
    """What ends a run, in a line: what was refused of what somebody's code returned, or raised by it; and in a run that
    has ``begun`` any other refusal. None for all else, and for a refusal before that, which is said as it is."""
    if _raised_in(error, RETURNED):
        return refused(error) if begun else None
    return blamed(error, config, begun) or (refused(error) if begun else None)


def blamed(error: BaseException, config: TrainConfig, begun: bool = True, asked: str | None = None) -> str | None:
    """Whose code raised the error, what, and where; None where none of a user's took part. Before the run a ValueError
    is what a task says of its own data, without a place."""
    found = _place(error.__traceback__, config, asked)
    if error.__cause__ is not None and (found is None or found.frame.f_code is ASK):
        return blamed(error.__cause__, config, begun, found and found.name)
    if found is None:
        return None
    code, words = found.frame.f_code, _words(error)
    if words and not begun and isinstance(error, (ValueError, ImportError)):
        return f"{found.name}: {words}"
    what = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return (
        f"{found.name} raised {what} ({code.co_filename}:{found.line}, in {code.co_name}; python -X dev "
        "-m trajkern train shows the traceback)"
    )


def _place(traceback: TracebackType | None, config: TrainConfig, asked: str | None) -> Place | None:
    """The innermost line of the code that was asked last; of helpers in other modules, the line that called them."""
    found: Place | None = None
    modules, before = dict(_modules(config)), ""
    while traceback is not None:  # from the outermost call to the innermost
        frame = traceback.tb_frame
        module = frame.f_globals.get("__name__", "")
        if frame.f_code is ASK:
            asked = frame.f_locals["name"]
            found = Place(asked, frame, traceback.tb_lineno)  # of what is no Python, or is called with other arguments
        elif asked:
            found, modules[module], asked = Place(asked, frame, traceback.tb_lineno), asked, None
        elif name := modules.get(module):
            found = Place(name, frame, traceback.tb_lineno)
        elif before.startswith("trajkern.credit.") and not module.startswith(("trajkern.", "torch.")):
            modules[module] = f"credit {config.credit or config.then.credit}"  # a function of an expression's
            found = Place(modules[module], frame, traceback.tb_lineno)
        before, traceback = module, traceback.tb_next
    return found


def _modules(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The modules that settings name as "package.module:name" -> the setting and that."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _modules(value, f"{prefix}{field.name}.")
        elif isinstance(value, str) and ":" in value:
            yield value.partition(":")[0], f"{prefix}{field.name} {value}"


def refused(error: BaseException) -> str | None:
    """The words of a check that refuses what was given or returned; None for an error of another kind."""
    is_one = isinstance(error, (ValueError, ImportError)) or (isinstance(error, TypeError) and is_refusal(error))
    return (_words(error) or type(error).__name__) if is_one else None


def is_refusal(error: BaseException) -> bool:
    """Whether a line of the package says ``raise``, of what was given or returned; else it is a mistake."""
    end = _innermost(error)
    return (
        end is not None and _module(end).startswith("trajkern.") and end.tb_frame.f_code.co_code[end.tb_lasti] == RAISE
    )


def _raised_in(error: BaseException, modules: tuple[str, ...]) -> bool:
    end = _innermost(error)
    if end is None or end.tb_frame.f_code is ASK:
        return False
    package, _, module = _module(end).rpartition(".")
    return package.startswith("trajkern") and module in modules


def _innermost(error: BaseException) -> TracebackType | None:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


def _module(traceback: TracebackType) -> str:
    return traceback.tb_frame.f_globals.get("__name__", "")


def _words(error: BaseException) -> str:
    try:
        words = " ".join(str(error).split())
    except Exception:  # of an error that cannot tell
        return ""
    return words if words.isprintable() else ascii(words)[1:-1]
