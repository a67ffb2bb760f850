"""PackedBatch: what it refuses, the way to and from padding, and the pairs that carry loss."""

from __future__ import annotations

import math
import re
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trajkern as tk

FLOAT_FIELDS = ("old_logprobs", "ref_logprobs", "sampler_logprobs")


def fields(**changes) -> dict[str, Tensor]:
    """Trajectories of 2, 0 and 4 tokens in two groups."""
    defaults = {
        "tokens": torch.arange(10, 16),
        "cu_seqlens": torch.tensor([0, 2, 2, 6]),
        "loss_mask": torch.tensor([0, 1, 0, 0, 1, 1]).bool(),
        "group_ids": torch.tensor([7, 7, -3]),
        "rewards": torch.tensor([1.0, 0.0, 2.0]),
    }
    return defaults | {name: torch.linspace(-3, -1, 6) for name in FLOAT_FIELDS} | changes


def with_nan_at(index: int, value: float = math.nan) -> Tensor:
    x = torch.linspace(-3, -1, 6)
    x[index] = value
    return x


META = torch.device("meta")
PER_TOKEN = [
    row
    for name in FLOAT_FIELDS
    for row in (
        (name, torch.zeros(5), ValueError, r"shape \[6\] \(one value a token\); got float32\[5\]"),
        (name, torch.zeros(6, 1), ValueError, r"shape \[6\] .*; got float32\[6, 1\]"),
        (name, torch.zeros(6).long(), TypeError, r"dtype float32.*; got int64\[6\]"),
        (name, [0.0] * 6, TypeError, r"a tensor, got .*list"),
        (name, torch.zeros(6, device=META), ValueError, r"on cpu .*; got float32\[6\] on meta"),
        (name, with_nan_at(4), ValueError, r"finite; it is nan at index 4"),
        (name, with_nan_at(1, -math.inf), ValueError, r"finite; it is -inf at index 1"),
    )
]
REFUSED = [
    ("tokens", torch.zeros(2, 3).long(), ValueError, r"1 dimension; got int64\[2, 3\]"),
    ("tokens", torch.zeros(6), TypeError, r"dtype int64, int32; got float32\[6\]"),
    ("tokens", list(range(6)), TypeError, r"a tensor, got .*list"),
    ("cu_seqlens", torch.tensor([0.0, 2, 2, 6]), TypeError, r"dtype int64, int32; got float32\[4\]"),
    ("cu_seqlens", torch.tensor([[0, 2, 2, 6]]), ValueError, r"1 dimension; got int64\[1, 4\]"),
    ("cu_seqlens", torch.empty(0).long(), ValueError, r"at least its first 0; it is empty"),
    ("cu_seqlens", torch.tensor([1, 2, 2, 6]), ValueError, r"from 0 to the 6 tokens; it runs from 1 to 6"),
    ("cu_seqlens", torch.tensor([0, 2, 2, 5]), ValueError, r"from 0 to the 6 tokens; it runs from 0 to 5"),
    ("cu_seqlens", torch.tensor([0, 4, 2, 6]), ValueError, r"never decrease; it goes from 4 to 2 at index 2"),
    ("cu_seqlens", torch.tensor([0, -1, 2, 6]), ValueError, r"never decrease; it goes from 0 to -1 at index 1"),
    ("cu_seqlens", torch.tensor([0, 2, 2, 6], device=META), ValueError, r"on cpu .*; got int64\[4\] on meta"),
    ("loss_mask", torch.ones(5).bool(), ValueError, r"shape \[6\] \(one flag a token\); got bool\[5\]"),
    ("loss_mask", torch.ones(1, 6).bool(), ValueError, r"shape \[6\] .*; got bool\[1, 6\]"),
    ("loss_mask", torch.ones(6), TypeError, r"dtype bool; got float32\[6\]"),
    ("loss_mask", None, TypeError, r"a tensor, got None"),
    ("loss_mask", torch.ones(6, device=META).bool(), ValueError, r"on cpu .*; got bool\[6\] on meta"),
    ("loss_mask", torch.tensor([1, 1, 0, 0, 1, 1]).bool(), ValueError, r"False on the first token .* at token 0"),
    ("loss_mask", torch.tensor([0, 1, 1, 0, 1, 1]).bool(), ValueError, r"False on the first token .* at token 2"),
    ("group_ids", torch.tensor([7, 7]), ValueError, r"shape \[3\] \(one id a trajectory\); got int64\[2\]"),
    ("group_ids", torch.tensor([[7, 7, 1]]), ValueError, r"shape \[3\] .*; got int64\[1, 3\]"),
    ("group_ids", torch.tensor([7.0, 7, 1]), TypeError, r"dtype int64, int32; got float32\[3\]"),
    ("group_ids", torch.tensor([7, 7, 1], device=META), ValueError, r"on cpu .*; got int64\[3\] on meta"),
    ("rewards", torch.tensor([1.0, 2]), ValueError, r"shape \[3\] \(one reward a trajectory\); got float32\[2\]"),
    ("rewards", torch.tensor([[1.0, 2, 3]]), ValueError, r"shape \[3\] .*; got float32\[1, 3\]"),
    ("rewards", torch.tensor([1, 0, 1]), TypeError, r"dtype float32.*; got int64\[3\]"),
    ("rewards", torch.zeros(3, device=META), ValueError, r"on cpu .*; got float32\[3\] on meta"),
    ("rewards", torch.tensor([1.0, math.nan, 2]), ValueError, r"finite; it is nan at index 1"),
    ("rewards", torch.tensor([1.0, 2, math.inf]), ValueError, r"finite; it is inf at index 2"),
    *PER_TOKEN,
]


