"""The ``torch.ops.trajkern`` namespace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from trajkern import _backends

Function = TypeVar("Function", bound=Callable[..., Any])
LIBRARY = torch.library.Library("trajkern", "DEF")


def define(family: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Define an op with its fake implementation and its launchers; returns what calls it.

    The op itself is not differentiable: its autograd.Function stands outside it, next to the public function. A plain
    tensor goes straight to the launcher: torch's dispatcher takes longer than a small kernel, and is needed only by who
    traces, profiles or overrides ops.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"trajkern::{name}", fake, lib=LIBRARY)
    launchers = {device: _backends.launcher(family, device, name) for device in ("cpu", "cuda")}
    for device, launch in launchers.items():
        LIBRARY.impl(name, launch, device.upper())
    op = getattr(torch.ops.trajkern, name).default

    def call(*args: Any) -> Any:
        x = args[0]
        if torch.compiler.is_dynamo_compiling() or type(x) is not torch.Tensor or _is_watched() or x.is_meta:
            return op(*args)
        return launchers["cpu" if x.is_cpu else x.device.type](*args)

    return call


def _is_watched() -> bool:
    """Whether a dispatch mode, a function transform or a profiler wants to see the op."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    )


def recorded(function: Function) -> Function:
    """Shows a public function's name to a running profiler, and as an NVTX range under ``emit_nvtx``."""
    name = f"trajkern.{function.__name__}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or not torch.autograd._profiler_enabled():
            return function(*args, **kwargs)
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]
