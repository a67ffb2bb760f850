"""A HuggingFace causal language model on a packed batch or a packed tree, with the fused head.

``log_probs(model, batch)`` is what a trainer's forward and log-softmax give, without a sequence's logits ever whole
in memory, and only for the tokens that are scored. :func:`hidden_states` and :func:`head_arguments` are its two halves,
for the ops that take the head itself::

    hidden = hidden_states(model, batch)
    rows, targets, tokens, cu_seqlens = batch.head_inputs()
    loss, metrics = tk.linear_policy_loss(hidden, targets=targets, rows=rows, **head_arguments(model), ...)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trajkern import PackedBatch, TokenStats, Tree, linear_token_stats
from trajkern._checks import check_shape, check_tensor, readable

Layout = PackedBatch | Tree
_VARLEN = "flash_attention"  # what the names of attention implementations over cu_seqlens begin with
_MASKED = ("eager", "sdpa", "flex_attention")  # those that take a mask of who sees whom


class Head(NamedTuple):
    """How a model turns hidden states into logits: softcap(logit_scale (h w^T + bias))."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float


def log_probs(
    model: nn.Module,
    layout: Layout,
    tokens: Tensor | None = None,  # [T]
    loss_mask: Tensor | None = None,  # [T]
    **head: Any,
) -> Tensor:
    """The log-prob of every scored token, 0 elsewhere; float32 ``[T]``, differentiable in all of the model.

    Args:
        model: a causal language model of transformers, also inside PEFT's or a parallel wrapper. Whatever attention it
            has is used: implementations over cu_seqlens get a batch as it is packed; the others get padded rows, or for
            a tree position ids and a mask of who sees whom, with a sliding window where the model has one.
        layout: a batch, or a tree of rollouts with each shared prefix once.
        tokens, loss_mask: of a tree's tokens; int64 or int32 ``[T]``, and bool ``[T]``, by default every token that has
            one before it. A batch has its own.
        head: more of :func:`trajkern.linear_logprobs`' arguments, such as ``temperature`` or ``process_group``.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; among them token ids that the model
            does not have (on the CPU), and an attention that cannot run a tree.
    """
    return token_stats(model, layout, tokens, loss_mask, outputs=(), **head).logprobs


def token_stats(
    model: nn.Module,
    layout: Layout,
    tokens: Tensor | None = None,  # [T]
    loss_mask: Tensor | None = None,  # [T]
    *,
    outputs: tuple[str, ...] = ("entropy",),
    **head: Any,
) -> TokenStats:
    """:func:`log_probs` with :func:`trajkern.linear_token_stats`' other statistics, ``[T]``, 0 where not scored."""
    tokens, loss_mask = _tokens(layout, tokens, loss_mask)
    pairs = layout.pairs(tokens, loss_mask) if isinstance(layout, Tree) else layout.head_inputs()
    arguments: dict[str, Any] = {**head_arguments(model), **head, "rows": pairs.rows, "outputs": outputs}
    hidden, weight = _common(hidden_states(model, layout, tokens), arguments.pop("weight"))
    stats = linear_token_stats(hidden, weight, pairs.targets, **arguments)

    def spread(x: Tensor) -> Tensor:  # [P] -> [T]
        return x.new_zeros(layout.num_tokens).index_copy(0, pairs.tokens, x)

    return TokenStats(spread(stats.logprobs), *(None if x is None else spread(x) for x in stats[1:]))


def hidden_states(
    model: nn.Module,
    layout: Layout,
    tokens: Tensor | None = None,  # [T]
) -> Tensor:
    """The last hidden state of every token, ``[T, H]``: what the head is applied to. Arguments as in `log_probs`."""
    tokens, _ = _tokens(layout, tokens, None)
    inner = causal_model(model)
    count = inner.get_input_embeddings().num_embeddings
    if readable(tokens) and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < count:
        at = int(((tokens < 0) | (tokens >= count)).nonzero()[0, 0])
        raise ValueError(
            f"tokens must lie in [0, {count}), the model's vocabulary; token {at} is {int(tokens[at])}: "
            "were they made by this model's tokenizer?"
        )
    if not tokens.numel():
        return inner.get_output_embeddings().weight.new_zeros(0, inner.get_output_embeddings().weight.shape[1])
    attention = inner.config._attn_implementation
    if isinstance(layout, Tree):
        return _run(inner, tokens, layout.positions, attention_mask=_tree_mask(inner, layout, attention))[0]
    if attention.startswith(_VARLEN):
        bounds, longest = layout.cu_seqlens.int(), layout.max_length
        spans = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
        return _run(inner, tokens, _positions(layout), **spans)[0]
    return _padded(inner, layout)


