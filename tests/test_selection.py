"""PackedBatch by trajectory: length, indices, parts put together, pinned memory, and spans and trees that follow."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trajkern as tk
from tests.test_layout import FLOAT_FIELDS, batches, fields, packed
from trajkern import credit

ROWS = ("group_ids", "rewards")
TOKENS = ("tokens", "loss_mask", *FLOAT_FIELDS)


def lists(batch: tk.PackedBatch) -> list[dict[str, Any]]:
    """Each trajectory's own values, read one by one."""
    bounds = batch.cu_seqlens.tolist()
    return [
        {name: getattr(batch, name)[n].item() for name in ROWS if getattr(batch, name) is not None}
        | {name: getattr(batch, name)[a:b].tolist() for name in TOKENS if getattr(batch, name) is not None}
        for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]


def check_whole(batch: tk.PackedBatch) -> None:
    """What is derived is what the constructor derives of the same fields."""
    again = tk.PackedBatch(**{name: getattr(batch, name) for name in fields()})
    for name in ("num_groups", "max_length", "num_trajectories", "num_tokens"):
        assert getattr(batch, name) == getattr(again, name), name
    for ours, theirs in zip(
        (batch.group_index, batch.bounds, *batch.head_inputs()),
        (again.group_index, again.bounds, *again.head_inputs()),
        strict=True,
    ):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(batches(), st.data())
def test_indices_of_every_kind(drawn: Any, data: Any) -> None:
    batch = packed(*drawn)
    whole, count = lists(batch), len(batch)
    numbers = data.draw(st.lists(st.integers(-count, count - 1), max_size=7)) if count else []
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    edge = st.none() | st.integers(-count - 2, count + 2)
    part = slice(data.draw(edge), data.draw(edge), data.draw(st.sampled_from([None, 1, 2, -1, -3])))
    by_flag = [x for x, flag in zip(whole, flags, strict=True) if flag]
    cases = [
        (part, whole[part]),
        (numbers, [whole[n] for n in numbers]),
        (torch.tensor(numbers, dtype=torch.int32), [whole[n] for n in numbers]),
        (np.array(numbers, dtype=np.int64), [whole[n] for n in numbers]),
        (torch.tensor(flags, dtype=torch.bool), by_flag),
        (range(count)[part], whole[part]),
    ]
    if count:
        cases += [(flags, by_flag)] + [
            (each, [whole[n]]) for n in numbers for each in (n, np.int64(n), torch.tensor(n))
        ]
    for index, expected in cases:
        taken = batch[index]
        assert lists(taken) == expected, index
        check_whole(taken)
        assert torch.equal(batch.tokens[batch.tokens_of(index)], taken.tokens)


def test_length_and_iteration() -> None:
    batch = tk.PackedBatch(**fields())
    assert len(batch) == 3
    assert [lists(x) for x in batch] == [[x] for x in lists(batch)]
    assert not tk.PackedBatch(
        torch.zeros(0).long(), torch.zeros(1).long(), torch.zeros(0).bool(), torch.zeros(0).long()
    )


def test_dtypes_stay() -> None:
    integers = {name: fields()[name].int() for name in ("tokens", "cu_seqlens", "group_ids")}
    batch = tk.PackedBatch(
        **fields(**integers, rewards=fields()["rewards"].double(), old_logprobs=torch.zeros(6).bfloat16())
    )
    for index in (1, slice(0, 2), [2, 0], [True, False, True]):
        for name in fields():
            assert getattr(batch[index], name).dtype == getattr(batch, name).dtype, name
    both = tk.PackedBatch.concatenate([batch, batch[:1]], groups="shared")
    assert both.cu_seqlens.dtype == torch.int32 and both.rewards.dtype == torch.float64


