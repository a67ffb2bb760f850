"""ART (OpenPipe): its packed rows, of shared prompts and completions by group and parent ids, as trees of rollouts::

    from trajkern.integrations import art

    rollouts = art.tree_rollouts(packed, row)      # packed: what ART's packer makes, or a batch of it

A row of ART holds prompts and completions end to end. A token sees those before it that have its group id or its parent
id; a prompt is its own parent. So a completion goes on from its prompt, and :class:`trajkern.Tree` has both as nodes in
the row's order, so that the row's per-token tensors are the tree's. Read at ART 0.5.18 (``preprocessing/pack.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import trajkern as tk
from trajkern._checks import check_count, check_shape, check_tensor, describe, renamed
from trajkern._dtypes import FLOATS
from trajkern._values import check_finite, check_values
from trajkern.integrations._host_tree import TreeRollouts
from trajkern.integrations._outside import is_list

__all__ = ["TreeRollouts", "tree_rollouts"]
_IDS = ("tokens", "group_ids", "parent_ids")
_VALUES = ("logprobs", "advantages", "weights")
_INTEGER = (torch.int64, torch.int32)
_PADDING = -1  # of both ids


def tree_rollouts(packed: Mapping[str, Any], row: int) -> TreeRollouts:
    """One row of ART's packed tensors as the tree of its rollouts.

    Leaf n is the row's n-th completion, behind its prompt, at the positions that it has alone. The tree's tokens are
    the row's without its padding. ``advantages`` are ART's times its weights, by which ART multiplies a token's loss.
    What ART keeps whole, because its group shares nothing, is a root.

    Args:
        packed: ART's ``PackedTensors``: ``tokens``, ``group_ids`` and ``parent_ids`` int ``[rows, S]``,
            ``assistant_mask`` bool, ``logprobs``, ``advantages`` and ``weights`` float, and ``pixel_values`` or none.
        row: which row.

    Raises:
        TypeError, ValueError: by its name, what ART never makes, or what is no tree: images; ids that are not those of
            prompts and their completions, also of prompts that have a parent themselves, which ART's mask does not
            show; a token of a prompt of several completions that learns, which ART counts once; a first token that
            learns, which ART scores by what stands before it in the row; a negative weight; a token that learns
            without a log-prob, for which ART takes the policy's own: put those there.
    """
    if not isinstance(packed, Mapping):
        raise TypeError(f"packed must be a mapping, as ART's packed tensors are; got {describe(packed)}")
    row = check_count("row", row, low=0)
    images = packed.get("pixel_values")
    if images is not None and (not is_list(images) or len(images) <= row or images[row] is not None):
        raise ValueError("pixel_values must be None: equal tokens of images are not equal inputs, which a tree shares")
    dtypes = dict.fromkeys(_IDS, _INTEGER) | dict.fromkeys(_VALUES, FLOATS) | {"assistant_mask": (torch.bool,)}
    fields = {name: _row(packed, name, row, legal) for name, legal in dtypes.items()}
    real = _real(fields["group_ids"], fields["parent_ids"])
    fields = {name: x[:real] for name, x in fields.items()}
    own, above = fields["group_ids"], fields["parent_ids"]
    tree = tk.Tree.from_segments(own, torch.where(torch.isin(above, own), above, own))
    _check(tree, fields)
    flat = tree.flat_index
    mask = fields["assistant_mask"]
    advantages = torch.where(mask, fields["advantages"] * fields["weights"], 0)
    with renamed({"old_logprobs": "logprobs"}):
        old = fields["logprobs"][flat]
        batch = tk.PackedBatch(
            fields["tokens"][flat], tree.flat_cu_seqlens, mask[flat], tree.leaf_root, old_logprobs=old
        )
    return TreeRollouts(tree, batch, fields["tokens"], advantages[flat])


def _row(packed: Mapping[str, Any], name: str, row: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if name not in packed:
        raise ValueError(f"packed must have {name}, as ART's packed tensors do; it has {', '.join(packed)}")
    check_tensor(name, packed[name], dtypes=dtypes, ndim=2)
    check_tensor(name, packed[name], device=packed["tokens"].device)
    if row >= packed["tokens"].shape[0]:
        raise ValueError(f"row must lie in [0, {packed['tokens'].shape[0]}), the rows of tokens; got {row}")
    check_shape(name, packed[name], tuple(packed["tokens"].shape), "the shape of tokens")
    return packed[name][row]


def _real(own: Tensor, above: Tensor) -> int:
    """How many tokens stand before the padding."""
    padded = (own == _PADDING) & (above == _PADDING)
    real = int((~padded).sum())
    if bool(padded[:real].any()):
        at = int(padded.nonzero()[0, 0])
        raise ValueError(f"group_ids must be {_PADDING} behind the last token only, where ART pads; it is at {at}")
    return real


def _check(tree: tk.Tree, fields: dict[str, Tensor]) -> None:
    if tree.levels > 2:
        at = int((tree.depth[tree.token_node] > 1).nonzero()[0, 0])
        raise ValueError(
            "parent_ids must name prompts, which are their own parents: ART's mask shows a token its own group and its "
            f"parent's, and no further up; token {at}'s parent has another"
        )
    mask, token = fields["assistant_mask"], torch.arange(tree.num_tokens, device=tree.device)
    shared = mask & (tree.leaf_count[tree.token_node] > 1)
    moved = mask & ((tree.rows != token - 1) | (tree.rows < 0))
    for wrong, why in (
        (shared, "a prompt of several completions, which ART counts once and not for each"),
        (moved, "a segment's first token that ART does not score, or by another rollout's token, before it in the row"),
    ):
        if bool(wrong.any()):
            raise ValueError(f"assistant_mask must be False on {why}; it is True at {int(wrong.nonzero()[0, 0])}")
    if bool((bad := mask & fields["logprobs"].isnan()).any()):
        raise ValueError(
            "logprobs must be numbers where assistant_mask is True, for which ART takes the policy's own: put them "
            f"there; it is NaN at {int(bad.nonzero()[0, 0])}"
        )
    check_finite("advantages", fields["advantages"], mask)
    check_values("weights", fields["weights"], 0, mask)