def readable(row: tuple) -> str:
    return f"{row[0]}-" + re.sub(r"[^a-z0-9-]+", "_", row[3].lower()).strip("_")


@pytest.mark.parametrize(("name", "value", "error", "text"), REFUSED, ids=map(readable, REFUSED))
def test_refused(name: str, value, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{name} must .*{text}"):
        tk.PackedBatch(**fields(**{name: value}))


def test_tokens_that_disagree_with_the_rest() -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must run from 0 to the 5 tokens; it runs from 0 to 6"):
        tk.PackedBatch(**fields(tokens=torch.arange(5)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_boundaries_that_only_overflow_makes_ascend(dtype: torch.dtype) -> None:
    """Each difference is positive in wrapped arithmetic."""
    limits = torch.iinfo(dtype)
    with pytest.raises(ValueError, match="cu_seqlens must never decrease"):
        tk.PackedBatch(
            torch.arange(6),
            torch.tensor([0, limits.max, limits.min, -1, 6], dtype=dtype),
            torch.zeros(6).bool(),
            torch.zeros(4).long(),
        )


def test_what_stands_on_unscored_tokens_does_not_matter() -> None:
    batch = tk.PackedBatch(**fields(old_logprobs=with_nan_at(3), ref_logprobs=with_nan_at(0, math.inf)))
    assert batch.old_logprobs.isnan().tolist() == [False, False, False, True, False, False]


def test_derived() -> None:
    batch = tk.PackedBatch(**fields())
    assert (batch.num_tokens, batch.num_trajectories, batch.num_groups) == (6, 3, 2)
    assert batch.lengths.tolist() == [2, 0, 4] and batch.device == torch.device("cpu")
    assert batch.group_index.tolist() == [1, 1, 0]  # ascending in the ids


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_group_index_is_dense(dtype: torch.dtype) -> None:
    limits = torch.iinfo(dtype)
    ids = torch.tensor([limits.max, 0, limits.min, 0, -5, limits.max], dtype=dtype)
    batch = tk.PackedBatch(torch.zeros(0).long(), torch.zeros(7).long(), torch.zeros(0).bool(), ids)
    assert batch.group_index.tolist() == [3, 2, 0, 2, 1, 3] and batch.num_groups == 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_head_inputs_literal(dtype: torch.dtype) -> None:
    integers = {name: fields()[name].to(dtype) for name in ("tokens", "cu_seqlens", "group_ids")}
    batch = tk.PackedBatch(**fields(**integers))
    pairs = batch.head_inputs()
    assert pairs.rows.tolist() == [0, 3, 4] and pairs.tokens.tolist() == [1, 4, 5]
    assert pairs.targets.tolist() == [11, 14, 15] and pairs.cu_seqlens.tolist() == [0, 1, 1, 3]
    assert {x.dtype for x in pairs} == {torch.int64}


@pytest.mark.parametrize(
    ("lengths", "scored"),
    [([], []), ([0, 0], []), ([3, 1], [0, 0, 0, 0]), ([1, 1, 1], [0, 0, 0])],
    ids=["no_trajectories", "no_tokens", "all_masked", "single_tokens"],
)
def test_batches_without_a_loss(lengths: list[int], scored: list[int]) -> None:
    count = len(lengths)
    batch = tk.PackedBatch(
        torch.arange(sum(lengths)),
        torch.tensor([0, *accumulate(lengths)]),
        torch.tensor(scored, dtype=torch.bool),
        torch.arange(count),
        torch.zeros(count),
    )
    pairs = batch.head_inputs()
    assert pairs.rows.shape == pairs.targets.shape == pairs.tokens.shape == (0,)
    assert pairs.cu_seqlens.tolist() == [0] * (count + 1)
    assert batch.num_groups == count and batch.to_padded(batch.tokens).shape == (count, max(lengths, default=0))


def test_to_keeps_everything() -> None:
    batch = tk.PackedBatch(**fields())
    moved = batch.to("cpu")
    for name, x in fields().items():
        assert torch.equal(getattr(moved, name), x), name
    assert moved.num_groups == 2 and torch.equal(moved.group_index, batch.group_index)
    assert all(map(torch.equal, moved.head_inputs(), batch.head_inputs()))
    assert tk.PackedBatch(**fields(rewards=None)).to("cpu").rewards is None


def test_to_moves_everything() -> None:
    moved = tk.PackedBatch(**fields()).to("meta")
    tensors = [getattr(moved, name) for name in fields()] + [moved.group_index, *moved.head_inputs()]
    assert {x.device for x in tensors} == {META} and moved.device == META


@st.composite
def batches(draw) -> tuple[list[int], list[bool], int]:
    """Lengths of trajectories, which tokens are scored (never a first one), and a seed."""
    lengths = draw(st.lists(st.integers(0, 6), max_size=6))
    scored = []
    for length in lengths:
        scored += [False, *draw(st.lists(st.booleans(), min_size=length, max_size=length))[1:]][:length]
    return lengths, scored, draw(st.integers(0, 2**31))


def packed(lengths: list[int], scored: list[bool], seed: int) -> tk.PackedBatch:
    g = torch.Generator().manual_seed(seed)
    total, count = sum(lengths), len(lengths)
    floats = {name: torch.randn(total, generator=g) for name in FLOAT_FIELDS}
    return tk.PackedBatch(
        torch.randint(-100, 1000, (total,), generator=g),
        torch.tensor([0, *accumulate(lengths)]),
        torch.tensor(scored, dtype=torch.bool),
        torch.randint(-3, 3, (count,), generator=g),
        torch.randn(count, generator=g),
        **floats,
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(batches(), st.sampled_from(["left", "right"]), st.integers(0, 3))
def test_padding_and_back(drawn, side: str, slack: int) -> None:
    batch = packed(*drawn)
    length = max(drawn[0], default=0) + slack

    def padded(x: Tensor, value: float = 0) -> Tensor:
        return batch.to_padded(x, length=length, side=side, value=value)

    again = tk.PackedBatch.from_padded(
        padded(batch.tokens, 999),
        padded(torch.ones(batch.num_tokens)),
        loss_mask=padded(batch.loss_mask),
        group_ids=batch.group_ids,
        rewards=batch.rewards,
        **{name: padded(getattr(batch, name), math.nan) for name in FLOAT_FIELDS},
    )
    for name in ("tokens", "cu_seqlens", "loss_mask", "group_ids", "rewards", *FLOAT_FIELDS):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name
    assert torch.equal(again.group_index, batch.group_index) and again.num_groups == batch.num_groups


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(batches(), st.sampled_from(["left", "right"]))
def test_where_padding_stands(drawn, side: str) -> None:
    batch = packed(*drawn)
    wide = torch.stack([batch.tokens, -batch.tokens], 1)
    out = batch.to_padded(wide, side=side, value=7777)
    longest = max(drawn[0], default=0)
    assert out.shape == (len(drawn[0]), longest, 2) and out.dtype == wide.dtype
    for row, (start, end) in zip(out, pairwise(batch.cu_seqlens.tolist()), strict=True):
        rows, blank = wide[start:end].tolist(), [[7777, 7777]] * (longest - end + start)
        assert row.tolist() == (rows + blank if side == "right" else blank + rows)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(batches())
def test_pairs_stay_inside_their_trajectory(drawn) -> None:
    batch = packed(*drawn)
    rows, targets, tokens, cu_seqlens = (x.tolist() for x in batch.head_inputs())
    expected, counts = [], [0]
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        scored = [t for t in range(start, end) if drawn[1][t]]
        expected += scored
        counts.append(counts[-1] + len(scored))
        assert all(start <= t - 1 for t in scored)
    assert tokens == expected and rows == [t - 1 for t in expected] and cu_seqlens == counts
    assert targets == [batch.tokens[t].item() for t in expected]


def test_padding_is_differentiable() -> None:
    batch = tk.PackedBatch(**fields())
    x = torch.arange(6.0, requires_grad=True)
    (batch.to_padded(x, side="left", length=5, value=1.0) * torch.arange(15.0).view(3, 5)).sum().backward()
    assert x.grad.tolist() == [3, 4, 11, 12, 13, 14]


def test_from_padded_takes_masks_of_any_dtype_and_both_sides() -> None:
    batch = tk.PackedBatch.from_padded(
        torch.tensor([[0, 1, 2, 0], [3, 4, 5, 6], [0, 0, 0, 0]]),
        torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0] * 4]).int(),
        loss_mask=torch.tensor([[0, 0, 0.5, 0], [0, 2, 0, 1], [0] * 4]),
        group_ids=torch.tensor([1, 1, 2]),
    )
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6] and batch.cu_seqlens.tolist() == [0, 2, 6, 6]
    assert batch.loss_mask.tolist() == [False, True, False, True, False, True]


