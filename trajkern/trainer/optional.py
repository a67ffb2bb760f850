"""Optional packages, imported on first use."""

from __future__ import annotations

import importlib
from types import ModuleType

from trajkern._extras import pip_install


def require(name: str, package: str | None = None) -> ModuleType:
    """Import a module of the ``train`` extra, or say what installs it; ``package`` is its distribution's name."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = package or name.partition(".")[0]
        raise ImportError(
            f"the trainer needs {package}: {pip_install('train', package)} ({error})", name=name
        ) from error
    except Exception as error:  # as matplotlib, which another imports, of a setting that it does not know
        raise ImportError(f"{name} cannot be imported: {type(error).__name__}: {error}", name=name) from error
