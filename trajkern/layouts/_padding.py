"""What masks of a padded batch may be."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trajkern._checks import as_number, check_dtype, check_shape, check_tensor, describe
from trajkern._dtypes import MASKS


def real_tokens(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    keep = flags("attention_mask", attention_mask, tokens)
    edges = keep[:, :1].sum(1) + (keep[:, 1:] & ~keep[:, :-1]).sum(1)
    if bool((edges > 1).any()):
        row = int((edges > 1).nonzero()[0, 0])
        raise ValueError(f"attention_mask must mark one contiguous stretch in each row; row {row} has a gap")
    return keep


def flags(name: str, mask: Tensor, tokens: Tensor) -> Tensor:
    same_shape(name, mask, tokens)
    check_dtype(name, mask, MASKS)
    bad = ~torch.isfinite(mask) | (mask < 0)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        value = mask[row, column].item()
        raise ValueError(f"{name} must be 0 or a positive number everywhere; it is {value} at [{row}, {column}]")
    return mask > 0


def same_shape(name: str, x: Tensor, tokens: Tensor) -> Tensor:
    check_tensor(name, x, device=tokens.device)
    check_shape(name, x, tuple(tokens.shape), "the shape of tokens")
    return x


def padding(value: Any, x: Tensor) -> float:
    """The number that stands where ``x`` has none, which its dtype must hold: NaN and infinity too, if it has them."""
    number = value if isinstance(value, bool) else as_number("value", value)
    if x.is_floating_point() or x.is_complex():
        legal = number != number or abs(number) == math.inf or abs(number) <= torch.finfo(x.dtype).max
    elif x.dtype == torch.bool:
        legal = number in (0, 1)
    else:
        limits = torch.iinfo(x.dtype)
        legal = limits.min <= number <= limits.max and number == int(number)
    if not legal:
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"value must be one that {dtype} holds, as x is; got {describe(value)}")
    return float(number) if x.is_floating_point() else number
