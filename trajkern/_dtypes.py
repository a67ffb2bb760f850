"""The dtypes that arguments may have, and the precision in which they are summed and returned."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, *INTEGERS, *FLOATS)  # of a padded batch
LAID_OUT = (*MASKS, torch.complex32, torch.complex64, torch.complex128)  # what torch can copy by index


def accumulator(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
