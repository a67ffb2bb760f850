"""Trees through transformers' flash attention: a variable-length call whose sequences are the tree's segments.

Each segment's queries see the keys of its path, gathered, up to their own: causal, the ends of both aligned. No mask is
made, and sliding windows and capped logits are the host's own. Memory grows with the paths' keys, not with T².
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from trajkern import Tree

_NAMES = "flash_attention"  # what transformers' names of it begin with; kernels of its hub have others


def over_boundaries(attention: str) -> bool:
    """Whether an attention implementation of transformers is its flash attention, by whatever kernel."""
    if attention.startswith(_NAMES):
        return True
    own = _known().get(attention)
    own = getattr(own, "of_host", own)
    host = importlib.import_module("transformers.integrations.flash_attention").flash_attention_forward
    return own is not None and getattr(own, "func", own) is host  # some are partial


def check_segments(model: Any) -> None:
    """ValueError for a model that calls flash attention by itself, and for one whose causal mask aligns beginnings."""
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            "model must call its attention through transformers' AttentionInterface to run a Tree by flash attention; "
            f"{type(model).__name__} does not say so (_supports_attention_backend); load it with another attention"
        )
    utils = importlib.import_module("transformers.modeling_flash_attention_utils")
    if utils.flash_attn_supports_top_left_mask():
        raise ValueError(
            "flash-attn must be at least 2.1 to run a Tree: before, its causal mask aligned the beginnings of queries "
            "and keys, not their ends"
        )


def see_paths(attention: str, tree: Tree) -> dict[str, Any]:
    """Arguments of a model's forward by which each token attends to its own path."""
    own = _known()[attention]
    if not hasattr(own, "of_host"):
        # it stays: what checkpointing computes again in a backward must find it, too
        type(_known()).register(attention, _gathering(own))
    segments = tree.attention_segments
    return {
        "tree_keys": segments.keys,
        "cu_seq_lens_q": segments.cu_seqlens_q,
        "cu_seq_lens_k": segments.cu_seqlens_k,
        "max_length_q": segments.max_seqlen_q,
        "max_length_k": segments.max_seqlen_k,
    }


def _known() -> Any:
    return importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS


def _gathering(own: Callable[..., Any]) -> Callable[..., Any]:
    """The host's attention, which gathers keys and values where ``tree_keys`` ``[K]`` says so, and is itself else."""

    @functools.wraps(own)
    def attention(
        module: Any,
        query: Tensor,  # [1, heads, T, D]
        key: Tensor,  # [1, key heads, T, D]
        value: Tensor,
        attention_mask: Any,
        *arguments: Any,
        tree_keys: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if tree_keys is not None:
            key, value = key.index_select(2, tree_keys), value.index_select(2, tree_keys)
        return own(module, query, key, value, attention_mask, *arguments, **options)

    vars(attention)["of_host"] = own
    return attention
