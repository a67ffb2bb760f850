"""What stands around a causal model: parallel wrappers, compiled modules, quantised weights, autocast.

A wrapper gathers parameters, and arranges for their gradients to be reduced, in its module's forward. So whatever reads
parameters runs there, in the place of the model's own forward, and gradients go where the wrapper's own go.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from trajkern._checks import check_plain, describe

T = TypeVar("T")
Tensors = tuple[Tensor, Tensor | None]
_ABSENT = object()
_FSDP1 = ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
_FSDP2 = ("torch.distributed.fsdp", "FSDPModule")
_DDP = ("torch.nn.parallel.distributed", "DistributedDataParallel")
_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
_ENGINE = ("deepspeed.runtime.engine", "DeepSpeedEngine")


def _is(module: Any, kind: tuple[str, str]) -> bool:
    """Whether it is an instance of a class that is imported only where somebody uses it."""
    cls = getattr(sys.modules.get(kind[0]), kind[1], None)
    return cls is not None and isinstance(module, cls)


def _wrapped(module: Any) -> Any:
    """What a wrapper of the whole model holds, or None of a module that is no such wrapper."""
    if _is(module, _COMPILED):
        return module._orig_mod
    if _is(module, _FSDP1):
        return module._fsdp_wrapped_module
    if isinstance(module, nn.DataParallel) or _is(module, _DDP) or _is(module, _ENGINE):
        return module.module
    return None


def is_fsdp1(module: Any) -> bool:
    return _is(module, _FSDP1)


def apart(modules: Iterable[Any]) -> list[tuple[Any, dict[str, Any]]]:
    """DistributedDataParallel among these, with what keeps their forward from exchanging anything."""
    alone = {"require_forward_param_sync": False, "require_backward_grad_sync": False}
    return [(x, alone) for x in modules if _is(x, _DDP)]


def unwrapped(model: Any) -> Any:
    """The module inside every compiled or parallel wrapper; an adapter's model is no such wrapper."""
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def not_compiled(model: Any) -> Any:
    """The module inside compiled ones that stand around it."""
    while _is(model, _COMPILED):
        model = model._orig_mod
    return model


def is_wrapped(model: Any, inner: Any) -> bool:
    """Whether the forward of ``model`` does more than that of the causal model ``inner`` computes."""
    return bool(_chain(model, inner))


def is_sharded(model: Any, inner: Any) -> bool:
    """Whether a wrapper keeps parameters in parts, and so elsewhere in a forward than between two."""
    return any(not _is(x, _DDP) for x in _chain(model, inner))


def _chain(model: Any, inner: Any) -> list[Any]:
    """The modules whose forward does more than compute, from the outermost to ``inner``."""
    chain: list[Any] = []
    while True:
        held = _wrapped(model)
        if any(_is(model, kind) for kind in (_FSDP2, _FSDP1, _DDP, _ENGINE)):
            chain.append(model)
        if held is None and model is not inner and hasattr(model, "get_base_model"):
            held = model.get_base_model()
        if held is None:
            return chain
        model = held


def _gathering(model: Any, inner: Any, layer: Any) -> list[Any]:
    """The modules in whose forward the parameters of ``layer``, one of ``inner``'s, are whole; the outermost first."""
    chain = [x for x in _chain(model, inner) if not _is(x, _DDP)]
    name = next((name for name, module in inner.named_modules() if module is layer), "")
    parts = name.split(".") if name else []
    held = [inner.get_submodule(".".join(parts[:end])) for end in range(1, len(parts) + 1)]
    chain += [x for x in held if _is(x, _FSDP2) or _is(x, _FSDP1)]
    if any(hasattr(x, "ds_id") for x in layer.parameters()):  # ZeRO-3 gathers in every module's own forward
        chain += [x for x in (layer,) if x not in chain]
    return chain


def _inside(wrappers: list[Any], function: Callable[[], T]) -> T:
    """``function()``, in the forward of every wrapper in its turn; it returns a tensor, or a tuple of them and None."""
    for wrapper in reversed(wrappers):
        function = _through(wrapper, function)
    return function()


def _through(wrapper: Any, function: Callable[[], T]) -> Callable[[], T]:
    held = _wrapped(wrapper)
    target = wrapper if held is None else held

    def run() -> T:
        some = torch.empty(
            0, dtype=torch.float32, device="cpu"
        )  # DistributedDataParallel fails to move no argument to its device
        for peer in _peers(wrapper):
            with _forward(peer, lambda: None):
                peer(some)
        with _forward(target, function):
            return wrapper(some)

    return run


