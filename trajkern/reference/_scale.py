"""Powers of two by which values are divided, exactly, so that their squares neither overflow nor vanish."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_of(largest: Tensor) -> Tensor:
    """The power of two below each magnitude; 1 where that is 0 or not finite."""
    some = (largest > 0) & largest.isfinite()
    largest = torch.where(some, largest, 1).detach()
    return largest / (2 * torch.frexp(largest)[0])  # the mantissa lies in [1/2, 1)
