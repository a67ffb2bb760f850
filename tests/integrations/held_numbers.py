"""How a module can hold a number in a tensor, and how it can be given another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn


def _attribute(h: nn.Module, name: str, x: Tensor) -> None:
    vars(h).pop(name, None)
    setattr(h, name, x)


def _parameter(h: nn.Module, name: str, x: Tensor) -> None:
    vars(h).pop(name, None)
    h.register_parameter(name, nn.Parameter(x, requires_grad=False))


def _buffer(h: nn.Module, name: str, x: Tensor) -> None:
    if hasattr(h, name):
        delattr(h, name)
    h.register_buffer(name, x)


KINDS: dict[str, Callable[[nn.Module, str, Tensor], None]] = {
    "an attribute": _attribute,
    "a frozen parameter": _parameter,
    "a buffer": _buffer,
}


def _data(h: nn.Module, name: str, x: Tensor) -> None:
    getattr(h, name).data = x


def _copied(h: nn.Module, name: str, x: Tensor) -> None:
    getattr(h, name).copy_(x)


def _loaded(h: nn.Module, name: str, x: Tensor, assign: bool = False) -> None:
    if name in h.state_dict():
        h.load_state_dict(h.state_dict() | {name: x}, assign=assign)
    else:
        _copied(h, name, x)


def _unseen(h: nn.Module, name: str, x: Tensor) -> None:
    """In place, with no version that moves, where a GPU's could be read only by a wait."""
    (getattr(h, name).detach().data if x.numel() <= 16 else getattr(h, name)).copy_(x)


CHANGES: dict[str, Callable[[nn.Module, str, Tensor], None] | None] = {
    "another": None,  # by its kind
    "in place": _copied,
    "in place, past its version": _unseen,
    "other data": _data,
    "loaded": _loaded,
    "loaded by assignment": partial(_loaded, assign=True),
}
