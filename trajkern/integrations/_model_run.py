"""A causal language model of transformers on a layout, up to what its head is applied to."""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trajkern import PackedBatch, Tree
from trajkern.integrations._tree_attention import check_segments, over_boundaries, see_paths

Layout = PackedBatch | Tree
_MASKED = ("eager", "sdpa", "flex_attention")  # those that take a mask of who sees whom
# but for the last, of the window that a tree's mask has; the last is of no attention
_UNDERSTOOD = ("sliding_window", "use_sliding_window", "max_window_layers", "mamba_chunk_size")
_LISTS = ("layer_types", "layers_block_type", "block_types")  # what configs call the kinds of their layers
_RECURRENT = {"linear_attention", "mamba", "hybrid", "recurrent", "conv"}
_CARRIED = ", which would carry the state of one branch into another"
_REACHES = re.compile(r"window|local_att|chunk|block_size|landmark")  # what configs call an attention's limited reach


def layout_kind(inner: Any, layout: Layout) -> str:
    """How ``layout`` runs on this model: "tree", "pack" over cu_seqlens, or "rows", padded."""
    if isinstance(layout, Tree):
        return "tree"
    return "pack" if over_boundaries(attention_of(inner)) else "rows"


def attention_of(inner: Any) -> str:
    """The name of the model's attention implementation."""
    configs = inner.config.get_text_config(), inner.config  # those of images and sounds have others beside the text's
    return next((name for x in configs if (name := getattr(x, "_attn_implementation", None))), "eager")


class Route(NamedTuple):
    """How a model runs on a layout up to its head."""

    from_head: bool  # what it hands to its head layer is read, and kept from being multiplied; else its backbone runs
    positions: bool = True  # it is given position ids; else it makes its own, which a padded row leaves right


def run_layout(inner: Any, call: Any, layout: Layout, tokens: Tensor, route: Route) -> Tensor:
    """What the head is applied to for every token, ``[T, H]``; ``call`` runs all of ``inner``."""
    _check_lengths(inner, layout)
    if isinstance(layout, Tree):
        return run_model(inner, call, route, tokens, layout.positions, **_tree_options(inner, layout))[0]
    if layout_kind(inner, layout) == "rows":
        _check_padding(inner, layout)
        return _padded(inner, call, layout, route)
    bounds, longest = layout.cu_seqlens.int(), layout.max_length
    spans = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return run_model(inner, call, route, tokens, _positions(layout), **spans)[0]


def _check_lengths(inner: Any, layout: Layout) -> None:
    """Refuses sequences of which the longest would change the others' rotary frequencies."""
    for kind, limit in _by_the_longest(inner.config.get_text_config()):
        bounds = layout.flat_cu_seqlens if isinstance(layout, Tree) else layout.cu_seqlens
        lengths = bounds.diff()
        if not lengths.numel():
            continue
        longest, shortest = int(lengths.max()), int(lengths.masked_fill(lengths == 0, lengths.max()).min())
        if longest > limit and (shortest <= limit or (kind == "dynamic" and shortest < longest)):
            raise ValueError(
                f"layout must have sequences of one length beyond {limit} tokens, or longer and shorter ones apart, "
                f"for a model of rope_type {kind!r}, in which the longest of a call sets the frequencies of all; "
                f"got lengths from {shortest} to {longest}"
            )


def _check_padding(inner: Any, batch: PackedBatch) -> None:
    """Refuses rows whose padding sees no token: eager attention rounds a float64 mask to float32's -inf, hence NaN."""
    config = inner.config.get_text_config()
    window, others = getattr(config, "sliding_window", None), _limits(config)
    if not (window or others) or attention_of(inner) != "eager" or inner.dtype is not torch.float64 or not len(batch):
        return
    shortest, longest = int(batch.lengths.min()), batch.max_length
    blind = [f"sliding_window={window}"] if window and longest - shortest >= window else []
    blind += [f"{name}={reach}" for name, reach in others.items() if shortest < longest > reach]
    if blind:
        raise ValueError(
            f"layout must have sequences of one length for a float64 model whose eager attention ends at {blind[0]}, "
            f"where padding sees no token and is NaN; got lengths from {shortest} to {longest}: load the model with "
            "attn_implementation='sdpa'"
        )