def _peers(module: Any) -> list[Any]:
    """The other modules of ``fully_shard([module, ...])``, which is whole until the last of them has run."""
    if not _is(module, _FSDP2):
        return []
    return [x for x in module._get_fsdp_state()._modules if x is not module]


@contextlib.contextmanager
def _forward(module: Any, function: Callable[[], Any]) -> Iterator[None]:
    """``module`` with its hooks, and ``function`` in the place of its forward, which is its own again inside of it."""

    def call(*_: Any, **__: Any) -> Any:
        restore()
        return function()

    def restore() -> None:
        for name, value in before.items():
            if value is _ABSENT:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value

    put = {"forward": call, "_compiled_call_impl": None}
    before = {name: vars(module).get(name, _ABSENT) for name in put}
    vars(module).update(put)
    try:
        yield
    finally:
        restore()


def body_inside(model: Any, inner: Any, layer: Any, function: Callable[[], Tensor]) -> Tensor:
    """``function()``, the body of the causal model ``inner``, in the forward of every wrapper that ``model`` has.

    ``layer`` is the head, which is applied later: DistributedDataParallel looks for parameters that take no part in
    what its forward returns.
    """
    chain = _chain(model, inner)
    if not chain:
        return function()
    used = [x for x in layer.parameters() if x.requires_grad] if any(_is(x, _DDP) for x in chain) else []
    return _inside(chain, lambda: _Alias.apply(function(), *used))


class _Alias(torch.autograd.Function):
    """A tensor again, and no view, which FSDP2 warns of; its graph also leads to parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return grad, *(None,) * ctx.count


def head_inside(model: Any, inner: Any, layer: Any, function: Callable[[], Tensors]) -> Tensors:
    """``function()``, the (weight, bias) of the head ``layer``, whole and in memory that stays.

    Their gradients go where those of the model's own forward go.
    """
    wrappers = _gathering(model, inner, layer)
    if not wrappers:
        return _plain(function())
    # an alias, as wrappers hook the tensors that they return, for ever where these are parameters
    found = _inside(wrappers, lambda: _each(_Alias.apply, function()))
    if any(x is not None and _freed(x) for x in found):
        found = _inside(wrappers, lambda: _each(torch.clone, function()))
    return _plain(found)


def _each(function: Callable[[Tensor], Tensor], tensors: Tensors) -> Tensors:
    weight, bias = tensors
    return function(weight), None if bias is None else function(bias)


def _freed(x: Tensor) -> bool:
    """Whether a wrapper took back what it had gathered."""
    return type(x) is Tensor and (x.numel() == 0 or x.untyped_storage().nbytes() == 0)


def _plain(tensors: Tensors) -> Tensors:
    for name, x in zip(("weight", "bias"), tensors, strict=True):
        if x is not None:
            check_plain(f"model's head {name}", x)
    return tensors


def linear_weight(layer: Any) -> Tensor:
    """The weight ``[V, H]`` of a linear layer, of bitsandbytes' 4 bits as that layer's own forward widens it.

    Raises:
        TypeError: a layer that has none, or whose product is not of its hidden states with a weight.
    """
    kind = type(layer).__name__
    if any(cls.__name__ == "Linear8bitLt" for cls in type(layer).__mro__):
        raise TypeError(
            f"model's head must multiply hidden states as they are; a {kind} rounds them to 8 bits, too: "
            "keep the head whole by llm_int8_skip_modules"
        )
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"model's head must be a linear layer with a weight, got {kind}")
    if getattr(weight, "bnb_quantized", False):
        return _widened(layer, weight)
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise TypeError(f"model's head must have a weight of floats; {kind} has {describe(weight)}")
    return weight


def _widened(layer: Any, weight: Any) -> Tensor:
    state = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise TypeError(
            "model's head must not be packed for inference on a CPU, which its own forward in evaluation did: "
            "load it again, or keep the head whole by llm_int8_skip_modules"
        )
    whole = sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, state)
    return whole.to(layer.compute_dtype or state.dtype)


def autocasted(*tensors: Any) -> tuple[Any, ...]:
    """The factors of a matrix product, and its bias or None, as autocast hands them to it: float64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)
