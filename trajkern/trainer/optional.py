"""Optional packages, imported on first use."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str, install: str = "'trajkern[train]'") -> ModuleType:
    """Import a package, of the ``train`` extra unless told, or say how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"the trainer needs {package}: pip install {install} ({error})", name=name) from error
