"""What the native module finds for the layouts, in Python: the same results where it is not built, more slowly."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def turns(mask: Tensor, bounds: Tensor) -> Tensor:  # [T], [N+1] -> [4, S]
    """Start, end, trajectory and index of the runs of True in each trajectory."""
    tokens = mask.shape[0]
    first = torch.zeros(tokens + 1, dtype=torch.bool, device="cpu")
    first[bounds] = True
    off = mask.new_zeros(1)
    start = (mask & ~(torch.cat((off, mask[:-1])) & ~first[:-1])).nonzero().squeeze(1)
    end = (mask & ~(torch.cat((mask[1:], off)) & ~first[1:])).nonzero().squeeze(1) + 1
    trajectory = torch.searchsorted(bounds, start, right=True) - 1
    index = torch.arange(start.shape[0], device="cpu") - torch.searchsorted(trajectory, trajectory)
    return torch.stack((start, end, trajectory, index))


class Derived(NamedTuple):
    """What a tree's parents imply, in the order of the native module's arrays; ``bad``: its first illegal parent."""

    bad: int
    leaves: int
    roots: int
    levels: int
    arrays: tuple[list[int], ...]  # parent, child_begin, child, leaf_begin, leaf_end, tree_begin, root, depth,
    # position, previous


def derive(parent: list[int], lengths: list[int]) -> Derived:
    """Of nodes that stand behind their parents; -1 is a root's."""
    count = len(parent)
    for node, above in enumerate(parent):
        if not -1 <= above < node:
            return Derived(node, 0, 0, 0, ())
    children: list[list[int]] = [[] for _ in parent]
    below = [0] * count  # leaves
    for node, above in enumerate(parent):
        if above >= 0:
            children[above].append(node)
    for node in reversed(range(count)):
        below[node] = below[node] or 1
        if parent[node] >= 0:
            below[parent[node]] += below[node]
    leaf_begin, root, depth, position, previous, last = ([0] * count for _ in range(6))
    tree_begin: list[int] = []
    following = [0] * count  # where the next child's leaves begin
    roots = tokens = 0
    for node, above in enumerate(parent):
        if above < 0:
            leaf_begin[node], root[node], previous[node] = len(tree_begin), roots, -1
            tree_begin += [len(tree_begin)] * below[node]
            roots += 1
        else:
            leaf_begin[node], root[node], depth[node] = following[above], root[above], depth[above] + 1
            position[node], previous[node] = position[above] + lengths[above], last[above]
            following[above] += below[node]
        following[node] = leaf_begin[node]
        tokens += lengths[node]
        last[node] = tokens - 1 if lengths[node] > 0 else previous[node]
    leaf_end = [begin + leaves for begin, leaves in zip(leaf_begin, below, strict=True)]
    child_begin = list(accumulate(map(len, children), initial=0))
    child = [x for some in children for x in some]
    arrays = (parent, child_begin, child, leaf_begin, leaf_end, tree_begin, root, depth, position, previous)
    return Derived(-1, len(tree_begin), roots, max(depth, default=-1) + 1, arrays)


def along_paths(parent: list[int], offsets: list[int], leaves: list[int]) -> Tensor:
    """What each leaf's path passes from its root down, of which node n has ``offsets[n]:offsets[n+1]``."""
    found: list[Tensor] = []
    for leaf in leaves:
        path, node = [], leaf
        while node >= 0:
            path.append(torch.arange(offsets[node], offsets[node + 1], device="cpu"))
            node = parent[node]
        found += reversed(path)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device="cpu")


class Parted(Exception):
    """Two trajectories agree in tokens, but not in a field's log-probs: the field and the two places."""

    def __init__(self, field: int, here: int, there: int) -> None:
        super().__init__(field, here, there)
        self.found = field, here, there


