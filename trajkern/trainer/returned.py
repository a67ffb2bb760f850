"""What code of a user's own gives back: asked for by the name that it has to him, and of its kind or refused by it."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import torch

from trajkern._checks import check_tensor, describe

LARGEST = 2.0**126  # no square of a difference overflows float32 in a group's deviation
_SURROUNDINGS = (
    "torch's gradient mode",
    "torch's inference mode",
    "torch's default dtype",
    "torch's deterministic algorithms",
    "torch's threads",
    "the current folder",
)
_OWN = (list, dict)  # what a function may change, and the trainer goes on reading


def ask(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function called ``name`` returns; it gets copies of lists and dicts. Errors are its own:
    :func:`trajkern.trainer.theirs.blamed` finds them behind this frame.

    Raises:
        ValueError: it has changed what all of the process computes by.
    """
    given, before = [x.copy() if type(x) in _OWN else x for x in args], _surroundings()
    try:
        value = function(*given, **kwargs)
    except (StopIteration, GeneratorExit) as error:  # which would end a loop of ours in silence
        raise RuntimeError(f"{name} raised {type(error).__name__}") from error
    finally:
        after = _surroundings()
        if before[-1] not in (None, after[-1]):
            os.chdir(before[-1])  # to which the results are relative
    _check_surroundings(name, before, after)
    return value


