"""Memory that an op allocates starts as NaN, so that an element it never writes cannot pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args, **kwargs) -> Tensor:
        x = allocate(*args, **kwargs)
        return x.fill_(torch.nan if x.is_floating_point() else 77 if x.dtype != torch.bool else True)

    return poisoned


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoned(torch.empty))
        patch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
        yield