class PrefixTree:
    """The shared prefixes of a packed batch as a tree whose edges are stretches of tokens, a trajectory at a time."""

    def __init__(
        self,
        tokens: Tensor,  # [T]
        mask: Tensor,  # [T]
        group: Tensor,  # [N] from 0 to groups - 1
        groups: int,
        logprobs: list[Tensor],  # [T] each
        tolerance: float,
        split: bool,
    ) -> None:
        self._tokens, self._mask = tokens.numpy(), mask.numpy()
        self._logprobs = [x.numpy() for x in logprobs]
        self._group, self._groups, self._tolerance, self._split = group.tolist(), groups, tolerance, split
        # node g < groups stands above group g's roots; node x is the batch's tokens begin[x]:begin[x] + length[x]
        self._parent, self._begin, self._length = [-1] * groups, [0] * groups, [0] * groups
        self._children: dict[tuple[int, int, bool], list[int]] = {}  # by parent and first token, the youngest first
        self._end: list[int] = []  # the node at which a trajectory ends

    def insert(self, begin: int, end: int) -> None:
        """Add the next trajectory. Raises Parted where its log-probs part from another's, unless it may be split."""
        node, at = self._group[len(self._end)], begin
        while at < end:
            chosen, length = -1, 0
            for child in self._siblings(node, at):
                if length := self._shared(child, at, end):
                    chosen = child
                    break
            if chosen < 0:
                chosen, length = self._create(node, at, end - at), end - at
            if length < self._length[chosen]:
                chosen = self._cut(chosen, length)
            node, at = chosen, at + length
        self._end.append(node)

    def numbered(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Parents, lengths, source of the tokens and groups of the roots: inner nodes, then a leaf a trajectory."""
        number: dict[int, int] = {}
        ends = [0] * len(self._parent)
        for node in self._end:
            ends[node] += 1
        above = {parent for parent in self._parent if parent >= self._groups}
        inner = {x for x in range(self._groups, len(ends)) if x in above or ends[x] > 1}
        parents, lengths, root_groups, source = [], [], [], []

        def add(parent: int, begin: int, length: int, group: int) -> None:
            parents.append(number.get(parent, -1))
            lengths.append(length)
            source.append(torch.arange(begin, begin + length, device="cpu"))
            if parent < self._groups:
                root_groups.append(group)

        for node, group in zip(self._end, self._group, strict=True):
            path = []
            while node >= self._groups and node not in number:
                path += [node] if node in inner else []
                node = self._parent[node]
            for x in reversed(path):
                number[x] = len(parents)
                add(self._parent[x], self._begin[x], self._length[x], group)
        for node, group in zip(self._end, self._group, strict=True):
            if node < self._groups or node in inner:
                add(node, 0, 0, group)
            else:
                add(self._parent[node], self._begin[node], self._length[node], group)
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        parent, length, groups = (
            torch.tensor(x, dtype=torch.int64, device="cpu") for x in (parents, lengths, root_groups)
        )
        return parent, length, torch.cat([empty, *source]), groups

    def _siblings(self, parent: int, at: int) -> list[int]:
        return self._children.setdefault((parent, int(self._tokens[at]), bool(self._mask[at])), [])

    def _create(self, parent: int, begin: int, length: int) -> int:
        self._parent.append(parent)
        self._begin.append(begin)
        self._length.append(length)
        self._siblings(parent, begin).insert(0, len(self._parent) - 1)
        return len(self._parent) - 1

    def _cut(self, node: int, length: int) -> int:
        """Cut a node after ``length`` tokens; the new upper part takes its place, the lower one keeps its children."""
        parent, begin = self._parent[node], self._begin[node]
        siblings = self._siblings(parent, begin)
        at = siblings.index(node)
        upper = self._create(parent, begin, length)
        siblings.remove(upper)
        siblings[at] = upper
        self._parent[node], self._begin[node], self._length[node] = upper, begin + length, self._length[node] - length
        self._siblings(upper, begin + length).insert(0, node)
        return upper

    def _shared(self, node: int, at: int, end: int) -> int:
        """Tokens that a node shares with the batch's from ``at`` on."""
        begin, most = self._begin[node], min(self._length[node], end - at)
        here, there = slice(begin, begin + most), slice(at, at + most)
        same = (self._tokens[here] == self._tokens[there]) & (self._mask[here] == self._mask[there])
        length = _first(~same)
        parting = []
        with np.errstate(invalid="ignore"):  # what is not a number agrees with nothing
            for field, x in enumerate(self._logprobs):
                far = ~(np.abs(x[here] - x[there]) <= self._tolerance) & self._mask[here]
                if (place := _first(far[:length])) < length:
                    parting.append((place, field))
        if not parting:
            return length
        place, field = min(parting)
        if not self._split:
            raise Parted(field, begin + place, at + place)
        return place


def _first(flags: np.ndarray) -> int:
    """The first True's place, or how many flags there are."""
    return int(flags.argmax()) if flags.any() else len(flags)
