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
from trajkern._checks import check_flag, check_shape, check_tensor, readable
from trajkern.integrations._adapted_head import embedding_count
from trajkern.integrations._model_head import Trial, measured_form, measured_route, named_form
from trajkern.integrations._model_run import Layout, Route, check_tree, layout_kind
from trajkern.integrations._own_forward import Parts, some_tokens
from trajkern.integrations._wrapped import autocasted, not_compiled, unwrapped

_AT_THE_CALL = ("POLY", "SHADOW", "XLORA")  # peft's tuners that pass something from a user's call to their layers


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
    *,
    check: bool = True,
    **head: Any,
) -> Tensor:
    """The log-prob of every scored token, 0 elsewhere; float32 ``[T]``, differentiable in all of the model.

    Args:
        model: a causal language model of transformers, also inside PEFT's or a parallel wrapper. Whatever attention it
            has is used: flash attention gets a batch over cu_seqlens as it is packed, and a tree as segments with the
            keys of their paths; the others get padded rows, or for a tree position ids and a mask of who sees whom,
            with a sliding window where the model has one.
        layout: a batch, or a tree of rollouts with each shared prefix once.
        tokens, loss_mask: of a tree's tokens; int64 or int32 ``[T]``, and bool ``[T]``, by default every token that has
            one before it. A batch has its own.
        check: whether the model runs a few tokens, once for a state of it (its head, dtype, adapters, attention), so
            that its scale and its cap are measured and its own logits confirm the head and the layout; else the names
            in its config are believed.
        head: more of :func:`trajkern.linear_logprobs`' arguments, such as ``temperature`` or ``process_group``.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it was; among them token ids that the model
            does not have (on the CPU), an attention that cannot run a tree, and a model whose own logits are others,
            with both values and what its config has that could say why.
    """
    return token_stats(model, layout, tokens, loss_mask, outputs=(), check=check, **head).logprobs


def token_stats(
    model: nn.Module,
    layout: Layout,
    tokens: Tensor | None = None,  # [T]
    loss_mask: Tensor | None = None,  # [T]
    *,
    outputs: tuple[str, ...] = ("entropy",),
    check: bool = True,
    **head: Any,
) -> TokenStats:
    """:func:`log_probs` with :func:`trajkern.linear_token_stats`' other statistics, ``[T]``, 0 where not scored."""
    tokens, loss_mask = _tokens(layout, tokens, loss_mask)
    if theirs := sorted({"hidden", "rows", "targets"} & head.keys()):
        raise TypeError(f"{theirs[0]} must not be given: the model and the layout say which they are")
    pairs = layout.pairs(tokens, loss_mask) if isinstance(layout, Tree) else layout.head_inputs()
    hidden = hidden_states(model, layout, tokens, check=check)
    arguments: dict[str, Any] = {**head_arguments(model, check=check), **head, "rows": pairs.rows, "outputs": outputs}
    hidden, weight, bias = _common(hidden, arguments.pop("weight"), arguments.pop("bias"))
    stats = linear_token_stats(hidden, weight, pairs.targets, bias=bias, **arguments)

    def spread(x: Tensor) -> Tensor:  # [P] -> [T]
        return x.new_zeros(layout.num_tokens).index_copy(0, pairs.tokens, x)

    return TokenStats(spread(stats.logprobs), *(None if x is None else spread(x) for x in stats[1:]))


def hidden_states(
    model: nn.Module,
    layout: Layout,
    tokens: Tensor | None = None,  # [T]
    *,
    check: bool = True,
) -> Tensor:
    """The last hidden state of every token, ``[T, H]``: what the head is applied to. Arguments as in `log_probs`."""
    check = check_flag("check", check)
    tokens, _ = _tokens(layout, tokens, None)
    parts = _parts(model)
    inner = parts.causal
    count = embedding_count(inner)
    if count and readable(tokens) and tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < count:
        at = int(((tokens < 0) | (tokens >= count)).nonzero()[0, 0])
        raise ValueError(
            f"tokens must lie in [0, {count}), the model's vocabulary; token {at} is {int(tokens[at])}: "
            "were they made by this model's tokenizer?"
        )
    _check_placeholders(inner, tokens)
    route = _route(parts, layout_kind(inner, layout)) if check else Route(named_form(inner).from_head)
    states = parts.states(layout, tokens, route)
    autocast = measured_form(parts).autocast if check else None
    return states if autocast is None else states.to(autocast)