def head_arguments(model: nn.Module) -> dict[str, Any]:
    """The model's :class:`Head` by the names of :func:`trajkern.linear_logprobs`' arguments."""
    inner = causal_model(model)
    layer, config = inner.get_output_embeddings(), inner.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= 1.0 if (value := getattr(config, name, None)) is None else value
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        scale /= divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(_weight(layer), getattr(layer, "bias", None), softcap, scale)._asdict()


def causal_model(model: nn.Module) -> Any:
    """The causal language model inside PEFT's, DistributedDataParallel's and the like."""
    inner: Any = model
    while not hasattr(inner, "get_output_embeddings") or hasattr(inner, "peft_config"):
        if any(config.is_prompt_learning for config in getattr(inner, "peft_config", {}).values()):
            raise ValueError("model must have no learned prompt, which a packed batch has no place for")
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
            break
        if not hasattr(inner, "module"):
            raise TypeError(f"model must be a causal language model of transformers, got {type(model).__name__}")
        inner = inner.module
    if inner.get_output_embeddings() is None:
        raise TypeError(f"model must have a language-model head; {type(inner).__name__} has none")
    return inner


def _tokens(layout: Layout, tokens: Tensor | None, loss_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if isinstance(layout, PackedBatch):
        if tokens is not None and tokens is not layout.tokens or loss_mask is not None:
            raise ValueError("tokens and loss_mask must be None for a PackedBatch, which has its own")
        return layout.tokens, layout.loss_mask
    if not isinstance(layout, Tree):
        raise TypeError(f"layout must be a PackedBatch or a Tree, got {type(layout).__name__}")
    if tokens is None:
        raise ValueError("tokens must be given for a Tree, which has none")
    check_tensor("tokens", tokens, dtypes=(torch.int64, torch.int32), device=layout.device)
    check_shape("tokens", tokens, (layout.num_tokens,), "one id a token of the tree")
    return tokens, loss_mask


def _positions(batch: PackedBatch) -> Tensor:  # [T]
    begin = torch.repeat_interleave(batch.cu_seqlens[:-1].long(), batch.lengths, output_size=batch.num_tokens)
    return torch.arange(batch.num_tokens, device=batch.device) - begin


def _run(inner: Any, tokens: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """The backbone on rows of tokens, or on one row; ``[rows, length, H]``."""
    tokens, positions = (x if x.ndim == 2 else x[None] for x in (tokens, positions))
    return inner.base_model(input_ids=tokens, position_ids=positions, use_cache=False, **options).last_hidden_state


def _padded(inner: Any, batch: PackedBatch) -> Tensor:
    """A row for each trajectory; the attention's own causal mask is faster than one of ours."""
    tokens, positions = (batch.to_padded(x) for x in (batch.tokens, _positions(batch)))
    # a trajectory without tokens gets one that nobody reads: attention over nothing is NaN
    real = torch.arange(batch.max_length, device=batch.device) < batch.lengths.clamp_min(1)[:, None]
    hidden = _run(inner, tokens, positions, attention_mask=real.long())
    return hidden.flatten(0, 1)[batch.padded_index(batch.max_length)]


def _tree_mask(inner: Any, tree: Tree, attention: str) -> Any:
    """Who sees whom, for each kind of the model's layers."""
    if attention not in _MASKED:
        raise ValueError(
            f"model must have one of the attentions {', '.join(_MASKED)} to run a Tree, got {attention!r}; "
            "load it with attn_implementation="
        )
    config = inner.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"model must attend fully or through a window to run a Tree; it has {sorted(unknown)} layers")
    if attention == "flex_attention" and kinds == {"full_attention"}:
        return tree.attention_mask(dense=False)
    visible = tree.attention_mask(dense=True)
    least = torch.finfo(inner.dtype).min
    masks = {kind: torch.zeros(visible.shape, dtype=inner.dtype, device=tree.device) for kind in kinds}
    for kind, mask in masks.items():
        near = tree.positions[:, None] - tree.positions < window if kind == "sliding_attention" and window else True
        mask.masked_fill_(~(visible & near), least)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _weight(layer: Any) -> Tensor:
    """The head's weight, with what LoRA adds where it adapts the head itself."""
    if not hasattr(layer, "get_delta_weight"):
        return layer.weight
    weight = layer.get_base_layer().weight
    return weight if layer.disable_adapters else weight + sum(map(layer.get_delta_weight, layer.active_adapters))


def _common(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the product that the model's own head would compute."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return hidden.to(dtype), weight.to(dtype)
