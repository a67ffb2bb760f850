"""Reductions over spans, and values spread to tokens, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trajkern._results import Branch


def _accumulated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def span_reduce(
    x: Tensor,  # [T]
    spans: Any,
    op: str = "mean",
) -> Tensor:
    """See :func:`trajkern.span_reduce`."""
    x, count = _accumulated(x), len(spans)
    span = torch.where(spans.token_span < 0, count, spans.token_span)  # the last sum is of what no span holds
    if op in ("max", "min"):
        none = x.new_full((count + 1,), {"max": -torch.inf, "min": torch.inf}[op])
        best = none.scatter_reduce(0, span, x.detach(), f"a{op}")
        token = torch.arange(x.shape[0], device=x.device)
        place = torch.where((x.detach() == best[span]) | x.detach().isnan(), token, x.shape[0])
        first = span.new_full((count + 1,), x.shape[0]).scatter_reduce(0, span, place, "amin")[:count]
        return torch.where(spans.lengths == 0, none[:count], torch.cat((x, x.new_zeros(1)))[first])
    total = x.new_zeros(count + 1).index_add(0, span, x)[:count]
    if op == "sum":
        return total
    if op == "mean":
        return total / spans.lengths.clamp_min(1)
    raise ValueError(f"op must be a reduction of trajkern.span_reduce, got {op!r}")


def spread(
    values: Tensor | Branch,  # [S], [N] or [M]
    layout: Any,
) -> Tensor | Branch:
    """See :func:`trajkern.spread`."""
    if isinstance(values, Branch):
        return Branch(*(spread(x, layout) for x in values))  # type: ignore[arg-type]
    x = _accumulated(values)
    if hasattr(layout, "token_span"):
        return torch.cat((x, x.new_zeros(1)))[layout.token_span]  # -1 is the last
    lengths = layout.lengths if hasattr(layout, "lengths") else layout.node_lengths
    return torch.repeat_interleave(x, lengths.long(), output_size=layout.num_tokens)
