"""Tree: what it refuses, what it derives against plain walks, and the shared prefixes of a batch."""

from __future__ import annotations

import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trajkern as tk
from trajkern.losses.kinds import AGGREGATES
from trajkern.testing.tree import chain, random_tree, star

PARENT, LENGTHS = [-1, 0, 0, 1, 1, -1], [2, 0, 3, 1, 2, 1]


def small(**changes) -> tk.Tree:
    fields = {"parent": torch.tensor(PARENT), "node_lengths": torch.tensor(LENGTHS)}
    return tk.Tree(**(fields | changes))


REFUSED = [
    ("parent", torch.tensor([0, 0, 0, 1, 1, -1]), ValueError, r"every node to a root; it has the cycle 0 -> 0"),
    ("parent", torch.tensor([1, 2, 0, 1, 1, -1]), ValueError, r"has the cycle 0 -> 1 -> 2 -> 0"),
    ("parent", torch.tensor([-1, 3, 0, 0, 1, -1]), ValueError, r"before its child; node 1's is 3"),
    ("parent", torch.tensor([-1, 0, 0, 6, 1, -1]), ValueError, r"lie in \[-1, 6\); node 3's is 6"),
    ("parent", torch.tensor([-1, 0, -2, 1, 1, -1]), ValueError, r"lie in \[-1, 6\); node 2's is -2"),
    ("parent", torch.tensor([[-1, 0]]), ValueError, r"1 dimension; got int64\[1, 2\]"),
    ("parent", torch.tensor(PARENT).float(), TypeError, r"dtype int64, int32; got float32\[6\]"),
    ("parent", PARENT, TypeError, r"a tensor, got .*list"),
    ("node_lengths", torch.tensor(LENGTHS[:5]), ValueError, r"shape \[6\] \(one length a node\); got int64\[5\]"),
    ("node_lengths", torch.tensor([2, 0, 3, -1, 2, 1]), ValueError, r"at least 0; node 3's is -1"),
    ("node_lengths", torch.tensor(LENGTHS).double(), TypeError, r"dtype int64, int32; got float64"),
    ("group_ids", torch.tensor([4]), ValueError, r"shape \[2\] \(one id a root\); got int64\[1\]"),
    ("group_ids", torch.tensor([4.0, 5.0]), TypeError, r"dtype int64, int32"),
    ("source", torch.arange(8), ValueError, r"shape \[9\] \(one place a token\); got int64\[8\]"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refuses(name: str, value: object, error: type, message: str) -> None:
    with pytest.raises(error, match=rf"^{name} must .*{message}"):
        small(**{name: value})


def test_literal() -> None:
    tree = small(group_ids=torch.tensor([40, 30]))
    expected = {
        "leaves": [2, 3, 4, 5],
        "leaf_count": [3, 2, 1, 1, 1, 1],
        "depth": [0, 1, 1, 2, 2, 0],
        "node_root": [0, 0, 0, 0, 0, 1],
        "leaf_root": [0, 0, 0, 1],
        "leaf_group": [40, 40, 40, 30],
        "sibling_offsets": [0, 2, 4, 4, 4, 4, 4],
        "sibling_indices": [1, 2, 3, 4],
        "leaf_order": [1, 2, 0, 3],
        "positions": [0, 1, 2, 3, 4, 2, 2, 3, 0],
        "rows": [-1, 0, 1, 2, 3, 1, 1, 6, -1],
        "flat_index": [0, 1, 2, 3, 4, 0, 1, 5, 0, 1, 6, 7, 8],
        "flat_cu_seqlens": [0, 5, 8, 12, 13],
    }
    assert {name: getattr(tree, name).tolist() for name in expected} == expected
    assert (tree.num_nodes, tree.num_leaves, tree.num_tokens, tree.num_roots, tree.levels) == (6, 4, 9, 2, 3)
    assert small().leaf_group.tolist() == [0, 0, 0, 1]


def test_pairs() -> None:
    tree, tokens = small(), torch.arange(100, 109)
    every = tree.pairs(tokens)
    assert every.rows.tolist() == [0, 1, 2, 3, 1, 1, 6]
    assert every.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7] and every.targets.tolist() == list(range(101, 108))
    assert every.cu_seqlens.tolist() == [0, 1, 1, 4, 5, 7, 7]
    mask = torch.tensor([0, 0, 1, 0, 0, 1, 0, 1, 0]).bool()
    some = tree.pairs(tokens, mask)
    assert some.rows.tolist() == [1, 1, 6] and some.targets.tolist() == [102, 105, 107]
    with pytest.raises(ValueError, match="^loss_mask must be False on the first token of every rollout.*token 8"):
        tree.pairs(tokens, torch.arange(9) >= 7)


def _paths(tree: tk.Tree) -> list[list[int]]:
    """The packed tokens of each rollout, by a walk from its leaf."""
    parent, offsets, rows = tree.parent.tolist(), tree.node_offsets.tolist(), []
    for leaf in (n for n in range(len(parent)) if n not in parent):
        nodes = [leaf]
        while parent[nodes[-1]] >= 0:
            nodes.append(parent[nodes[-1]])
        rows.append([t for n in reversed(nodes) for t in range(offsets[n], offsets[n + 1])])
    return rows


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), nodes=st.integers(1, 60), roots=st.integers(1, 4))
def test_against_plain_walks(seed: int, nodes: int, roots: int) -> None:
    tree = random_tree(torch.Generator().manual_seed(seed), nodes, roots)
    paths = _paths(tree)
    assert tree.flat_index.tolist() == [t for path in paths for t in path]
    assert tree.flat_cu_seqlens.diff().tolist() == [len(path) for path in paths]
    walks = _paths(tk.Tree(tree.parent, torch.ones_like(tree.parent)))  # node n has token n
    leaf, node = tree.path_nodes
    assert leaf.tolist() == [at for at, path in enumerate(walks) for _ in path]
    assert node.tolist() == [n for path in walks for n in path]
    rows, seen = {}, torch.eye(tree.num_tokens, dtype=torch.bool)
    for path in paths:
        for place, token in enumerate(path):
            assert tree.positions[token] == place
            rows[token] = path[place - 1] if place else -1
            seen[token, path[:place]] = True
    for token in rows:
        assert tree.rows[token] == rows[token]
    assert torch.equal(tree.attention_mask(dense=True)[0, 0], seen)
    begin, end = tree.leaf_range
    for n in range(nodes):
        below = sorted(tree.leaf_order[begin[n] : end[n]].tolist())
        assert below == [i for i, leaf in enumerate(tree.leaves.tolist()) if n in _above(tree, leaf)]


