"""What a tree's parents and lengths imply, computed once on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._checks import resolved
from trajkern.layouts import _plain
from trajkern.layouts._given import MOST_TOKENS, check_tokens, savable


class Nodes(NamedTuple):
    """What the parents and lengths imply; the first seven are the kernels' view of the tree."""

    parent: Tensor  # [M]
    child_begin: Tensor  # [M+1]
    child: Tensor  # [M - roots]
    leaf_begin: Tensor  # [M]
    leaf_end: Tensor  # [M]
    order: Tensor  # [L] leaf number at each place of the depth-first order
    tree_begin: Tensor  # [L] the place at which the tree begins to which each place belongs
    root: Tensor  # [M]
    depth: Tensor  # [M]
    position: Tensor  # [M] tokens before the node on its path
    previous: Tensor  # [M] the last token before the node on its path, or -1
    leaves: Tensor  # [L]
    node_offsets: Tensor  # [M+1]
    token_node: Tensor  # [T]


class Segments(NamedTuple):
    """What a variable-length attention call needs to run a tree: the S nodes with tokens are its sequences."""

    keys: Tensor  # [K] the tokens on the path to each segment's end, from its root down; int64
    cu_seqlens_q: Tensor  # [S+1] boundaries of the segments in the packed tokens, int32
    cu_seqlens_k: Tensor  # [S+1] boundaries of their paths in ``keys``, int32
    max_seqlen_q: int  # tokens of the longest segment
    max_seqlen_k: int  # of the longest path


def offsets_of(counts: Tensor) -> Tensor:
    """Sums of what stands before each entry, and of all, int64."""
    out = torch.zeros(counts.shape[0] + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=out[1:])
    return out


@savable
def derive(parent: Tensor, node_lengths: Tensor) -> tuple[Nodes, int, int]:
    device, m = parent.device, parent.shape[0]
    up, lengths = (resolved(x).cpu().long().contiguous() for x in (parent, node_lengths))
    if bool((lengths < 0).any()):
        at = int((lengths < 0).nonzero()[0, 0])
        raise ValueError(f"node_lengths must be at least 0; node {at}'s is {int(lengths[at])}")
    longest = int(lengths.max()) if m else 0
    if longest > MOST_TOKENS or (total := int(lengths.sum())) > MOST_TOKENS:
        found = f"a node of {longest}" if longest > MOST_TOKENS else total
        raise ValueError(f"node_lengths must be at most {MOST_TOKENS} tokens in all, got {found}")
    bad, leaves, roots, levels, arrays = (_derived if _ext.CPU_BUILT else _plainly_derived)(up, lengths)
    if bad >= 0:
        _refuse_parent(up, bad)
    leaf = (arrays["child_begin"].diff() == 0).nonzero().squeeze(1)
    order = torch.empty(leaves, dtype=torch.int32, device="cpu")
    order[arrays["leaf_begin"][leaf].long()] = torch.arange(leaves, dtype=torch.int32, device="cpu")
    nodes = Nodes(
        order=order,
        leaves=leaf,
        node_offsets=offsets_of(lengths),
        token_node=torch.repeat_interleave(torch.arange(m, device="cpu"), lengths, output_size=total),
        **arrays,
    )
    return Nodes(*(x.to(device) for x in nodes)), roots, levels


_INT32 = ("parent", "child_begin", "child", "leaf_begin", "leaf_end", "tree_begin", "root", "depth")
_INT64 = ("position", "previous")


def _derived(parent: Tensor, lengths: Tensor) -> tuple[int, int, int, int, dict[str, Tensor]]:  # [M], [M]
    """The first illegal parent or -1, the numbers of leaves, roots and levels, and what the nodes imply by name."""
    m = parent.shape[0]
    arrays = {name: torch.empty(m + (name == "child_begin"), dtype=torch.int32, device="cpu") for name in _INT32}
    arrays |= {name: torch.empty(m, dtype=torch.int64, device="cpu") for name in _INT64}
    pointers = [x.data_ptr() for x in arrays.values()]
    bad, leaves, roots, levels = _ext.cpu().tree_derive(parent.data_ptr(), lengths.data_ptr(), m, pointers)
    arrays["child"] = arrays["child"][: m - roots].clone()
    arrays["tree_begin"] = arrays["tree_begin"][:leaves].clone()
    return bad, leaves, roots, levels, arrays


def _plainly_derived(parent: Tensor, lengths: Tensor) -> tuple[int, int, int, int, dict[str, Tensor]]:  # [M], [M]
    """As :func:`_derived`, without the native module."""
    bad, leaves, roots, levels, arrays = _plain.derive(parent.tolist(), lengths.tolist())
    dtypes = [torch.int32] * len(_INT32) + [torch.int64] * len(_INT64)
    named = zip((*_INT32, *_INT64), arrays, dtypes, strict=False)  # there are none with an illegal parent
    return bad, leaves, roots, levels, {name: torch.tensor(x, dtype=dtype, device="cpu") for name, x, dtype in named}


def along_paths(
    parent: Tensor,  # [M]
    offsets: Tensor,  # [M+1]
    leaves: Tensor,  # [L]
    bounds: Tensor,  # [L+1]
) -> Tensor:
    """What each leaf's path passes from its root down, of which node n has ``offsets[n]:offsets[n+1]``; int64.

    Found on the host, whatever the device.
    """
    up, first, ends, places = (resolved(x).cpu().long().contiguous() for x in (parent, offsets, leaves, bounds))
    if not _ext.CPU_BUILT:
        return _plain.along_paths(up.tolist(), first.tolist(), ends.tolist()).to(parent.device)
    index = torch.empty(int(places[-1]), dtype=torch.int64, device="cpu")
    arrays = up.data_ptr(), first.data_ptr(), ends.data_ptr()
    _ext.cpu().tree_flat(*arrays, ends.shape[0], places.data_ptr(), index.data_ptr())
    return index.to(parent.device)


def attention_segments(nodes: Nodes, lengths: Tensor) -> Segments:
    """See :attr:`trajkern.Tree.attention_segments`."""
    some = (lengths > 0).nonzero().squeeze(1)
    own = lengths.long()[some]
    path = nodes.position[some] + own
    bounds_q, bounds_k = offsets_of(own), offsets_of(path)
    check_tokens("attention_segments, whose keys repeat what lies above each node,", int(bounds_k[-1]))
    keys = along_paths(nodes.parent, nodes.node_offsets, some, bounds_k)
    longest = (int(x.max()) if x.numel() else 0 for x in (own, path))
    return Segments(keys, bounds_q.int(), bounds_k.int(), *longest)


def _refuse_parent(parent: Tensor, node: int) -> None:
    above, count = int(parent[node]), parent.shape[0]
    if not -1 <= above < count:
        raise ValueError(f"parent must lie in [-1, {count}); node {node}'s is {above}")
    path, seen = [node], {node}
    while 0 <= above < count and above not in seen:
        path.append(above)
        seen.add(above)
        above = int(parent[above])
    if above in seen:
        cycle = path[path.index(above) :] + [above]
        shown = cycle if len(cycle) <= 9 else [*cycle[:4], "...", *cycle[-4:]]
        raise ValueError(f"parent must lead every node to a root; it has the cycle {' -> '.join(map(str, shown))}")
    raise ValueError(f"parent must come before its child; node {node}'s is {int(parent[node])}")
