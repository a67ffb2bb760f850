"""What masks of a padded batch may be."""

from __future__ import annotations

import torch
from torch import Tensor

from trajkern._checks import check_shape, check_tensor, describe


def real_tokens(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    keep = flags("attention_mask", attention_mask, tokens)
    edges = keep[:, :1].sum(1) + (keep[:, 1:] & ~keep[:, :-1]).sum(1)
    if bool((edges > 1).any()):
        row = int((edges > 1).nonzero()[0, 0])
        raise ValueError(f"attention_mask must mark one contiguous stretch in each row; row {row} has a gap")
    return keep


def flags(name: str, mask: Tensor, tokens: Tensor) -> Tensor:
    same_shape(name, mask, tokens)
    if mask.is_complex():
        raise TypeError(f"{name} must be of a real dtype; got {describe(mask)}")
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