def _above(tree: tk.Tree, node: int) -> set[int]:
    ancestors = {node}
    while (node := int(tree.parent[node])) >= 0:
        ancestors.add(node)
    return ancestors


@pytest.mark.parametrize("aggregate", tuple(a for a in AGGREGATES if a != "token_mean"))
def test_leaf_weights_are_the_flat_aggregation(aggregate: str) -> None:
    tree = random_tree(torch.Generator().manual_seed(3), 60)
    mask = torch.rand(tree.num_tokens, generator=torch.Generator().manual_seed(4)) > 0.7
    x = torch.randn(tree.num_tokens, dtype=torch.float64)
    rows = [[float(x[t]) for t in path if mask[t]] for path in _paths(tree)]
    counted = [row for row in rows if row]
    per_row = {
        "token_sum": [sum(row) * len(counted) for row in counted],
        "seq_mean_token_sum": [sum(row) for row in counted],
        "seq_mean_token_sum_norm": [sum(row) / 50 for row in counted],
        "seq_mean_token_mean": [sum(row) / len(row) for row in counted],
    }[aggregate]
    weights = tree.leaf_weights(mask, aggregate, max_length=50)
    packed = (x * mask * tk.spread(tk.subtree_reduce(weights, tree, "sum"), tree)).sum()
    assert float(packed) == pytest.approx(sum(per_row) / len(counted), rel=1e-12)
    assert ((weights == 0) == torch.tensor([not row for row in rows])).all()
    assert tree.leaf_weights(torch.zeros_like(mask), aggregate, max_length=50).sum() == 0


def test_block_mask_is_the_dense_one() -> None:
    tree = random_tree(torch.Generator().manual_seed(5), 150)
    blocks = tree.attention_mask(dense=False)
    assert tree.num_tokens > 256 and blocks.seq_lengths == (tree.num_tokens, tree.num_tokens)
    dense, size = tree.attention_mask(dense=True)[0, 0], 128
    count = -(-tree.num_tokens // size)
    padded = torch.zeros(count * size, count * size, dtype=torch.bool)
    padded[: tree.num_tokens, : tree.num_tokens] = dense
    expected = padded.view(count, size, count, size).any(3).any(1)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), expected)
    token = torch.arange(tree.num_tokens)
    assert torch.equal(blocks.mask_mod(None, None, token[:, None], token), dense)


