"""The tree of rollouts: segments of tokens that share their prefixes, each stored once.

Node n owns ``node_lengths[n]`` tokens, in the order of the nodes; a leaf ends one rollout, whose tokens are those of
the nodes from its root down to it. In depth-first order the leaves below a node are a contiguous range, which is what
makes a reduction over a subtree independent of the tree's depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trajkern._checks import check_choice, check_count, check_flag, check_shape, check_tensor, suggesting
from trajkern._dtypes import INTEGERS
from trajkern._values import check_values
from trajkern.layouts._block_mask import path_mask
from trajkern.layouts._given import Given, check_fields, derived, moved, owned, savable
from trajkern.layouts._leaf_weights import aggregate_weights
from trajkern.layouts._nodes import Nodes, Segments, along_paths, attention_segments, derive, offsets_of
from trajkern.layouts._prefixes import segments, shared_prefixes
from trajkern.layouts.batch import HeadInputs, PackedBatch
from trajkern.losses.kinds import AGGREGATES

DENSE_TOKENS = 4096  # up to here attention_mask() is dense


@suggesting
@dataclass(frozen=True, eq=False, repr=False)
class Tree:
    """A forest of M nodes, L leaves and T tokens, each shared prefix stored once.

    Args:
        parent: int64 or int32 ``[M]``; the node above each node, which must come before it, or -1 for a root.
        node_lengths: int64 or int32 ``[M]``, at least 0; the tokens of each node, at most 2^31 - 1 in all.
        group_ids: int64 or int32, one id a root (in the order of the roots); equal ids share a prompt. Without it each
            root is a group of its own.
        source: int64 or int32 ``[T]``; where each token stands in the flat batch that the tree was made from
            (``batch.tokens[tree.source]``), or None.

    Leaves are numbered in ascending order of their nodes, and every ``[L]`` argument follows them.
    What ops read of ``parent`` and ``node_lengths`` is copied; a later write into one of them makes the next use a
    ValueError, where torch counts it. Construction waits for a GPU, once a batch, since it reads the tree on the host;
    so do the first uses of :attr:`flat_index`, :attr:`path_nodes` and :attr:`attention_segments`, and each call of
    :meth:`pairs`; nothing else does.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was.
    """

    parent: Tensor  # [M]
    node_lengths: Tensor  # [M]
    group_ids: Tensor | None = None  # [roots]
    source: Tensor | None = None  # [T]

    def __post_init__(self) -> None:
        check_tensor("parent", self.parent, dtypes=INTEGERS, ndim=1)
        check_fields(self)
        device, count = self.parent.device, self.parent.numel()
        if count >= 2**31 - 1:
            raise ValueError(f"parent must hold fewer than 2**31 - 1 nodes, got {count}")
        check_tensor("node_lengths", self.node_lengths, dtypes=INTEGERS, device=device)
        check_shape("node_lengths", self.node_lengths, (count,), "one length a node")
        derived, roots, levels = derive(self.parent, self.node_lengths)
        _keep(self, (derived, roots, levels))
        if self.group_ids is not None:
            check_tensor("group_ids", self.group_ids, dtypes=INTEGERS, device=device)
            check_shape("group_ids", self.group_ids, (roots,), "one id a root")
        if self.source is not None:
            check_tensor("source", self.source, dtypes=INTEGERS, device=device)
            check_shape("source", self.source, tuple(derived.token_node.shape), "one place a token")
            check_values("source", self.source, 0)

    def __repr__(self) -> str:
        counts = f"nodes={self.num_nodes}, leaves={self.num_leaves}, tokens={self.num_tokens}, roots={self.num_roots}"
        return f"Tree({counts}, levels={self.levels}, on {self.device})"

    @property
    def num_nodes(self) -> int:
        """M."""
        return self._nodes.parent.shape[0]

    @property
    def num_leaves(self) -> int:
        """L."""
        return self._nodes.order.shape[0]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self._nodes.token_node.shape[0]

    @property
    def num_roots(self) -> int:
        return self._derived[1]  # type: ignore[attr-defined]

    @property
    def levels(self) -> int:
        """Nodes on the longest path."""
        return self._derived[2]  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        return self.parent.device

    @property
    def _nodes(self) -> Nodes:
        return self._derived[0]  # type: ignore[attr-defined]

    @property
    def arrays(self) -> list[Tensor]:
        """What the kernels read, int32: parent, child_begin, child, leaf_begin, leaf_end, order, tree_begin.

        The layout's own: not to be written into.
        """
        self.check_given()
        return list(self._nodes[:7])

    @property
    def bounds(self) -> Tensor:
        """:attr:`node_offsets`, the layout's own: not to be written into."""
        self.check_given()
        return self._nodes.node_offsets

    def check_given(self) -> None:
        """Raises where ``parent`` or ``node_lengths`` were written into."""
        self._given.check()  # type: ignore[attr-defined]

    @derived
    def leaves(self) -> Tensor:
        """Nodes without children, ascending, int64 ``[L]``."""
        return owned(self._nodes.leaves)

    @derived
    def node_offsets(self) -> Tensor:
        """Node n's tokens are ``node_offsets[n]:node_offsets[n+1]``, int64 ``[M+1]``."""
        return owned(self._nodes.node_offsets)

    @property
    def token_node(self) -> Tensor:
        """The node of each token, int64 ``[T]``."""
        self.check_given()
        return self._nodes.token_node

    @derived
    def leaf_count(self) -> Tensor:
        """Leaves at or below each node, int64 ``[M]``."""
        return (self._nodes.leaf_end - self._nodes.leaf_begin).long()

    @derived
    def depth(self) -> Tensor:
        """Nodes above each node, int64 ``[M]``."""
        return self._nodes.depth.long()

    @derived
    def node_root(self) -> Tensor:
        """The number of each node's root, in the order of the roots, int64 ``[M]``."""
        return self._nodes.root.long()

    @derived
    def leaf_root(self) -> Tensor:
        """The number of each leaf's root, in the order of the roots, int64 ``[L]``."""
        return self.node_root[self._nodes.leaves]

    @derived
    def leaf_group(self) -> Tensor:
        """The group id of each leaf: its root's, or its root's number where no ids were given, ``[L]``."""
        return self.leaf_root if self.group_ids is None else self.group_ids[self.leaf_root]

    @derived
    def sibling_offsets(self) -> Tensor:
        """The children of node p are ``sibling_indices[sibling_offsets[p]:sibling_offsets[p+1]]``, int64 ``[M+1]``."""
        return self._nodes.child_begin.long()

    @derived
    def sibling_indices(self) -> Tensor:
        """The children of one node after those of another, ascending in each, int64 ``[M - roots]``."""
        return self._nodes.child.long()

    @derived
    def leaf_range(self) -> tuple[Tensor, Tensor]:
        """(begin, end) of the leaves below each node as a range of :attr:`leaf_order`, int64 ``[M]``."""
        return self._nodes.leaf_begin.long(), self._nodes.leaf_end.long()

    @derived
    def leaf_order(self) -> Tensor:
        """The leaf number at each place of the depth-first order, int64 ``[L]``."""
        return self._nodes.order.long()

    @derived
    def positions(self) -> Tensor:
        """The position id of each token: how many tokens stand before it on its path, int64 ``[T]``."""
        within = torch.arange(self.num_tokens, device=self.device) - self._nodes.node_offsets[self.token_node]
        return self._nodes.position[self.token_node] + within

    @derived
    def rows(self) -> Tensor:
        """The token whose hidden state predicts each token: the one before it on its path, or -1; int64 ``[T]``."""
        token = torch.arange(self.num_tokens, device=self.device)
        first = token == self._nodes.node_offsets[self.token_node]
        return torch.where(first, self._nodes.previous[self.token_node], token - 1)

    @derived
    def flat_lengths(self) -> Tensor:
        """Tokens of each rollout, from its root to its leaf, int64 ``[L]``."""
        return self._path_lengths()

    @derived
    def flat_cu_seqlens(self) -> Tensor:
        """Boundaries of the rollouts in :attr:`flat_index`, int64 ``[L+1]``."""
        return offsets_of(self.flat_lengths)

    @derived
    def flat_index(self) -> Tensor:
        """The packed token of every token of the flat, duplicated rollouts: ``x[tree.flat_index]`` repeats prefixes."""
        return along_paths(self._nodes.parent, self.bounds, self._nodes.leaves, offsets_of(self._path_lengths()))

    def _path_lengths(self) -> Tensor:
        leaves = self._nodes.leaves
        return self._nodes.position[leaves] + self.bounds.diff()[leaves]

    @derived
    def path_nodes(self) -> tuple[Tensor, Tensor]:
        """(leaf, node) of every step of every rollout, rollout after rollout from its root down, int64 ``[S]`` each."""
        steps = self._nodes.depth[self._nodes.leaves].long() + 1
        each = torch.arange(self.num_nodes + 1, device=self.device)
        node = along_paths(self._nodes.parent, each, self._nodes.leaves, offsets_of(steps))
        leaf = torch.arange(self.num_leaves, device=self.device)
        return torch.repeat_interleave(leaf, steps, output_size=node.shape[0]), node

    @derived
    def attention_segments(self) -> Segments:
        """A forward by variable-length attention: queries as packed, keys and values gathered by ``keys``.

        A segment's queries see the keys of its path up to their own: causal, the ends of both aligned ("bottom-right").
        """
        return attention_segments(self._nodes, self.bounds.diff())

    def pairs(
        self,
        tokens: Tensor,  # [T]
        loss_mask: Tensor | None = None,  # [T]
    ) -> HeadInputs:
        """The (row, target) pairs of the packed tree: each token is the target of one.

        Its row is the token before it on its path: the one before it in its node, or the last token of the nearest
        ancestor that has one. A rollout's first token has none. ``loss_mask`` (bool) chooses among them; without it all
        pairs are returned. ``cu_seqlens`` ``[M+1]`` counts the pairs of each node. How many there are is read from the
        device: call it once a batch.
        """
        check_tensor("tokens", tokens, dtypes=INTEGERS, device=self.device)
        check_shape("tokens", tokens, (self.num_tokens,), "one id a token of the tree")
        scored = self.rows >= 0
        if loss_mask is not None:
            self._check_mask("loss_mask", loss_mask)
            first = (loss_mask & ~scored).nonzero()
            if first.numel():
                raise ValueError(
                    "loss_mask must be False on the first token of every rollout (nothing predicts it); "
                    f"it is True at token {int(first[0, 0])}"
                )
            scored = loss_mask
        target = scored.nonzero().squeeze(1)
        return HeadInputs(
            self.rows[target], tokens[target].long(), target, offsets_of(scored)[self._nodes.node_offsets]
        )

    @suggesting
    def leaf_weights(
        self,
        mask: Tensor,  # [T]
        aggregate: str,
        *,
        max_length: int | None = None,
    ) -> Tensor:
        """The weight of each rollout's token losses with which their sum is ``aggregate`` over the flat rollouts.

        With c_l the masked tokens on the path of leaf l, and N the leaves that have one: 1 for "token_sum" and
        "token_mean" (which divides by the mask times the leaf counts besides), 1 / N for "seq_mean_token_sum",
        1 / (N c_l) for "seq_mean_token_mean", 1 / (N max_length) for "seq_mean_token_sum_norm". Where c_l is 0 it is 0.

        Returns:
            float64 ``[L]``, to be given to :func:`trajkern.branch_coefficients`.
        """
        self._check_mask("mask", mask)
        aggregate = check_choice("aggregate", aggregate, AGGREGATES)
        if aggregate == "seq_mean_token_sum_norm" and max_length is None:
            raise ValueError("max_length must be given for aggregate 'seq_mean_token_sum_norm', got None")
        number = None if max_length is None else check_count("max_length", max_length, low=1)
        return aggregate_weights(self.along_paths(offsets_of(mask)[self._nodes.node_offsets].diff()), aggregate, number)

    def along_paths(self, per_node: Tensor) -> Tensor:  # [M]
        """The sum of int64 over the nodes from each leaf up to its root, ``[L]``: a node's from its first leaf to its
        last."""
        check_tensor("per_node", per_node, dtypes=(torch.int64,), device=self.device)
        check_shape("per_node", per_node, (self.num_nodes,), "one number a node")
        begin, end = self.leaf_range
        step = torch.zeros(self.num_leaves + 1, dtype=torch.int64, device=self.device)
        step = step.index_add(0, begin, per_node).index_add(0, end, -per_node)
        counts = torch.empty_like(self.leaf_order)
        counts[self.leaf_order] = step.cumsum(0)[:-1]
        return counts

    def _check_mask(self, name: str, mask: Tensor) -> None:
        check_tensor(name, mask, dtypes=(torch.bool,), device=self.device)
        check_shape(name, mask, (self.num_tokens,), "one flag a token of the tree")

    @suggesting
    def attention_mask(self, *, dense: bool | None = None) -> Any:
        """Who sees whom: each token itself and the tokens before it on its path.

        Returns:
            Bool ``[1, 1, T, T]`` (True: may be seen), or a ``torch.nn.attention.flex_attention.BlockMask`` with
            ``dense=False``, which is the default above 4,096 tokens. Used with :attr:`positions` as position ids, a
            forward of the packed tree gives every rollout's own hidden states.
        """
        dense = self.num_tokens <= DENSE_TOKENS if dense is None else check_flag("dense", dense)
        begin, end = (x[self.token_node] for x in self.leaf_range)
        return path_mask(begin, end, self.positions, dense)

    @savable
    def pruned(self, leaves: Tensor) -> tuple[Tree, Tensor]:  # [L] bool
        """The tree of the rollouts marked by ``leaves``, and which of the nodes it has, bool ``[M]``.

        Nodes and leaves keep their order. How many are left is read from the device.
        """
        check_tensor("leaves", leaves, dtypes=(torch.bool,), device=self.device)
        check_shape("leaves", leaves, (self.num_leaves,), "one flag a leaf")
        self.check_given()
        begin, end = self.leaf_range
        below = offsets_of(leaves[self.leaf_order])
        nodes = below[end] > below[begin]
        number, parent = nodes.cumsum(0) - 1, self._nodes.parent.long()[nodes]
        roots = torch.arange(self.num_roots, device=self.device) if self.group_ids is None else self.group_ids
        source = None if self.source is None else self.source[nodes[self.token_node]]
        parent = torch.where(parent < 0, -1, number[parent])
        return Tree(parent, self.bounds.diff()[nodes], roots[nodes[self._nodes.parent < 0]], source), nodes

    @savable
    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Tree:
        """The same tree on another device, not validated again."""
        there = moved(self, device, non_blocking)
        nodes = Nodes(*(x.to(device, non_blocking=non_blocking) for x in self._nodes))
        return _keep(there, (nodes, self.num_roots, self.levels))

    @classmethod
    @suggesting
    @savable
    def from_trajectories(cls, batch: PackedBatch, on_mismatch: str = "raise", *, tolerance: float = 1e-3) -> Tree:
        """The tree of a batch's shared prefixes, inside each group and where the loss masks agree too.

        Inner nodes come first; then each trajectory has a leaf of its own (of length 0 where it is a prefix or a
        duplicate of another), so that L = N and every ``[N]`` field is an ``[L]`` one. ``tree.source`` takes the
        batch's per-token fields to the packed tree, and ``flat_index`` takes the tree's to the batch.

        Args:
            batch: the trajectories, on any device.
            on_mismatch: what happens where two trajectories share tokens but not their log-probs (old, reference or
                sampler's, at tokens whose loss mask is True): "raise", or "split" to let them part there.
            tolerance: how far such log-probs may lie apart. The first trajectory's are kept.
        """
        return cls(*shared_prefixes(batch, on_mismatch, tolerance)).to(batch.device)

    @classmethod
    @savable
    def from_segments(
        cls,
        segment_ids: Tensor,  # [T]
        parent_ids: Tensor,  # [T]
    ) -> Tree:
        """The tree of a packed row whose tokens bear the id of their segment, and of the one that it goes on from.

        A segment is a run of tokens with one id, which occurs in no other run. Its parent is the segment whose id its
        ``parent_ids`` are; a root's is its own. Parents stand before their children. The segments are the nodes as they
        stand in the row, so that the row's per-token fields are the tree's, and its last segments the leaves.

        Args:
            segment_ids, parent_ids: int64 or int32 ``[T]``, any values.

        Raises:
            TypeError, ValueError: an id that begins twice, a segment with two parents, or a parent that no token has or
                that stands behind; naming the argument and the token.
        """
        return cls(*segments(segment_ids, parent_ids)).to(segment_ids.device)


def _keep(tree: Tree, derived: tuple[Nodes, int, int]) -> Tree:
    """The tree, which reads what was derived."""
    object.__setattr__(tree, "_derived", derived)
    given, nodes = {"parent": tree.parent, "node_lengths": tree.node_lengths}, derived[0]
    own = {f"arrays[{i}]": x for i, x in enumerate(nodes[:7])}
    own |= {"bounds": nodes.node_offsets, "token_node": nodes.token_node}
    object.__setattr__(tree, "_given", Given("Tree", given, own))
    return tree