PADDED = {
    "tokens": torch.tensor([[1, 2, 3], [4, 5, 6]]),
    "attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]]),
    "loss_mask": torch.tensor([[0, 1, 0], [0, 0, 1]]),
    "group_ids": torch.tensor([0, 0]),
}
NOT_PADDED = [
    ("tokens", torch.tensor([1, 2, 3]), ValueError, r"2 dimensions; got int64\[3\]"),
    ("tokens", torch.ones(2, 3), TypeError, r"dtype int64, int32; got float32\[2, 3\]"),
    ("attention_mask", torch.ones(2, 2), ValueError, r"shape \[2, 3\] \(the shape of tokens\); got float32\[2, 2\]"),
    ("attention_mask", None, TypeError, r"a tensor, got None"),
    ("attention_mask", torch.ones(2, 3, device=META), ValueError, r"on cpu .*; got float32\[2, 3\] on meta"),
    ("attention_mask", torch.tensor([[1, 1, 0], [1, 0, 1]]), ValueError, r"one contiguous stretch .*; row 1 has a gap"),
    ("loss_mask", torch.zeros(2, 2), ValueError, r"shape \[2, 3\] .*; got float32\[2, 2\]"),
    ("loss_mask", torch.tensor([[0, 1, 0], [1, 0, 1]]), ValueError, r"zero on padding; row 1 scores a padded position"),
    ("loss_mask", torch.tensor([[0, 1, 0], [0, 1, 1]]), ValueError, r"False on the first token .* at token 2"),
    ("group_ids", torch.tensor([0]), ValueError, r"shape \[2\] .*; got int64\[1\]"),
    ("rewards", torch.tensor([0.0, math.nan]), ValueError, r"finite; it is nan at index 1"),
    ("old_logprobs", torch.zeros(2, 4), ValueError, r"shape \[2, 3\] .*; got float32\[2, 4\]"),
    ("ref_logprobs", torch.zeros(2, 3).int(), TypeError, r"dtype float32.*; got int32"),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), NOT_PADDED, ids=map(readable, NOT_PADDED))
def test_from_padded_refuses(name: str, value, error: type[Exception], text: str) -> None:
    arguments = PADDED | {name: value}
    with pytest.raises(error, match=f"^{name} must .*{text}"):
        tk.PackedBatch.from_padded(arguments.pop("tokens"), arguments.pop("attention_mask"), **arguments)


NOT_TO_PADDED = [
    ("x", torch.zeros(5), ValueError, r"6 rows, one a token; got float32\[5\]"),
    ("x", torch.tensor(1.0), ValueError, r"6 rows, one a token; got float32\[\]"),
    ("x", [0.0] * 6, TypeError, r"a tensor, got .*list"),
    ("x", torch.zeros(6, device=META), ValueError, r"on cpu .*; got float32\[6\] on meta"),
    ("side", "both", ValueError, r"one of 'left', 'right'; got 'both'"),
    ("length", 3, ValueError, r"at least the longest trajectory's 4, got 3"),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), NOT_TO_PADDED, ids=map(readable, NOT_TO_PADDED))
def test_to_padded_refuses(name: str, value, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{name} must .*{text}"):
        tk.PackedBatch(**fields()).to_padded(**{"x": torch.zeros(6)} | {name: value})