def test_extreme_shapes_are_quick() -> None:
    begin = time.perf_counter()
    assert chain(100_000).levels == 100_000 and star(100_000).num_leaves == 100_000
    assert time.perf_counter() - begin < 5


def _batch(
    rows: list[list[int]], groups: list[int], masks: list[list[int]] | None = None, **fields: Tensor
) -> tk.PackedBatch:
    lengths = torch.tensor([0, *map(len, rows)]).cumsum(0)
    mask = [[int(i > 0) for i in range(len(row))] for row in rows] if masks is None else masks
    flat = torch.tensor([t for row in rows for t in row], dtype=torch.int64)
    return tk.PackedBatch(
        flat,
        lengths,
        torch.tensor([m for row in mask for m in row]).bool(),
        torch.tensor(groups, dtype=torch.int64),
        **fields,
    )


ROWS = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2], [1, 2, 3, 4], [9], [], [1, 2, 3]]


class TestFromTrajectories:
    def test_literal(self) -> None:
        batch = _batch(ROWS, [7, 7, 7, 7, 7, 7, 5])
        tree = tk.Tree.from_trajectories(batch)
        # [1, 2], [3] below it and [4] below that are shared; then one leaf a trajectory
        assert tree.parent.tolist() == [-1, 0, 1, 2, 1, 0, 2, -1, -1, -1]
        assert tree.node_lengths.tolist() == [2, 1, 1, 0, 1, 0, 0, 1, 0, 3]
        assert tree.leaf_group.tolist() == [7, 7, 7, 7, 7, 7, 5]
        assert torch.equal(batch.tokens[tree.source][tree.flat_index], batch.tokens)
        assert torch.equal(tree.flat_cu_seqlens, batch.cu_seqlens)

    @settings(max_examples=60, deadline=None)
    @given(rows=st.lists(st.lists(st.integers(0, 1), max_size=7), max_size=12), groups=st.integers(1, 3))
    def test_shares_every_prefix_once(self, rows: list[list[int]], groups: int) -> None:
        ids = [i % groups for i in range(len(rows))]
        batch = _batch(rows, ids)
        tree = tk.Tree.from_trajectories(batch)
        assert torch.equal(batch.tokens[tree.source][tree.flat_index], batch.tokens)
        assert torch.equal(tree.flat_cu_seqlens, batch.cu_seqlens)
        prefixes = {(g, *row[:k]) for g, row in zip(ids, rows, strict=True) for k in range(1, len(row) + 1)}
        assert tree.num_tokens == len(prefixes) and tree.leaf_group.tolist() == ids

    def test_shares_where_the_loss_masks_agree(self) -> None:
        tree = tk.Tree.from_trajectories(_batch([[1, 2, 3], [1, 2, 3]], [0, 0], [[0, 1, 1], [0, 0, 1]]))
        assert tree.parent.tolist() == [-1, 0, 0] and tree.node_lengths.tolist() == [1, 2, 2]

    def test_mismatch(self) -> None:
        old = torch.tensor([0.0, -1.0, -2.0, 9.0, -1.0, -2.5, 9.0, -1.0, -2.0])
        batch = _batch([[1, 2, 3]] * 3, [0, 0, 0], old_logprobs=old)
        message = "old_logprobs must agree to 0.001 .* trajectories 0 and 1 share; at its token 2 they are -2 and -2.5"
        with pytest.raises(ValueError, match=f"^{message}"):
            tk.Tree.from_trajectories(batch)
        tree = tk.Tree.from_trajectories(batch, on_mismatch="split")
        assert tree.parent.tolist() == [-1, 0, 1, 0, 1] and tree.node_lengths.tolist() == [2, 1, 0, 1, 0]
        assert tk.Tree.from_trajectories(batch, tolerance=0.6).num_tokens == 3

    def test_sampler_mismatch_is_named(self) -> None:
        sampler = torch.tensor([0.0, -1.0, 0.0, -2.0])
        with pytest.raises(ValueError, match="^sampler_logprobs must agree"):
            tk.Tree.from_trajectories(_batch([[1, 2], [1, 2]], [0, 0], sampler_logprobs=sampler))

    def test_bad_arguments(self) -> None:
        batch = _batch(ROWS, [0] * 7)
        for options in ({"on_mismatch": "merge"}, {"tolerance": -1.0}):
            with pytest.raises(ValueError, match=f"^{re.escape(next(iter(options)))} must"):
                tk.Tree.from_trajectories(batch, **options)

    def test_many_children(self) -> None:
        rows = [[0, k] for k in range(20_000)]
        tree = tk.Tree.from_trajectories(_batch(rows, [0] * len(rows)))
        assert tree.num_nodes == 20_001 and tree.num_tokens == 20_001


