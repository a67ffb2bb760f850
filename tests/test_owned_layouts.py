"""What is written into a layout's tensors once it is made reaches no kernel, and is an error where torch counts it."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import trajkern as tk
from trajkern.recipes import treerl, treerpo

X = torch.tensor([1.0, 2.0, 3.0, 4.0])
FAR = 2**40


def spans(dtype: torch.dtype = torch.int64) -> tk.Spans:
    return tk.Spans(*(torch.tensor(x, dtype=dtype) for x in ([0, 2], [2, 4], [0, 1], [0, 0])), 4)


def tree() -> tk.Tree:
    return tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor([2, 1, 1]))


def batch() -> tk.PackedBatch:
    flags = torch.tensor([False, True, False, True])
    return tk.PackedBatch(torch.arange(4), torch.tensor([0, 2, 4]), flags, torch.zeros(2, dtype=torch.int64))


USES: list[tuple[Callable[[], Any], str, Callable[[Any], Any]]] = [
    (spans, "start", lambda x: tk.span_reduce(X, x)),
    (spans, "end", lambda x: tk.span_reduce(X, x)),
    (spans, "end", lambda x: tk.spread(X[:2], x)),
    (spans, "end", lambda x: x.token_span),
    (spans, "end", lambda x: tk.span_reduce(X, x.to("cpu"))),
    (tree, "parent", lambda x: tk.subtree_reduce(X[:2], x)),
    (tree, "parent", lambda x: tk.sibling_advantages(X[:3], x)),
    (tree, "parent", lambda x: tk.branch_coefficients(X[:2], x).positive),
    (tree, "parent", lambda x: x.flat_index),
    (tree, "node_lengths", lambda x: tk.spread(X[:3], x)),
    (tree, "node_lengths", lambda x: x.flat_index),
    (tree, "node_lengths", lambda x: x.attention_segments.keys),
    (batch, "cu_seqlens", lambda x: tk.spread(X[:2], x)),
    (batch, "cu_seqlens", lambda x: x.to_padded(X)),
    (batch, "cu_seqlens", lambda x: tk.Tree.from_trajectories(x).flat_index),
    (batch, "loss_mask", lambda x: x.head_inputs().rows),
]


@pytest.mark.parametrize(("made", "name", "use"), USES)
def test_a_write(made: Callable[[], Any], name: str, use: Callable[[Any], Any]) -> None:
    wanted, counted, silent = use(made()), made(), made()
    getattr(counted, name).fill_(1)
    with pytest.raises(ValueError, match=rf"{name} must not be written into once a {type(counted).__name__} is made"):
        use(counted)
    getattr(silent, name).data.fill_(FAR if name != "loss_mask" else 1)  # which torch does not count
    assert torch.equal(use(silent), wanted)


def test_what_a_tree_shows_is_not_what_it_reads() -> None:
    wanted, other = tree(), tree()
    for name in ("leaves", "node_offsets", "flat_lengths"):
        getattr(other, name).fill_(FAR)
    assert torch.equal(other.flat_index, wanted.flat_index)
    assert torch.equal(tk.spread(X[:3], other), tk.spread(X[:3], wanted))


SHOWN: list[tuple[Callable[[], Any], str, Callable[[Any], Any], Callable[[Any], Any]]] = [
    (tree, "arrays[2]", lambda x: x.arrays[2], lambda x: tk.subtree_reduce(X[:2], x)),
    (tree, "bounds", lambda x: x.bounds, lambda x: tk.spread(X[:3], x)),
    (tree, "token_node", lambda x: x.token_node, lambda x: tk.subtree_reduce(X[:2], x)),
    (tree, "leaf_order", lambda x: x.leaf_order, lambda x: x.along_paths(torch.arange(3))),
    (tree, "leaf_range[1]", lambda x: x.leaf_range[1], lambda x: x.pruned(torch.tensor([True, False]))),
    (tree, "rows", lambda x: x.rows, lambda x: x.pairs(torch.arange(4))),
    (tree, "positions", lambda x: x.positions, lambda x: x.positions),
    (spans, "ranges[1]", lambda x: x.ranges[1], lambda x: tk.span_reduce(X, x)),
    (spans, "token_span", lambda x: x.token_span, lambda x: x.token_span),
    (batch, "bounds", lambda x: x.bounds, lambda x: tk.spread(X[:2], x)),
    (batch, "group_index", lambda x: x.group_index, lambda x: x.group_index),
    (batch, "head_inputs().targets", lambda x: x.head_inputs().targets, lambda x: x.head_inputs()),
]


@pytest.mark.parametrize(("made", "name", "shown", "use"), SHOWN)
def test_what_is_shown_is_not_shown_again(
    made: Callable[[], Any], name: str, shown: Callable[[Any], Any], use: Callable[[Any], Any]
) -> None:
    """Once it was written into, or its memory is gone."""
    written, freed = made(), made()
    use(written)
    shown(written).fill_(1)
    with pytest.raises(
        ValueError, match=re.escape(f"{type(written).__name__}.{name} must not be written into; it was")
    ):
        use(written)
    shown(freed).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} must have memory; this was freed"):
        use(freed)


@pytest.mark.parametrize("name", ["tokens", "loss_mask", "group_ids", "rewards", "old_logprobs"])
def test_fields_without_memory(name: str) -> None:
    fields = {key: getattr(batch(), key) for key in ("tokens", "cu_seqlens", "loss_mask", "group_ids")}
    freed = tk.PackedBatch(**fields, rewards=X[:2].clone(), old_logprobs=-X)
    getattr(freed, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"^{name} must have memory; this was freed"):
        freed[[1, 0]]


@pytest.mark.parametrize("field", ["tokens", "loss_mask", "group_ids"])
def test_other_data_in_a_batch(field: str) -> None:
    other = batch()
    getattr(other, field).data = getattr(other, field)[:0]
    with pytest.raises(ValueError, match=rf"{field} must have shape"):
        tk.Tree.from_trajectories(other)


@pytest.mark.parametrize("made", [spans, tree, batch])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_counts_for_itself(made: Callable[[], Any], copied: Callable[[Any], Any]) -> None:
    layout = made()
    name = "start" if made is spans else "parent" if made is tree else "tokens"
    getattr(layout, name)[0] += 0  # its copy's version is another
    layout = copied(type(layout)(**{key: getattr(layout, key) for key in _fields(layout)}))
    values = X[:3] if made is tree else X[:2]
    assert torch.equal(tk.spread(values, layout), tk.spread(values, made()))


def _fields(layout: Any) -> list[str]:
    return [key for key in vars(layout) if not key.startswith("_")]


def test_made_in_inference_mode() -> None:
    with torch.inference_mode():
        made = spans()
    assert torch.equal(tk.span_reduce(X, made), torch.tensor([1.5, 3.5]))


def test_int32_stays() -> None:
    assert spans(torch.int32).lengths.dtype == torch.int32


def test_too_many_tokens() -> None:
    for lengths in ([2**62] * 3, [2**30] * 3, [2**31, 0, 0]):
        with pytest.raises(ValueError, match=r"node_lengths must be at most 2147483647 tokens in all"):
            tk.Tree(torch.tensor([-1, 0, 0]), torch.tensor(lengths))
    with pytest.raises(ValueError, match="num_tokens must be at most 2147483647"):
        tk.Spans(*(torch.zeros(1, dtype=torch.int64) for _ in range(4)), 2**62)


def test_a_tree_of_numpys_memory() -> None:
    """torch sees no write into it, and the layout reads its own."""
    parent = np.array([-1, 0, 0])
    tree = tk.Tree(torch.from_numpy(parent), torch.tensor([2, 1, 1]))
    rewards, keep = torch.tensor([1.0, 0.0]), torch.tensor([True, False])
    expected = treerpo.node_advantages(rewards, tree), treerl.node_rewards(rewards, tree)
    parent[:] = 100
    found = treerpo.node_advantages(rewards, tree), treerl.node_rewards(rewards, tree)
    assert all(map(torch.equal, found, expected))
    assert tree.pruned(keep)[0].arrays[0].tolist() == [-1, 0]


def _held(x: Any) -> list[torch.Tensor]:
    return (
        [x] if isinstance(x, torch.Tensor) else [y for part in x for y in _held(part)] if isinstance(x, tuple) else []
    )


def _shown(layout: Any) -> dict[str, list[torch.Tensor]]:
    """The tensors of each of its public properties."""
    own = {name for name, x in vars(type(layout)).items() if isinstance(x, property) or hasattr(x, "__get__")}
    values = {name: getattr(layout, name) for name in own if not name.startswith("_") and name != "arrays"}
    values |= {"head_inputs": layout.head_inputs()} if isinstance(layout, tk.PackedBatch) else {}
    return {name: tensors for name, x in values.items() if (tensors := _held(x))}


def made_of(layout: Any) -> list[Any]:
    """The layout and what its own methods make of it."""
    if isinstance(layout, tk.PackedBatch):
        other = tk.PackedBatch.concatenate([layout, layout], groups="apart")
        return [layout, layout[1:], other, layout.to("cpu"), tk.Tree.from_trajectories(layout)]
    if isinstance(layout, tk.Tree):
        return [layout, layout.pruned(torch.tensor([True, False]))[0], layout.to("cpu")]
    return [layout, layout.to("cpu")]


@pytest.mark.parametrize("made", [batch, tree, spans])
def test_what_is_read_or_made_while_sampling_is_there_for_training(made: Callable[[], Any]) -> None:
    given = {"tokens", "cu_seqlens", "loss_mask", "group_ids", "parent", "node_lengths", "start", "end", "trajectory"}
    outside = made()
    with torch.inference_mode():
        assert len(_shown(outside)) > 2
        inside = [x for layout in (made(), outside) for x in made_of(layout)]
    for layout in [outside, *inside]:
        for name, tensors in _shown(layout).items():
            theirs = layout is inside[0] and name in given  # as they were given
            assert theirs or name == "index" or not any(x.is_inference() for x in tensors), name
    for _, _, use in (x for x in USES if x[0] is made):
        for layout in (outside, inside[0]):
            use(layout)


@pytest.mark.parametrize(
    "use", [lambda x: x.positions, lambda x: x.rows, lambda x: x.attention_mask(), lambda x: x.token_node]
)
def test_a_write_into_the_nodes_of_tokens_is_met(use: Callable[[tk.Tree], Any]) -> None:
    layout = tree()
    layout.token_node.sub_(1).clamp_(min=0)
    with pytest.raises(ValueError, match="Tree.token_node must not be written into"):
        use(layout)


@pytest.mark.parametrize("native", [True, False])
def test_gradients_through_layouts_made_while_sampling(native: bool) -> None:
    with torch.inference_mode():
        layouts = spans(), tree(), batch()
    with tk.use_backend("native" if native else "reference"):
        for layout, count in zip(layouts, (2, 3, 2), strict=True):
            x = torch.randn(count, requires_grad=True)
            tk.spread(x, layout).sum().backward()
            assert x.grad is not None and x.grad.gt(0).all()
        for op, count, layout in ((tk.span_reduce, 4, layouts[0]), (tk.subtree_reduce, 2, layouts[1])):
            x = torch.randn(count, requires_grad=True)
            op(x, layout).sum().backward()
            assert x.grad is not None and x.grad.gt(0).all()