def test_gradients_pass() -> None:
    old, rewards = (torch.zeros(n, requires_grad=True) for n in (6, 3))
    batch = tk.PackedBatch(**fields(old_logprobs=old, rewards=rewards))
    taken = batch[[2, 0, 2]]
    (taken.old_logprobs * torch.arange(1.0, 11)).sum().backward()
    assert old.grad.tolist() == [5, 6, 1 + 7, 2 + 8, 3 + 9, 4 + 10]
    both = tk.PackedBatch.concatenate([batch[2:], batch[:1]])
    (both.rewards * torch.tensor([2.0, 3.0])).sum().backward()
    assert rewards.grad.tolist() == [3, 0, 2]


def test_slices_are_views_and_lists_copies() -> None:
    """As torch's: who writes into a view has written into the batch."""
    batch = tk.PackedBatch(**fields())
    part, copy = batch[2:], batch[[2]]
    assert part.tokens.data_ptr() == batch.tokens[2:].data_ptr() and copy.tokens.data_ptr() != part.tokens.data_ptr()
    copy.tokens[0] = 0
    batch.head_inputs()
    part.tokens[0] = 0
    for written in (copy, part, batch):
        with pytest.raises(ValueError, match="tokens must not be written into"):
            written.head_inputs()


INDICES = [
    (3, IndexError, r"index must lie in \[-3, 3\), the trajectories; got 3"),
    (-4, IndexError, "got -4"),
    ([0, 3], IndexError, "got 3"),
    (torch.tensor([-4]), IndexError, "got -4"),
    (True, TypeError, "index must be an int, a slice, .*; got True"),
    (torch.tensor(True), ValueError, "index must have 1 dimension"),
    (None, TypeError, "got None"),
    (1.0, TypeError, "got 1.0"),
    ("rewards", TypeError, "got 'rewards'"),
    ((0, 1), TypeError, r"got \(0, 1\)"),
    (..., TypeError, "got Ellipsis"),
    ([True, 2, False], TypeError, "got both in"),
    ([0.0], TypeError, r"got \[0.0\]"),
    ([True, False], ValueError, r"index must have shape \[3\] \(one flag a trajectory\); got bool\[2\]"),
    (torch.tensor([0.0]), TypeError, "index must have dtype bool, int64, int32; got float32"),
    (torch.tensor([1, 0, 1], dtype=torch.uint8), TypeError, "index must have dtype"),
    (torch.tensor([[0]]), ValueError, "index must have 1 dimension"),
    (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "index must have values"),
]


@pytest.mark.parametrize(("index", "error", "says"), INDICES, ids=range(len(INDICES)))
def test_refused_indices(index: Any, error: type[Exception], says: str) -> None:
    batch = tk.PackedBatch(**fields())
    for asked in (lambda: batch[index], lambda: batch.tokens_of(index)):
        with pytest.raises(error, match=says):
            asked()


def test_a_subclass_s_own_fields_are_refused_by_name() -> None:
    @dataclass(frozen=True, eq=False)
    class Mine(tk.PackedBatch):
        values: Tensor | None = None

    batch = Mine(**fields(), values=torch.zeros(6))
    for made in (
        lambda: batch[0],
        lambda: tk.PackedBatch.concatenate([batch]),
        batch.pin_memory,
        lambda: batch.to("cpu"),
    ):
        with pytest.raises(TypeError, match="Mine.values must be a field of PackedBatch to come along"):
            made()