# ids that tokens bear


def test_segments_are_the_nodes_as_they_stand() -> None:
    """A root, two that go on from it, one below the second; another root, with ids in no order."""
    own = torch.tensor([7, 7, -3, 9, 9, 9, 2**40, 1, 1])
    above = torch.tensor([7, 7, 7, 7, 7, 7, 9, 1, 1])
    tree = tk.Tree.from_segments(own, above)
    assert tree.parent.tolist() == [-1, 0, 0, 2, -1] and tree.node_lengths.tolist() == [2, 1, 3, 1, 2]
    assert tree.source is None and tree.group_ids is None
    begin, end = tree.flat_cu_seqlens[:-1].tolist(), tree.flat_cu_seqlens[1:].tolist()
    paths = [tree.flat_index[a:b].tolist() for a, b in zip(begin, end, strict=True)]
    assert paths == [[0, 1, 2], [0, 1, 3, 4, 5, 6], [7, 8]]
    assert tk.Tree.from_segments(own[:0], above[:0]).num_nodes == 0


def test_any_tree_comes_back_from_its_ids() -> None:
    g = torch.Generator().manual_seed(4)
    parent = random_tree(g, 40).parent
    tree = tk.Tree(parent, torch.randint(1, 5, (40,), generator=g))
    name = torch.randperm(100, generator=g)[:40] - 50
    above = torch.where(parent < 0, name, name[parent.clamp_min(0)])
    again = tk.Tree.from_segments(name[tree.token_node], above[tree.token_node])
    assert again.parent.tolist() == parent.tolist() and again.node_lengths.tolist() == tree.node_lengths.tolist()


@pytest.mark.parametrize(
    "own, above, error, message",
    [
        ([1, 1, 2, 1], [1, 1, 1, 1], ValueError, r"segment_ids must mark one run .* id 1 begins again at token 3"),
        ([1, 1, 2, 2], [1, 1, 1, 2], ValueError, r"parent_ids must be one id along .* segment 2 changes at 3"),
        ([1, 1, 2, 2], [1, 1, 5, 5], ValueError, r"parent_ids must name an id that some token has.*; token 2's is 5"),
        ([1, 2, 2, 3], [1, 3, 3, 3], ValueError, r"parent_ids must name a segment that stands before.* token 1's is 3"),
        ([1, 2], [1], ValueError, r"parent_ids must have shape \[2\] \(one id a token\)"),
        ([1.0, 2.0], [1, 1], TypeError, r"segment_ids must have dtype int64, int32"),
    ],
)
def test_ids_that_make_no_tree(own: list, above: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tk.Tree.from_segments(torch.tensor(own), torch.tensor(above))


def test_segments_of_attention_see_what_the_mask_shows() -> None:
    tree = random_tree(torch.Generator().manual_seed(5), 60)
    segments = tree.attention_segments
    bounds_q, bounds_k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    seen = torch.zeros(tree.num_tokens, tree.num_tokens, dtype=torch.bool)
    for n in range(len(bounds_q) - 1):
        keys = segments.keys[bounds_k[n] : bounds_k[n + 1]]
        queries = range(bounds_q[n], bounds_q[n + 1])
        for left, token in enumerate(reversed(queries)):
            seen[token, keys[: len(keys) - left]] = True
    assert torch.equal(seen, tree.attention_mask(dense=True)[0, 0])
    assert bounds_q[-1] == tree.num_tokens and segments.cu_seqlens_q.dtype == torch.int32
    assert segments.max_seqlen_q == max(b - a for a, b in zip(bounds_q, bounds_q[1:], strict=False))
    assert segments.max_seqlen_k == int(tree.positions.max()) + 1
    assert tk.Tree(*torch.empty(2, 0, dtype=torch.int64)).attention_segments[3:] == (0, 0)
