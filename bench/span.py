"""Cases of the span family: reductions over turns of about 40 tokens, beside torch's segment_reduce."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajkern._bench.case import Problem, Target, TimedCase, with_compiled
from trajkern.layouts.spans import Spans
from trajkern.testing.numerics import Outcome
from trajkern.testing.span import spans_of

TURN = (20, 61)  # tokens of a turn, and of what stands between two


def packed(tokens: int) -> Spans:
    """Turns of 20 to 60 tokens, with as many between them, ten to a trajectory, up to that many tokens."""
    generator = torch.Generator().manual_seed(0)
    count = tokens // sum(TURN)
    lengths = torch.randint(*TURN, (count,), generator=generator)
    return spans_of(lengths, torch.randint(*TURN, (count + 1,), generator=generator), 10)


def _segments(spans: Spans) -> Tensor:
    """Tokens before the first span, in it, between it and the next, ..."""
    edges = torch.stack((spans.start, spans.end), 1).flatten()
    return torch.cat((edges.new_zeros(1), edges, edges.new_full((1,), spans.num_tokens))).diff()


def _reduce_form(spans: Spans) -> Callable[..., Outcome]:
    """In its favour: it is given the lengths of the segments. It reduces what no span holds too."""
    lengths = _segments(spans)

    def form(x: Tensor, op: str, **_) -> Outcome:
        return {"reduced": torch.segment_reduce(x, op, lengths=lengths, unsafe=True)[1::2]}

    return form


def _spread_form(spans: Spans) -> Callable[..., Outcome]:
    """In its favour: it is given the lengths of the segments."""
    lengths, tokens = _segments(spans), spans.num_tokens

    def form(values: Tensor, **_) -> Outcome:
        each = values.new_zeros(lengths.shape[0])
        each[1::2] = values
        return {"spread": torch.repeat_interleave(each, lengths, output_size=tokens)}

    return form


def problem(op: str | None, tokens: int) -> Callable[[str], Problem]:
    def make(device: str) -> Problem:
        spans = packed(tokens).to(device)
        count = len(spans) if op is None else spans.num_tokens
        x = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(device)
        form = _spread_form(spans) if op is None else _reduce_form(spans)
        return Problem(
            op="spread" if op is None else "span_reduce",
            inputs={"values": x, "layout": spans} if op is None else {"x": x, "spans": spans, "op": op},
            rivals=with_compiled(form) if op is None else {"eager": form},  # the compiler has no segment_reduce
            bare=torch.empty(spans.num_tokens if op is None else int(spans.lengths.sum()), device=device).clone,
            bytes=4 * (spans.num_tokens if op is None else int(spans.lengths.sum())) + 20 * len(spans),
        )

    return make


CASES = tuple(
    TimedCase(
        "spread" if op is None else "span_reduce",
        "forward",
        f"{op + ', ' if op else ''}{tokens:,} tokens",
        problem(op, tokens),
        targets=(Target("fast", 5, "eager"),) if tokens == 1_000_000 else (),
    )
    for op in ("sum", "max", None)
    for tokens in (65_536, 1_000_000, 10_000_000)
)