# concatenation


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(batches(), st.integers(0, 6), st.integers(0, 6))
def test_parts_make_the_whole(drawn: Any, first: int, second: int) -> None:
    batch = packed(*drawn)
    cuts = sorted((min(first, len(batch)), min(second, len(batch))))
    parts = [batch[: cuts[0]], batch[cuts[0] : cuts[1]], batch[cuts[1] :]]
    again = tk.PackedBatch.concatenate(parts, groups="shared")
    for name in fields():
        ours, theirs = getattr(again, name), getattr(batch, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype, name
    check_whole(again)


def test_groups_are_not_merged_by_accident() -> None:
    """Who is compared with whom changes the advantages, and ids of two batches do not say it."""
    batch = tk.PackedBatch(**fields())  # groups 7 7 -3
    with pytest.raises(ValueError, match="groups must be 'apart' or 'shared' .*: batches 0 and 2 both have -3"):
        tk.PackedBatch.concatenate([batch, batch[:0], batch[2:]])
    apart = tk.PackedBatch.concatenate([batch, batch[1:]], groups="apart")
    assert apart.group_ids.tolist() == [1, 1, 0, 3, 2] and apart.num_groups == 4
    shared = tk.PackedBatch.concatenate([batch, batch[1:]], groups="shared")
    assert shared.group_ids.tolist() == [7, 7, -3, 7, -3] and shared.num_groups == 2
    alike = tk.PackedBatch.concatenate([batch[:2], batch[2:]])
    assert alike.group_ids.tolist() == [7, 7, -3]
    own = torch.cat([tk.group_advantages(x.rewards, x.group_ids) for x in (batch, batch[1:])])
    assert torch.equal(tk.group_advantages(apart.rewards, apart.group_ids), own)
    assert not torch.equal(tk.group_advantages(shared.rewards, shared.group_ids), own)


def test_dtypes_widen() -> None:
    wide, narrow = (
        tk.PackedBatch(**fields()),
        tk.PackedBatch(**fields(tokens=fields()["tokens"].int(), rewards=torch.ones(3).half())),
    )
    both = tk.PackedBatch.concatenate([narrow, wide], groups="apart")
    assert both.tokens.dtype == torch.int64 and both.rewards.dtype == torch.float32
    assert both.tokens.tolist() == fields()["tokens"].tolist() * 2


CONCATENATED = [
    ([], ValueError, "batches must hold at least one PackedBatch, got none"),
    (tk.PackedBatch(**fields()), TypeError, r"batches must be a list or tuple of PackedBatches, got PackedBatch\("),
    (3, TypeError, "batches must be a list or tuple"),
    ([tk.PackedBatch(**fields()), 3], TypeError, r"batches\[1\] must be a PackedBatch, got 3"),
    (
        [tk.PackedBatch(**fields()), tk.PackedBatch(**fields(ref_logprobs=None))],
        ValueError,
        r"ref_logprobs must be in all batches or in none; batches\[0\] has it, not batches\[1\]",
    ),
    (
        [tk.PackedBatch(**fields()), tk.PackedBatch(**fields()).to("meta")],
        ValueError,
        r"batches\[1\] must be on cpu like batches\[0\]; it is on meta",
    ),
]


@pytest.mark.parametrize(("batches", "error", "says"), CONCATENATED, ids=range(len(CONCATENATED)))
def test_refused_concatenations(batches: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        tk.PackedBatch.concatenate(batches)
    with pytest.raises(ValueError, match="groups must be one of None, 'apart', 'shared'; got 'merge'"):
        tk.PackedBatch.concatenate([tk.PackedBatch(**fields())], groups="merge")


def test_a_data_loader_takes_it() -> None:
    """As a data set of trajectories, whose groups are shared, and the parts that it makes are whole."""
    batch = tk.PackedBatch(**fields())
    put = functools.partial(tk.PackedBatch.concatenate, groups="shared")
    loaded = list(torch.utils.data.DataLoader(batch, batch_size=2, collate_fn=put))
    assert [lists(x) for x in loaded] == [lists(batch)[:2], lists(batch)[2:]]


def test_pinning_pins_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: pinned.append(x.clone()) or pinned[-1])
    batch = tk.PackedBatch(**fields())
    there = batch.pin_memory()
    held = [getattr(there, name) for name in fields()] + [there.group_index, there.bounds, *there.head_inputs()]
    assert {id(x) for x in held} == {id(x) for x in pinned} and lists(there) == lists(batch)
    check_whole(there)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory is of a GPU")
def test_pinned_memory_of_a_gpu() -> None:
    there = tk.PackedBatch(**fields()).pin_memory()
    assert all(x.is_pinned() for x in (there.tokens, there.bounds, there.group_index, *there.head_inputs()))
    assert lists(there.to("cuda", non_blocking=True)) == lists(there)


# what follows a batch


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(batches(), st.integers(0, 10**6))
def test_spans_follow(drawn: Any, seed: int) -> None:
    batch, choice = packed(*drawn), random.Random(seed)
    spans = tk.Spans.turns(batch.loss_mask, batch.cu_seqlens)
    numbers = choice.choices(range(len(batch)), k=4) if len(batch) else []
    for index in (numbers, slice(None, None, 2), slice(1, 3)):
        taken, ours = batch[index], spans.taken(batch, index)
        theirs = tk.Spans.turns(taken.loss_mask, taken.cu_seqlens)
        for name in ("start", "end", "trajectory", "index"):
            assert torch.equal(getattr(ours, name).long(), getattr(theirs, name)), (name, index)
        assert ours.num_tokens == taken.num_tokens


def test_spans_of_another_batch_are_refused() -> None:
    batch = tk.PackedBatch(**fields())
    spans = tk.Spans.turns(batch.loss_mask, batch.cu_seqlens)
    with pytest.raises(ValueError, match="batch must have the spans' 6 tokens; got PackedBatch"):
        spans.taken(batch[:1], 0)
    with pytest.raises(TypeError, match="batch must be a PackedBatch, got 3"):
        spans.taken(3, 0)
    none = torch.zeros(6).bool()
    one = tk.PackedBatch(torch.arange(6), torch.tensor([0, 6]), none, torch.zeros(1).long())
    with pytest.raises(ValueError, match="batch must have the spans' trajectories, up to 2"):
        spans.taken(one, 0)


def test_a_tree_follows_a_mask() -> None:
    tokens = torch.tensor([1, 2, 3, 1, 2, 4, 1, 5])
    mask = torch.tensor([0, 1, 1, 0, 1, 1, 0, 1]).bool()
    batch = tk.PackedBatch(tokens, torch.tensor([0, 3, 6, 8]), mask, torch.zeros(3).long())
    tree, keep = tk.Tree.from_trajectories(batch), torch.tensor([True, False, True])
    pruned, _ = tree.pruned(keep)
    taken = batch[keep]
    assert torch.equal(batch.tokens[pruned.source][pruned.flat_index], taken.tokens)
    assert torch.equal(pruned.flat_cu_seqlens, taken.cu_seqlens)


# one line each


def test_reprs_are_a_line() -> None:
    batch = tk.PackedBatch(**fields())
    tree = tk.Tree.from_trajectories(batch)
    spans = tk.Spans.turns(batch.loss_mask, batch.cu_seqlens)
    given = ", rewards, old_logprobs, ref_logprobs, sampler_logprobs"
    assert repr(batch) == f"PackedBatch(trajectories=3, tokens=6, scored=3, groups=2{given}, on cpu)"
    assert repr(batch.to("meta")).endswith("on meta)")
    assert repr(batch.head_inputs()) == "HeadInputs(pairs=3, on cpu)"
    assert repr(spans) == "Spans(spans=2, tokens=6, on cpu)"
    assert repr(tree) == "Tree(nodes=3, leaves=3, tokens=6, roots=3, levels=1, on cpu)"
    assert repr(tk.Paths(tree, batch.rewards)) == f"Paths({tree!r})"
    rollouts = credit.Rollouts(batch, flags={"ok": batch.rewards > 0})
    assert repr(rollouts) == f"Rollouts({batch!r}, rewards=['reward'], spans=['turn'], flags=['ok'])"
    names = ["outcome/mean", "outcome/std", "kept", "positive"]
    assert repr(credit.outcome()(rollouts)) == f"Credit(tokens=6, rollouts=3, metrics={names}, on cpu)"
    batch.tokens[0] = 0  # whatever was written into it
    assert "\n" not in repr(batch)
