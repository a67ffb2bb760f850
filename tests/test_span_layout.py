"""Spans: what they refuse, what they derive, the turns of a pack against a plain walk, and bad arguments of the ops."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trajkern as tk
from trajkern.layouts import spans as span_layout
from trajkern.ops.span import GRADIENTS, REDUCTIONS, SPREAD

FIELDS = {
    "start": torch.tensor([0, 3, 3, 7]),
    "end": torch.tensor([2, 3, 5, 9]),
    "trajectory": torch.tensor([0, 0, 1, 1]),
    "index": torch.tensor([0, 1, 0, 2]),
    "num_tokens": 10,
    "cu_seqlens": torch.tensor([0, 3, 10]),
}
BOUNDS = r"0 <= start <= end <= 10, the tokens; "
REFUSED = [
    ("start", [0, 3, 3, 7], TypeError, r"start must be a tensor, got \[0, 3, 3, 7\] \(list\)"),
    ("start", torch.tensor([[0, 3, 3, 7]]), ValueError, r"start must have 1 dimension; got int64\[1, 4\]"),
    ("start", torch.tensor([0.0, 3, 3, 7]), TypeError, r"start must have dtype int64, int32; got float32\[4\]"),
    ("start", torch.tensor([-1, 3, 3, 7]), ValueError, BOUNDS + r"span 0 is \[-1, 2\)"),
    ("start", torch.tensor([0, 3, 6, 7]), ValueError, BOUNDS + r"span 2 is \[6, 5\)"),
    ("start", torch.tensor([0, 3, 3, 4]), ValueError, r"start must .*; span 2 is \[3, 5\) and span 3 is \[4, 9\)"),
    ("end", torch.tensor([2, 3, 5, 11]), ValueError, BOUNDS + r"span 3 is \[7, 11\)"),
    ("end", torch.tensor([4, 4, 5, 9]), ValueError, r"start must .*; span 0 is \[0, 4\) and span 1 is \[3, 4\)"),
    ("end", torch.tensor([2, 3, 5]), ValueError, r"end must have shape \[4\] \(one entry a span.*; got int64\[3\]"),
    ("end", FIELDS["end"].to("meta"), ValueError, r"end must be on cpu .*; got int64\[4\] on meta"),
    ("trajectory", torch.tensor([1, 0, 1, 1]), ValueError, r"trajectory must never decrease; .*1 to 0 at span 1"),
    ("trajectory", torch.tensor([-1, 0, 1, 1]), ValueError, r"trajectory must be at least 0; span 0's is -1"),
    ("trajectory", torch.tensor([0, 0, 1, 2]), ValueError, r"trajectory must lie in \[0, 2\); span 3's is 2"),
    ("trajectory", torch.tensor([True] * 4), TypeError, r"trajectory must have dtype int64, int32; got bool\[4\]"),
    ("index", torch.tensor([0, 0, 0, 2]), ValueError, r"index must ascend .*; in trajectory 0 .* 0 to 0 at span 1"),
    ("index", torch.tensor([0, 1, 2, 1]), ValueError, r"index must ascend .*; in trajectory 1 .* 2 to 1 at span 3"),
    ("index", torch.tensor([0, 1, -1, 2]), ValueError, r"index must be at least 0; span 2's is -1"),
    ("num_tokens", 8, ValueError, r"0 <= start <= end <= 8, the tokens; span 3 is \[7, 9\)"),
    ("num_tokens", -1, ValueError, r"num_tokens must be at least 0, got -1"),
    ("num_tokens", 10.0, TypeError, r"num_tokens must be an int, got 10.0 \(float\)"),
    ("num_tokens", True, TypeError, r"num_tokens must be an int, got True \(bool\)"),
    ("cu_seqlens", torch.tensor([0, 4, 10]), ValueError, r"span 2 is \[3, 5\), trajectory 1 is \[4, 10\)"),
    ("cu_seqlens", torch.tensor([0, 1, 10]), ValueError, r"span 0 is \[0, 2\), trajectory 0 is \[0, 1\)"),
    ("cu_seqlens", torch.tensor([0, 3, 9]), ValueError, r"cu_seqlens must run from 0 to the 10 tokens"),
    ("cu_seqlens", torch.tensor([0.0, 3, 10]), TypeError, r"cu_seqlens must have dtype int64, int32; got float32"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refuses(name: str, value: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tk.Spans(**FIELDS | {name: value})


def test_literal() -> None:
    spans = tk.Spans(**FIELDS)
    assert len(spans) == 4 and spans.num_tokens == 10 and spans.device.type == "cpu"
    assert spans.lengths.tolist() == [2, 0, 2, 2]
    assert spans.token_span.tolist() == [0, 0, -1, 2, 2, -1, -1, 3, 3, -1]
    narrow = tk.Spans(**{k: x.int() if isinstance(x, torch.Tensor) else x for k, x in FIELDS.items()})
    x = torch.arange(10.0)
    assert torch.equal(tk.span_reduce(x, narrow), tk.span_reduce(x, spans))
    assert torch.equal(narrow.token_span, spans.token_span)


def test_moves() -> None:
    moved = tk.Spans(**FIELDS).to("meta")
    assert moved.device.type == "meta" and moved.num_tokens == 10 and len(moved) == 4


def test_spans_across_trajectories_need_the_boundaries_to_be_seen() -> None:
    assert len(tk.Spans(**FIELDS | {"cu_seqlens": None, "end": torch.tensor([3, 3, 7, 10])})) == 4


def _walk(mask: list[bool], bounds: list[int]) -> list[list[int]]:
    """[start, end, trajectory, index] of each turn, token by token."""
    turns: list[list[int]] = []
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        count = 0
        for t in range(begin, end):
            if mask[t] and (t == begin or not mask[t - 1]):
                turns.append([t, t, n, count])
                count += 1
            if mask[t]:
                turns[-1][1] = t + 1
    return turns


def _turns(mask: list[bool], bounds: list[int], dtype: torch.dtype = torch.int64) -> list[list[int]]:
    turns = tk.Spans.turns(torch.tensor(mask, dtype=torch.bool), torch.tensor(bounds, dtype=dtype))
    columns = (turns.start, turns.end, turns.trajectory, turns.index)
    tk.Spans(*columns, len(mask), torch.tensor(bounds))  # legal
    return torch.stack(columns, 1).tolist()


def test_turns_literal() -> None:
    mask = [c == "x" for c in "-xx-xxx---x-x"]
    expected = [[1, 3, 0, 0], [4, 5, 0, 1], [5, 7, 1, 0], [10, 11, 4, 0], [12, 13, 4, 1]]
    assert _turns(mask, [0, 5, 7, 7, 10, 13]) == expected
    assert _turns([], [0]) == _turns([], [0, 0]) == _turns([False], [0, 1]) == []


@settings(max_examples=150, deadline=None)
@given(
    runs=st.lists(st.integers(0, 6), max_size=20),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    block=st.sampled_from((1, 2, 7, 1000)),
    dtype=st.sampled_from((torch.int64, torch.int32)),
)
def test_turns_are_the_walks(runs: list[int], cuts: list[int], block: int, dtype: torch.dtype) -> None:
    """Whatever the blocks in which they are searched, cut turns and trajectories as they may."""
    mask = [bool(i % 2) for i, length in enumerate(runs) for _ in range(length)]
    bounds = [0, *sorted(min(cut, len(mask)) for cut in cuts), len(mask)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(span_layout, "_BLOCK", block)
        assert _turns(mask, bounds, dtype) == _walk(mask, bounds)


def test_turns_on_any_number_of_threads() -> None:
    mask = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) < 0.9
    bounds = torch.arange(0, 200_001, 40_000)
    expected = _walk(mask.tolist(), bounds.tolist())
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert _turns(mask.tolist(), bounds.tolist()) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("mask", "bounds", "error", "message"),
    (
        (torch.ones(3), torch.tensor([0, 3]), TypeError, r"loss_mask must have dtype bool; got float32\[3\]"),
        (
            torch.ones(1, 3).bool(),
            torch.tensor([0, 3]),
            ValueError,
            r"loss_mask must have 1 dimension; got bool\[1, 3\]",
        ),
        (torch.ones(3).bool(), torch.tensor([0, 2]), ValueError, r"cu_seqlens must run from 0 to the 3 tokens"),
        (torch.ones(3).bool(), torch.tensor([0, 4, 3]), ValueError, r"cu_seqlens must never decrease"),
        (torch.ones(3).bool(), [0, 3], TypeError, r"cu_seqlens must be a tensor, got \[0, 3\] \(list\)"),
    ),
)
def test_turns_refuses(mask: torch.Tensor, bounds: torch.Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        tk.Spans.turns(mask, bounds)


BAD = [
    ("span_reduce", {"x": [1.0] * 10}, TypeError, r"x must be a tensor, got \[1.0, .*\(list\)"),
    ("span_reduce", {"x": torch.ones(10).long()}, TypeError, r"x must have dtype float32, .*; got int64\[10\]"),
    ("span_reduce", {"x": torch.ones(2, 5)}, ValueError, r"x must have 1 dimension; got float32\[2, 5\]"),
    (
        "span_reduce",
        {"x": torch.ones(9)},
        ValueError,
        r"x must have shape \[10\] \(one value a token\); got float32\[9\]",
    ),
    (
        "span_reduce",
        {"x": torch.ones(10, device="meta")},
        ValueError,
        r"x must be on cpu .*; got float32\[10\] on meta",
    ),
    ("span_reduce", {"spans": torch.tensor([0, 10])}, TypeError, r"spans must be a Spans, got Tensor"),
    (
        "span_reduce",
        {"op": "nothing"},
        ValueError,
        f"op must be one of {', '.join(map(repr, REDUCTIONS))}; got 'nothing'",
    ),
    (
        "spread",
        {"values": torch.ones(3)},
        ValueError,
        r"values must have shape \[4\] \(one value a span\); got float32",
    ),
    ("spread", {"values": torch.ones(4).int()}, TypeError, r"values must have dtype float32, .*; got int32\[4\]"),
    (
        "spread",
        {"layout": torch.tensor([0, 10])},
        TypeError,
        r"layout must be a Spans, a PackedBatch or a Tree, got Te",
    ),
]


@pytest.mark.parametrize("route", ("owner", "reference"))
@pytest.mark.parametrize(("function", "change", "error", "message"), BAD, ids=range(len(BAD)))
def test_ops_refuse(function: str, change: dict, error: type, message: str, route: str) -> None:
    spans = tk.Spans(**FIELDS)
    good = {"span_reduce": {"x": torch.ones(10), "spans": spans}, "spread": {"values": torch.ones(4), "layout": spans}}
    with tk.use_backend("reference") if route == "reference" else contextlib.nullcontext():
        getattr(tk, function)(**good[function])
        with pytest.raises(error, match=f"^{message}"):
            getattr(tk, function)(**good[function] | change)


@pytest.mark.parametrize("op", REDUCTIONS)
def test_a_span_does_not_see_where_it_stands(op: str) -> None:
    """Of every length around the vectors' and behind every place of them; nothing outside is read."""
    g = torch.Generator().manual_seed(0)
    for length in (0, 1, 7, 8, 9, 15, 16, 17, 40, 63):
        x, sums = torch.randn(length, generator=g), set()
        for before in range(9):
            for behind in (0, 1, 20):
                pack = torch.full((before + length + behind,), torch.nan)
                pack[before : before + length] = x
                one = torch.tensor([before]), torch.tensor([before + length]), *torch.zeros(2, 1, dtype=torch.int64)
                sums.add(float(tk.span_reduce(pack, tk.Spans(*one, pack.shape[0]), op)))
        assert len(sums) == 1, f"length {length}: {sums}"