def _by_the_longest(config: Any) -> list[tuple[str, int]]:
    """The kinds of rotary frequencies that follow a call's longest sequence, each with the length where that begins."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    of_layers = [x for x in rope.values() if isinstance(x, dict)] or [rope]
    found = []
    for options in of_layers:
        kind = options.get("rope_type", options.get("type"))
        if kind == "dynamic":
            found.append((kind, config.max_position_embeddings))
        elif kind == "longrope":
            given = options.get("original_max_position_embeddings")
            found.append(
                (kind, given or getattr(config, "original_max_position_embeddings", config.max_position_embeddings))
            )
    return found


def accepted(forward: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that ``forward`` takes."""
    taken = inspect.signature(forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        return options
    return {name: value for name, value in options.items() if name in taken}


def first(output: Any, name: str) -> Any:
    """The field ``name`` of a model's output, or the first of what came without names."""
    found = getattr(output, name, None)
    return output[0] if found is None and isinstance(output, tuple) else found


def _positions(batch: PackedBatch) -> Tensor:  # [T]
    begin = torch.repeat_interleave(batch.cu_seqlens[:-1].long(), batch.lengths, output_size=batch.num_tokens)
    return torch.arange(batch.num_tokens, device=batch.device) - begin


def run_model(inner: Any, call: Any, route: Route, tokens: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """The model on rows of tokens, or on one row; ``[rows, length, H]``."""
    tokens, positions = (x if x.ndim == 2 else x[None] for x in (tokens, positions))
    options |= {"use_cache": False} | ({"position_ids": positions} if route.positions else {})
    if route.from_head:
        return _head_input(inner, call, tokens, options)
    backbone = inner.base_model
    return first(backbone(input_ids=tokens, **accepted(backbone.forward, options)), "last_hidden_state")


def _head_input(inner: Any, call: Any, tokens: Tensor, options: dict[str, Any]) -> Tensor:
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0].detach()[..., :0, :], *inputs[1:])  # no rows: the head's product costs nothing

    handle = inner.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        call(input_ids=tokens, **accepted(inner.forward, options))
    finally:
        handle.remove()
    return seen[0].reshape(*tokens.shape, -1)


def _padded(inner: Any, call: Any, batch: PackedBatch, route: Route) -> Tensor:
    """A row for each trajectory; the attention's own causal mask is faster than one of ours."""
    tokens, positions = (batch.to_padded(x) for x in (batch.tokens, _positions(batch)))
    # a trajectory without tokens gets one that nobody reads: attention over nothing is NaN
    real = torch.arange(batch.max_length, device=batch.device) < batch.lengths.clamp_min(1)[:, None]
    hidden = run_model(inner, call, route, tokens, positions, attention_mask=real.long())
    return hidden.flatten(0, 1)[batch.padded_index(batch.max_length)]


def check_tree(inner: Any) -> None:
    """Refuses a model that cannot show a token its own path alone, by what its config says."""
    attention = attention_of(inner)
    if over_boundaries(attention):
        check_segments(inner)
    elif attention not in _MASKED:
        raise ValueError(
            f"model must have one of the attentions {', '.join(_MASKED)}, or flash attention, to run a Tree, got "
            f"{attention!r}; load it with attn_implementation="
        )
    config = inner.config.get_text_config()
    if unknown := _layer_kinds(config) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"model must attend fully or through a window to run a Tree; it has {sorted(unknown)} layers"
            + _CARRIED * bool(unknown & _RECURRENT)
        )
    if getattr(inner, "_is_stateful", False):
        raise ValueError(
            f"model must attend fully or through a window to run a Tree; {type(inner).__name__} is recurrent" + _CARRIED
        )
    if limits := _limits(config):
        found = ", ".join(f"{name}={value}" for name, value in limits.items())
        raise ValueError(
            f"model must limit its attention by sliding_window alone to run a Tree; its config has {found}"
        )


def _layer_kinds(config: Any) -> set[str]:
    window = getattr(config, "sliding_window", None)
    named = next((x for name in _LISTS if (x := getattr(config, name, None))), None)
    if named is None:
        return {"sliding_attention" if window else "full_attention"}
    return {"full_attention" if kind == "attention" else kind for kind in named}


def _tree_options(inner: Any, tree: Tree) -> dict[str, Any]:
    """What shows each token its own path, by whatever attention the model has."""
    check_tree(inner)
    attention = attention_of(inner)
    if over_boundaries(attention):
        return see_paths(attention, tree)
    return {"attention_mask": _tree_mask(inner, tree)}


def _tree_mask(inner: Any, tree: Tree) -> Any:
    """Who sees whom, for each kind of the model's layers."""
    config, attention = inner.config.get_text_config(), attention_of(inner)
    kinds, window = _layer_kinds(config), getattr(config, "sliding_window", None)
    if attention == "flex_attention" and kinds == {"full_attention"}:
        return tree.attention_mask(dense=False)
    visible = tree.attention_mask(dense=True)
    least = torch.finfo(inner.dtype).min
    masks = {kind: torch.zeros(visible.shape, dtype=inner.dtype, device=tree.device) for kind in kinds}
    for kind, mask in masks.items():
        near = tree.positions[:, None] - tree.positions < window if kind == "sliding_attention" and window else True
        mask.masked_fill_(~(visible & near), least)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _limits(config: Any) -> dict[str, int]:
    """What the config has for an attention of limited reach, beside the window that a tree's mask has."""
    return {
        name: value
        for name, value in vars(config).items()
        if _REACHES.search(name)
        and name not in _UNDERSTOOD
        and "pattern" not in name
        and isinstance(value, int)
        and value > 1
    }
