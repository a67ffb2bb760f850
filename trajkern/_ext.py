"""The two native modules, each of which may not be there: ``_C`` for the CPU, and ``_C_cuda``."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch  # noqa: F401  its OpenMP runtime must be loaded before the modules that share it

CPU_BUILT = importlib.util.find_spec(f"{__package__}._C") is not None  # else all that is its runs in Python
SOURCE = "in trajkern's source folder"


@cache
def _load(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(f"trajkern.{name}")
    except ImportError as error:
        return error


def cpu() -> ModuleType:
    """``trajkern._C``."""
    module = _load("_C")
    if isinstance(module, ImportError):
        raise ImportError(
            f"trajkern's CPU kernels are not built ({module}); run `pip install .` with a C++17 compiler {SOURCE}"
        ) from module
    return module


def cuda() -> ModuleType:
    """``trajkern._C_cuda``."""
    module = _load("_C_cuda")
    if isinstance(module, ImportError):
        raise ImportError(
            f"trajkern's CUDA kernels are not built ({module}); install the CUDA toolkit (nvcc) and run "
            f"`TRAJKERN_CUDA=1 pip install .` {SOURCE}"
        ) from module
    return module


def problem(name: str) -> str | None:
    """Why ``_C`` or ``_C_cuda`` cannot be used, or None."""
    module = _load(name)
    return str(module) if isinstance(module, ImportError) else None
