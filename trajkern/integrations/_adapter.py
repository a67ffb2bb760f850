"""What the adapters share: the versions they know, patches that can be undone, and padded rows read as a pack."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

_ABSENT = object()


def check_version(package: str, tested: Sequence[str], any_version: bool) -> None:
    """Raises where ``package`` is missing, or of a version that is not ``tested`` and that nobody asked for."""
    try:
        installed = version(package)
    except PackageNotFoundError as error:
        raise ImportError(f"{package} is not installed; trajkern was tested with {', '.join(tested)}") from error
    if installed not in tested and not any_version:
        raise RuntimeError(
            f"{package} must be {' or '.join(tested)}, the versions this was tested with; got {installed}. "
            f"any_version=True tries it all the same"
        )


class Patches:
    """Entries put into registries and module namespaces, and what stood there before."""

    def __init__(self) -> None:
        self._made: list[tuple[MutableMapping[str, Any], str, Any, Any]] = []

    def put(self, mapping: MutableMapping[str, Any], name: str, value: Any) -> None:
        self._made.append((mapping, name, value, mapping.get(name, _ABSENT)))
        mapping[name] = value

    def undo(self) -> None:
        """Restores every entry that is still the one that was put there; twice does nothing."""
        while self._made:
            mapping, name, value, before = self._made.pop()
            if mapping.get(name) is not value:
                continue
            if before is _ABSENT:
                del mapping[name]
            else:
                mapping[name] = before


class Rows(NamedTuple):
    """Padded ``[B, L]`` tensors as a pack of B trajectories of L tokens each, of which the mask says who takes part.

    A view: nothing is copied, and no device value is read. A row without a True is an empty trajectory.
    """

    mask: Tensor  # bool [B * L]
    cu_seqlens: Tensor  # [B + 1]
    shape: torch.Size

    def pack(self, name: str, x: Tensor) -> Tensor:
        """``x`` ``[B, L]`` as ``[B * L]``; an error names it as ``name``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.shape != self.shape:
            raise ValueError(f"{name} must have the mask's shape {list(self.shape)}, got {list(x.shape)}")
        return x.reshape(-1)

    def pad(self, x: Tensor) -> Tensor:
        """``x`` ``[B * L]`` as ``[B, L]``."""
        return x.view(self.shape)

    def spread(self, x: Tensor) -> Tensor:  # [B]
        """Each row's value on its tokens that take part and 0 elsewhere, ``[B, L]``."""
        return torch.where(self.pad(self.mask), x[:, None], 0)

    def mean(self, x: Tensor) -> Tensor:  # [B, L] or [B * L]
        """The mean over the tokens that take part, 0 where there are none."""
        taken = torch.where(self.mask, x.detach().reshape(-1), 0)
        return taken.sum() / self.mask.sum().clamp_min(1)


def padded_rows(name: str, mask: Tensor) -> Rows:
    """The rows of a padded mask ``[B, L]`` of any dtype, nonzero where a token takes part."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.ndim != 2:
        raise ValueError(f"{name} must have shape [B, L], got {list(mask.shape)}")
    rows, length = mask.shape
    cu_seqlens = torch.arange(rows + 1, device=mask.device) * length
    return Rows((mask != 0).reshape(-1), cu_seqlens, mask.shape)