@pytest.mark.parametrize("op", REDUCTIONS)
def test_the_kernel_of_gradients_has_those_that_are_not_spread(op: str) -> None:
    spans, x = tk.Spans(**FIELDS), torch.linspace(-3, 3, 10)
    arguments = torch.ones(4), x, tk.span_reduce(x, spans, op), spans.start, spans.end, REDUCTIONS.index(op)
    if GRADIENTS[op] not in SPREAD:
        assert torch.ops.trajkern.span_reduce_backward(*arguments).any()
        return
    with pytest.raises(ValueError, match=r"^op must be a reduction whose gradient reads x; this one's is spread"):
        torch.ops.trajkern.span_reduce_backward(*arguments)


def test_reduce_of_a_spread_is_the_value() -> None:
    spans, values = tk.Spans(**FIELDS), torch.tensor([0.1, 0.2, 0.3, 0.4])
    for op, empty in (("mean", 0.0), ("max", -torch.inf), ("min", torch.inf)):
        assert torch.equal(tk.span_reduce(tk.spread(values, spans), spans, op), values.where(spans.lengths > 0, empty))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_16_bit_values_widen(dtype: torch.dtype) -> None:
    spans, x = tk.Spans(**FIELDS), torch.linspace(-3, 3, 10).to(dtype).requires_grad_()
    out = tk.span_reduce(x, spans, "sum")
    assert out.dtype == torch.float32
    assert torch.equal(out.detach(), tk.span_reduce(x.detach().float(), spans, "sum"))
    out.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    assert x.grad.tolist() == [1, 1, 0, 1, 1, 0, 0, 1, 1, 0]
