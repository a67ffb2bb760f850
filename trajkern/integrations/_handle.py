"""What an adapter says of what it has replaced, and the way back: a handle, which is a context manager."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from typing_extensions import Self

LOGGER = logging.getLogger("trajkern")
if LOGGER.level == logging.NOTSET:
    LOGGER.setLevel(logging.INFO)


class _Alone(logging.Handler):
    """To stderr where nobody has set up logging; else the records go where everybody's do."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(record.getMessage(), file=sys.stderr)


LOGGER.addHandler(_Alone())


def say(line: str) -> None:
    """A line of the logger "trajkern", by one rank of several; the logger's level silences it."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        LOGGER.info(line)


class Enabled:
    """Something of a host's that trajkern stands in for, until :meth:`disable`, or the end of a ``with`` block.

    Once the same is enabled again, or was disabled, this handle undoes nothing any more.
    """

    _what: str
    _undo: Callable[[], None]
    _stands: Callable[[], bool]

    @classmethod
    def of(cls, what: str, undo: Callable[[], None], stands: Callable[[], bool], *parts: Any) -> Self:
        """Says ``what`` was replaced, and returns the handle.

        Args:
            undo: takes it back.
            stands: whether it is still this handle's to take back.
            parts: of the tuple, where the handle is one.
        """
        handle = cls.__new__(cls, parts) if issubclass(cls, tuple) else cls()
        handle._what, handle._undo, handle._stands = what, undo, stands
        say(what)
        return handle

    @property
    def active(self) -> bool:
        """Whether it still stands."""
        return self._stands()

    def disable(self) -> None:
        """Takes back what was replaced; twice does nothing."""
        if self._stands():
            self._undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.disable()

    def __repr__(self) -> str:
        return f"<{self._what}{'' if self.active else ' (taken back)'}>"


class Registered(Enabled, tuple[list[str], list[str]]):
    """(estimators, losses): the names registered with a host; and the handle that takes them back."""

    __repr__ = tuple.__repr__
