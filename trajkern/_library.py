"""The ``torch.ops.trajkern`` namespace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trajkern import _backends

LIBRARY = torch.library.Library("trajkern", "DEF")


def define(family: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Define an op with its fake implementation and its launchers; returns the callable overload.

    The op itself is not differentiable: its autograd.Function stands outside it, next to the public function.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"trajkern::{name}", fake, lib=LIBRARY)
    _backends.implement(LIBRARY, family, name)
    return getattr(torch.ops.trajkern, name).default