def _check_placeholders(inner: Any, tokens: Tensor) -> None:
    """Refuses tokens that stand for an image or a sound, without which a model would run all the same."""
    names = [f"{kind}_token_{what}" for kind in ("image", "video", "audio") for what in ("id", "index")]
    ids = {name: x for name in names if isinstance(x := getattr(inner.config, name, None), int)}
    for name, token in ids.items() if readable(tokens) else ():
        if (tokens == token).any():
            raise ValueError(
                f"tokens must stand for text alone, as a layout has no place for images or sounds; token "
                f"{int((tokens == token).nonzero()[0, 0])} is {token}, the {name} of {type(inner).__name__}"
            )


def head_arguments(model: nn.Module, *, check: bool = True) -> dict[str, Any]:
    """The model's :class:`Head` by :func:`trajkern.linear_logprobs`' names; ``check`` as in :func:`log_probs`."""
    check = check_flag("check", check)
    parts = _parts(model)
    form = measured_form(parts) if check else named_form(parts.causal)
    weight, bias = parts.head_tensors()
    if form.vocabulary is not None:
        weight, bias = weight[: form.vocabulary], None if bias is None else bias[: form.vocabulary]
    if form.autocast is not None:
        weight, bias = weight.to(form.autocast), None if bias is None else bias.to(form.autocast)
    return Head(weight, bias, form.softcap, form.logit_scale)._asdict()


def causal_model(model: nn.Module) -> Any:
    """The causal language model inside PEFT's, DistributedDataParallel's and the like."""
    inner: Any = _called(model)
    _check_adapters(inner)
    while not hasattr(type(inner), "get_output_embeddings"):
        inner = unwrapped(inner.get_base_model() if hasattr(inner, "get_base_model") else inner.base_model.model)
    if inner.get_output_embeddings() is None:
        raise TypeError(f"model must have a language-model head; {type(inner).__name__} has none")
    return inner


def _called(model: nn.Module) -> Any:
    """What a user calls inside of parallel wrappers: PEFT's model, or the causal model."""
    owner: Any = unwrapped(model)
    while not (hasattr(type(owner), "get_output_embeddings") or hasattr(owner, "peft_config")):
        if not hasattr(owner, "module"):
            raise TypeError(f"model must be a causal language model of transformers, got {type(model).__name__}")
        owner = unwrapped(owner.module)
    return owner


def _parts(model: nn.Module) -> Parts:
    return Parts(not_compiled(model), _called(model), causal_model(model))


def _check_adapters(owner: Any) -> None:
    """Refuses adapters that act between a user's call and the causal model's."""
    configs = getattr(owner, "peft_config", None) or {}
    active = getattr(owner, "active_adapter", None)  # a method of transformers' models, which have no such adapters
    names = [active] if isinstance(active, str) else active if isinstance(active, list) else list(configs)
    for config in () if getattr(owner, "_adapters_disabled", False) else (configs[x] for x in names if x in configs):
        if config.is_prompt_learning:
            raise ValueError("model must have no learned prompt, which a packed batch has no place for")
        if (kind := str(getattr(config.peft_type, "value", config.peft_type))) in _AT_THE_CALL:
            raise ValueError(f"model must have no adapter that wants more than hidden states where it acts, got {kind}")
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                "model must have no alora_invocation_tokens: where a LoRA begins to act is not the head's to know"
            )


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


def _route(parts: Parts, kind: str) -> Route:
    """How layouts of this kind run, found on one of two small sequences."""
    if kind == "tree":
        check_tree(parts.causal)
    return measured_route(parts, kind, measured_form(parts), lambda: _trial(parts, kind))


def _trial(parts: Parts, kind: str) -> Trial:
    tokens = some_tokens(parts, 7)
    device = tokens.device
    layout: Layout
    if kind == "tree":
        layout = Tree(torch.tensor([-1, 0, 0], device=device), torch.tensor([2, 2, 3], device=device))
        paths = [torch.tensor([0, 1, 2, 3], device=device), torch.tensor([0, 1, 4, 5, 6], device=device)]
    else:
        bounds = torch.tensor([0, 3, 7], device=device)
        layout = PackedBatch(tokens, bounds, torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(bounds[1:]))
        paths = list(torch.arange(7, device=device).split([3, 4]))

    def hidden(route: Route) -> list[Tensor]:
        h = parts.states(layout, tokens, route)
        return [h[path] for path in paths]

    return Trial([tokens[path] for path in paths], hidden)


def _common(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in the dtype of the product that the model's own head would compute."""
    hidden, weight, bias = autocasted(hidden, weight, bias)
    return hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)
