"""What flash-attn's two functions compute, in plain torch of any dtype, with their signatures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def of_lengths(
    q: Tensor,  # [Q, heads, D]
    k: Tensor,  # [K, key heads, D]
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """flash_attn_varlen_func, by its documentation: causal mask and window align the ends of queries and keys."""
    (sequence_q, left_q), (sequence_k, left_k) = _places(cu_seqlens_q, q), _places(cu_seqlens_k, k)
    back = left_k - left_q[:, None]  # how far before the query's own place a key stands
    seen = sequence_q[:, None] == sequence_k
    seen = seen & (back >= 0) if causal else seen
    seen = seen & (back <= window_size[0]) if window_size[0] >= 0 else seen
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def _places(bounds: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token, its sequence and how many of its sequence stand behind it."""
    place = torch.arange(x.shape[0])
    sequence = torch.searchsorted(bounds[1:].long(), place, right=True)
    return sequence, bounds.long()[sequence + 1] - 1 - place


def of_rows(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """flash_attn_func: rows of equal length."""
    bounds, length = torch.tensor([0, q.shape[1]]), q.shape[1]
    rows = zip(q, k, v, strict=True)
    return torch.stack([of_lengths(*row, bounds, bounds, length, length, **options) for row in rows])
