"""What the ops' autograd.Functions share: gradients that can be taken once, and errors with an op's public name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trajkern._checks import check_tensor, describe
from trajkern._dtypes import INTEGERS

Backward = Callable[..., Any]
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def is_transformed() -> bool:
    """Whether a transform of torch.func or a level of forward-mode AD is active, neither of which the kernels have."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_autocasting() -> bool:
    """Whether autocast would round the factors of some products: kernels compute in the dtypes that they are given."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextlib.contextmanager
def uncast() -> Iterator[None]:
    """Without autocast."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _NoBackward:
    """The ctx of a forward that no backward follows."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply``; where nothing asks for a gradient its forward alone: apply takes as long as a kernel."""
    if torch.is_grad_enabled():
        for x in args:
            if isinstance(x, Tensor) and x.requires_grad:
                return function.apply(*args)
    if torch.compiler.is_dynamo_compiling() or is_transformed():
        return function.apply(*args)
    with torch.no_grad():  # what stands in a tuple may require a gradient, and gets none
        return function.forward(_NoBackward(len(args)), *args)


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Saves what :func:`kept` gives back to the backward. No hook of saved tensors gets what a kernel addresses by."""
    hooked = not torch.compiler.is_compiling() and _saved_tensors_hooks(False) is not None
    if not hooked:
        ctx.save_for_backward(*tensors)
        ctx.forms = None
        return
    ctx.indices = [x if _is_index(x) else None for x in tensors]
    ctx.versions = [None if x is None or x.is_inference() else x._version for x in ctx.indices]
    tensors = tuple(None if _is_index(x) else x for x in tensors)
    ctx.save_for_backward(*tensors)
    ctx.forms = [None if x is None else _form(x) for x in tensors]


def kept(ctx: Any) -> tuple[Any, ...]:
    """What the forward saved, which the backward takes the pointers of.

    Its memory may have been freed in between, and a hook of saved tensors gives back what it likes.
    """
    tensors: tuple[Any, ...] = ctx.saved_tensors
    if torch.compiler.is_compiling():
        return tensors
    name = f"what the backward of {ctx.names} reads"
    for x in tensors:
        if x is not None:
            check_tensor(name, x)
    if ctx.forms is None:
        return tensors
    for x, version in zip(ctx.indices, ctx.versions, strict=True):
        if version is not None and x._version != version:  # as torch says it of what it has saved itself
            raise RuntimeError(f"{name} has been modified by an inplace operation: {describe(x)}")
    saved = (x if x is None else _as_saved(name, x, form) for x, form in zip(tensors, ctx.forms, strict=True))
    return tuple(x if index is None else index for x, index in zip(saved, ctx.indices, strict=True))


def _is_index(x: Tensor | None) -> bool:
    return x is not None and x.dtype in INTEGERS


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.device, x.stride()


def _as_saved(name: str, x: Any, form: tuple[Any, ...]) -> Tensor:
    given = _form(x)
    if given == form:
        return x
    dtype, shape, device, strides = form
    if given[:3] != form[:3]:
        saved = f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"
        raise RuntimeError(f"{name} must be as it was saved, {saved}; a hook of saved tensors gave {describe(x)}")
    return torch.empty_strided(shape, strides, dtype=dtype, device=device).copy_(x)


def differentiable_once(*ops: str, linear: bool | Callable[[Any], bool] = False) -> Callable[[Backward], Backward]:
    """Decorates the backward of these public ops' Function: where a second derivative could follow, it names them.

    torch's ``once_differentiable`` raises only where an upstream gradient requires one. Elsewhere it leaves out,
    in silence, the part of a second derivative that goes through the op. ``linear``: that part is 0, because the
    gradient does not depend on the inputs; a function of ctx where an option decides it.
    """
    names = " and ".join(f"trajkern.{op}" for op in ops)

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def call(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.compiler.is_compiling():
                return backward(ctx, *grads)
            if is_autocasting():
                with uncast():
                    return call(ctx, *grads)
            ctx.names = names  # for errors
            _refuse_transformed(names, grads)
            for g in grads:
                if g is not None:
                    check_tensor(f"the upstream gradient of {names}", g)
            grads = tuple(g if g is None else g.resolve_neg() for g in grads)
            if not torch.is_grad_enabled():
                return computed(ctx, *grads)
            constant = linear(ctx) if callable(linear) else linear
            if not constant or any(g is not None and g.requires_grad for g in grads):
                raise RuntimeError(f"{names}: differentiable once; there is no gradient with create_graph=True")
            with torch.no_grad():
                return computed(ctx, *grads)

        def computed(ctx: Any, *grads: Tensor | None) -> Any:
            try:
                return backward(ctx, *grads)
            except IndexError as error:  # of memory that others write into, which torch does not notice
                what = f"what the backward of {names} reads must be as it was in the forward"
                raise RuntimeError(f"{what}; {error}") from None

        return call

    return decorate


def _refuse_transformed(names: str, grads: tuple[Tensor | None, ...]) -> None:
    batched = any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)
    if batched or torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{names}: the backward runs in no transform of torch.func, nor with batched gradients")
    if forward_ad._current_level >= 0:
        if any(g is not None and forward_ad.unpack_dual(g).tangent is not None for g in grads):
            raise RuntimeError(f"{names}: the backward has no forward-mode derivative")
