"""The weight and bias of a model's head layer, with what peft's adapters make of it.

Whatever is affine has a weight: an adapter's layer applied to the identity is its weight, to zero its bias, and
autograd through it reaches every parameter that it trains. That costs as much as the head on H more tokens, so plain
layers, plain LoRA and trained tokens are read instead.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from trajkern.integrations._wrapped import linear_weight

_UNIT = 256.0  # the identity's size: in 16 bits its products are not lost beside a bias, nor do they overflow


def head_tensors(layer: Any) -> tuple[Tensor, Tensor | None]:
    """``weight`` ``[V, H]`` and ``bias`` ``[V]`` of a head layer, differentiable in all that it trains."""
    if hasattr(layer, "token_adapter"):
        layer = layer.token_adapter
    if not hasattr(layer, "base_layer"):  # also in modules_to_save, whose wrapper has the active copy's tensors
        _form_weight(layer)
        return linear_weight(layer), getattr(layer, "bias", None)
    if layer.disable_adapters or not layer.active_adapters:
        if layer.merged:
            layer.unmerge()  # as the layer's own forward does
        return head_tensors(layer.base_layer)
    if layer.merged:
        return head_tensors(layer.base_layer)
    if hasattr(layer, "get_merged_weights"):  # trained tokens; tied ones know no bias
        return layer.get_merged_weights(layer.active_adapters), None
    if not _is_plain_lora(layer):
        return _of_identity(layer)
    weight, bias = head_tensors(layer.base_layer)
    return (weight + sum(map(layer.get_delta_weight, held)) if (held := _held(layer)) else weight), bias


def _form_weight(layer: Any) -> None:
    """Lets a hook form the weight anew, as those of weight_norm, spectral_norm and pruning do in the layer's call."""
    if is_formed(layer) and "weight" in vars(layer):
        layer(layer.weight.new_empty(1, 0, layer.weight.shape[1]))


def is_formed(layer: Any) -> bool:
    """Whether its weight is no parameter, but made of some when it is read or the layer is called."""
    by_a_hook = bool(layer._forward_pre_hooks) and isinstance(vars(layer).get("weight"), Tensor)
    return hasattr(layer, "parametrizations") or by_a_hook


def is_adapted(layer: Any) -> bool:
    """Whether an adapter of peft wraps this layer."""
    return any(hasattr(layer, name) for name in ("base_layer", "token_adapter", "original_module"))


def has_dropout(layer: Any) -> bool:
    """Whether something in it may be dropped: of elements, ranks or the whole adapter, of those that are active."""
    active = _names(getattr(layer, "active_adapters", ()))
    held = [x.items() if isinstance(x, dict) else [(None, x)] for k, x in vars(layer).items() if "dropout" in k]
    numbers = [p for items in held for name, p in items if name is None or name in active]
    numbers += [getattr(x, "p", 0) for x in layer.modules() if isinstance(x, torch.nn.modules.dropout._DropoutNd)]
    return any(isinstance(p, int | float) and p > 0 for p in numbers)


def adapter_state(layer: Any) -> tuple[Any, ...]:
    """What decides which weight an adapted layer has, but for the parameters' values."""
    if not is_adapted(layer):
        return ()
    inside = getattr(layer, "base_layer", None)
    active, merged = (_names(getattr(layer, name, ())) for name in ("active_adapters", "merged_adapters"))
    return (
        active,
        merged,
        layer.disable_adapters,
        layer.training,
        *(adapter_state(inside) if inside is not None else ()),
    )


def embedding_count(model: Any) -> int | None:
    """How many token ids a model's input embedding has rows for, adapted or not; None where it cannot be told."""
    try:
        layer = model.get_input_embeddings()
    except NotImplementedError:
        return None
    while layer is not None and not hasattr(layer, "num_embeddings"):
        inside = next(
            (name for name in ("token_adapter", "base_layer", "original_module") if hasattr(layer, name)), None
        )
        if inside is None:
            break
        layer = getattr(layer, inside)
    count = getattr(layer, "num_embeddings", None)
    if count is None and isinstance(weight := getattr(layer, "weight", None), Tensor) and weight.ndim == 2:
        count = weight.shape[0]
    return count


def _names(adapters: Any) -> tuple[str, ...]:
    return (adapters,) if isinstance(adapters, str) else tuple(adapters)


def _held(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain_lora(layer: Any) -> bool:
    if not (hasattr(layer, "lora_A") and hasattr(layer, "lora_variant") and hasattr(layer, "get_delta_weight")):
        return False
    base, names = layer.base_layer, _held(layer)
    return (
        isinstance(base, torch.nn.Linear)
        and base.weight.is_floating_point()
        and not any(name in layer.lora_variant or layer.lora_bias.get(name) for name in names)
    )


def _of_identity(layer: Any) -> tuple[Tensor, Tensor]:
    base = layer.get_base_layer().weight
    width, device = base.shape[1], base.device
    rows = torch.zeros(1, width + 1, width, dtype=base.dtype, device=device)
    rows[0, 1:].fill_diagonal_(_UNIT)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else base.dtype
    with torch.autocast(device.type, enabled=False) if dtype == base.dtype else contextlib.nullcontext():
        out = layer(rows)[0]
    return (out[1:] - out[:1]).t() / _UNIT, out[0]
