"""Packages whose modules are imported when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any


def lazily(package: str, names: Iterable[str], modules: Iterable[str] = ()) -> tuple[Callable[[str], Any], Any]:
    """``__getattr__`` and ``__dir__`` of a package: its public names, and those of its modules that need not be loaded.

    Args:
        names: what ``dir`` lists, with the modules and what every module has.
        modules: of the package, imported on attribute access.
    """
    offered, shown = frozenset(modules), {*names, *modules}

    def __getattr__(name: str) -> Any:
        if name in offered:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])

    def __dir__() -> list[str]:
        return sorted(shown | {name for name in vars(sys.modules[package]) if name.startswith("__")})

    return __getattr__, __dir__