def agreed(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What :func:`ask` returns; of ranks that work on the same rollouts, what the first of them got: a verifier may ask
    a judge, which does not say the same twice. Each asks, so that a task's own state is the same on all."""
    share, _sharing.share = _sharing.share, None  # what it asks in turn is its own
    try:
        value = ask(name, function, *args, **kwargs)
    finally:
        _sharing.share = share
    return value if share is None else share(name, value)


class _Sharing:
    share: Callable[[str, Any], Any] | None = None


_sharing = _Sharing()


@contextlib.contextmanager
def sharing(share: Callable[[str, Any], Any] | None) -> Iterator[None]:
    """A block in which :func:`agreed` gives ``share`` of a name and what was returned."""
    before, _sharing.share = _sharing.share, share
    try:
        yield
    finally:
        _sharing.share = before


@contextlib.contextmanager
def unchanged(name: str, *tensors: torch.Tensor) -> Iterator[None]:
    """A block in which functions of an expression called ``name`` run, which have no frame of :func:`ask`.

    Raises:
        ValueError: they have changed what all of the process computes by, or one of the tensors in place.
    """
    before, versions = _surroundings(), [x._version for x in tensors]
    try:
        yield
    finally:
        after = _surroundings()
        if before[-1] not in (None, after[-1]):
            os.chdir(before[-1])
    _check_surroundings(name, before, after)
    if versions != [x._version for x in tensors]:
        raise ValueError(f"{name} must leave the tensors of the rollouts as they are; it has changed one in place")


def _check_surroundings(name: str, before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    if before != after:
        what, was, became = next(x for x in zip(_SURROUNDINGS, before, after, strict=True) if x[1] != x[2])
        raise ValueError(f"{name} must leave {what} at {was}, got {became}")


def _surroundings() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
        _folder(),
    )


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # of one that is gone
        return None


def refuse(kind: type[Exception], name: str, expected: str, value: Any, part: str = "") -> Exception:
    """Of what ``name`` returned, or of a ``part`` of that."""
    if inspect.iscoroutine(value):
        value.close()  # or Python complains that nobody awaited it
    return kind(f"{name} must return {expected}, got {shown(value)}{f' as {part}' if part else ''}")


def as_number(
    name: str,
    value: Any,
    expected: str = "a number",
    *,
    low: float = -math.inf,
    high: float = math.inf,
    nan: bool = False,
    part: str = "",
) -> float:
    """A number of Python's (True is 1), of numpy's, or of a tensor without dimensions, finite and at most 2^126."""
    number = _plain(value)
    if not isinstance(number, (bool, int, float)):
        raise refuse(TypeError, name, expected, value, part)
    if number != number:
        if nan:
            return math.nan
        raise refuse(ValueError, name, expected, value, part)
    if not abs(number) <= LARGEST:
        raise refuse(ValueError, name, f"{expected} of a magnitude of at most {LARGEST:.3g}", value, part)
    if not low <= number <= high:
        raise refuse(ValueError, name, expected, value, part)
    return float(number)


def as_flag(name: str, value: Any, expected: str = "True or False", part: str = "") -> bool:
    """True or False, or the number 1 or 0; of Python's, numpy's or a tensor without dimensions."""
    flag = _plain(value)
    if not isinstance(flag, (bool, int, float)):
        raise refuse(TypeError, name, expected, value, part)
    if flag not in (0, 1):
        raise refuse(ValueError, name, expected, value, part)
    return bool(flag)


def as_place(name: str, value: Any, expected: str, part: str = "") -> int:
    """A whole number of Python's or numpy's, no flag."""
    place = _plain(value)
    if isinstance(place, bool) or not isinstance(place, int):
        raise refuse(TypeError, name, expected, value, part)
    return place


def as_text(
    name: str, value: Any, expected: str = "a text", alphabet: Collection[str] | None = None, part: str = ""
) -> str:
    """A string that UTF-8 can hold, and ``alphabet`` can spell where there is one."""
    if not isinstance(value, str):
        raise refuse(TypeError, name, expected, value, part)
    value = str.__str__(value)  # of a class of one's own, the characters alone
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise refuse(ValueError, name, f"{expected} without halves of surrogate pairs", value, part) from None
    if alphabet is not None and not set(value) <= set(alphabet):
        character = next(x for x in value if x not in alphabet)
        what = f"{expected} that the model can spell"
        raise refuse(ValueError, name, what, character, f"U+{ord(character):04X}{f' in {part}' if part else ''}")
    return value


def as_list(name: str, value: Any, expected: str, count: int | None = None) -> list[Any]:
    """A list or a tuple, an array or a tensor of one dimension; of ``count`` entries where that is given, and then
    also of an iterator's."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        found = _listed(value)
    elif isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):  # one Answer is no list of its parts
        found = list(value)
    else:
        found = _drawn(value, count)
    if found is None:
        raise refuse(TypeError, name, expected, value)
    if count is not None and len(found) != count:
        got = f"more than {count}" if len(found) > count else len(found)
        raise ValueError(f"{name} must return {expected}, {count} of them; got {got}")
    return found


def shown(value: Any) -> str:
    """A value's own words on one line, cut short, and its kind."""
    words = " ".join(describe(value).split())
    return words if words.isprintable() else ascii(words)[1:-1]


def _plain(value: Any) -> Any:
    """Python's own in place of a scalar of numpy's, or of an array or a tensor without dimensions."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.ndim == 0 and _is_read(value) else value
    if isinstance(value, np.ma.MaskedArray):  # whose item is 0 where there is none
        return value
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def _listed(value: Any) -> list[Any] | None:
    """The entries of an array or a tensor of one dimension that has them all."""
    if value.ndim != 1 or isinstance(value, np.ma.MaskedArray):
        return None
    found: list[Any] | None = value.tolist() if isinstance(value, np.ndarray) or _is_read(value) else None
    return found


def _is_read(value: torch.Tensor) -> bool:
    """Whether a tensor has values in memory."""
    try:
        check_tensor("value", value)
    except (TypeError, ValueError):
        return False
    return not value.is_meta


def _drawn(value: Any, count: int | None) -> list[Any] | None:
    """At most one more than ``count`` of what an iterator yields; None for what is none."""
    if count is None or not hasattr(value, "__next__"):
        return None
    found: list[Any] = []
    for each in value:
        found.append(each)
        if len(found) > count:
            break
    return found
