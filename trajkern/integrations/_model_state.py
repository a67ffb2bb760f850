"""What a measured form of a model holds for: all that could change what becomes of its hidden states from then on.

That is hooks and forwards around the head, adapters, and every number that the head, the causal model, what stands
beside its body and its config hold, whatever holds it. Tensors are told apart by weak references and versions, and on
the CPU by their numbers; on a GPU, where to read them is to wait, a write past their versions (``.data``) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from itertools import islice
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from trajkern._checks import readable
from trajkern.integrations._adapted_head import adapter_state, is_formed
from trajkern.integrations._model_run import attention_of
from trajkern.integrations._own_forward import Parts, around_head, autocast_of, check_loaded
from trajkern.integrations._wrapped import is_sharded

_FEW = 16  # numbers together; more of them are no scale and no cap
_SMALL = 64  # modules in a child of the model; more of them are a body of its own, and no step behind a head
_DEPTH = 2  # of containers within containers
_HOSTS = ("torch.", "transformers.", "peft.")


def state_of(parts: Parts) -> tuple[Any, ...]:
    """What decides a model's form, but for the values of its head's parameters and of those that it trains."""
    _, owner, inner = parts
    layer = parts.head
    if parts.weight.is_meta:
        check_loaded(inner)
    exact = not (is_sharded(parts.whole, inner) or hasattr(parts.weight, "ds_id"))
    around = around_head(parts)
    beside = [x for child in inner.children() if child not in (layer, inner.base_model) for x in _within(parts, child)]
    of_head = {id(x) for x in layer.modules()}
    configs = {id(x): x for x in (inner.config, inner.config.get_text_config())}.values()
    adapters = getattr(owner, "active_adapters", None) if owner is not inner else None
    return (
        weakref.ref(layer),
        parts.weight.dtype,
        parts.weight.device.type,
        autocast_of(parts),
        tuple(_of_all(vars(config).items(), exact) for config in configs),
        tuple(_numbers(x, exact, own=id(x) not in of_head) for x in (*around, inner.base_model, *beside)),
        tuple(adapters) if isinstance(adapters, list | tuple) else adapters,
        attention_of(inner),
        adapter_state(layer),
        is_formed(layer) and layer.training,
        tuple(map(_altered, (*around, *beside))),
    )


def _within(parts: Parts, child: nn.Module) -> list[nn.Module]:
    """A child of the causal model with what it holds, where that could be a step of the head's."""
    if parts.causal.base_model is parts.causal:  # its children are its body
        return [child]
    found = list(islice(child.modules(), _SMALL + 1))
    return found if len(found) <= _SMALL else [child]


def _numbers(module: nn.Module, exact: bool, own: bool) -> Any:
    """Those that a module holds; of the head's (not ``own``) without its weight and bias, which are read anew."""
    held = vars(module)
    named = [x for x in held.items() if x[0] not in ("_parameters", "_buffers", "_modules")]
    named += [*module._parameters.items(), *module._buffers.items()]
    classes = [cls for cls in type(module).__mro__ if not f"{cls.__module__}.".startswith(_HOSTS)]
    named += [x for cls in classes for x in vars(cls).items()]
    return _of_all((x for x in named if own or x[0] not in ("weight", "bias")), exact)


def _of_all(items: Iterable[tuple[Any, Any]], exact: bool, depth: int = _DEPTH) -> tuple[Any, ...]:
    return tuple((name, x) for name, value in items if (x := _number(value, exact, depth)) is not None)


def _number(value: Any, exact: bool, depth: int) -> Any:
    """What stands for a number, or a few of them, or a word, among others; None of anything else."""
    if isinstance(value, Number):
        return value if value == value else "nan"
    if isinstance(value, str):
        return value
    if isinstance(value, Tensor):
        return tuple(_marks(value, exact))
    if depth and isinstance(value, (dict, list, tuple)) and len(value) <= _FEW:
        return _of_all(value.items() if isinstance(value, dict) else enumerate(value), exact, depth - 1) or None
    if type(value).__module__ == "numpy" and getattr(value, "size", _FEW + 1) <= _FEW:
        return str(value)
    return None


def _marks(x: Tensor, exact: bool) -> Iterator[Any]:
    """What tells a tensor from another and from itself before a write.

    Of one that is trained only that it is, which is refused behind a head; unless it is a few numbers, which a forward
    could detach. ``exact``: no wrapper moves it or takes it apart between forwards.
    """
    yield x.requires_grad
    if x.requires_grad and not (x.is_leaf and x.numel() <= _FEW):
        return
    yield WeakIdRef(x)
    yield 0 if x.is_inference() else x._version
    if exact and type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_meta:
        yield x.data_ptr()
        if x.numel() <= _FEW and (readable(x) or x.is_inference()):
            yield str(x.tolist())


def _altered(module: nn.Module) -> tuple[Any, ...]:
    """What a module does beside its class's forward as it was imported: hooks by their own numbers."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return *map(tuple, hooks), *(_held(x) for x in (type(module).forward, vars(module).get("forward")))


def _held(function: Any) -> Any:
    try:
        return weakref.ref(getattr(function, "__func__", function))
    except TypeError:
        return _Itself(function)


class _Itself:
    """An object by its identity, which it keeps from being another's."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)
