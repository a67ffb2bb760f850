"""Which implementation runs an op on a device: one owner per (family, device), and a way to ask for another."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from trajkern import _ext
from trajkern._checks import check_choice

NAMES = ("reference", "native", "triton", "cuda")
OWNERS = {  # family -> device -> backend
    "divergence": {"cpu": "native", "cuda": "triton"},
    "head": {"cpu": "native", "cuda": "triton"},
    "logprob": {"cpu": "native", "cuda": "triton"},
    "advantage": {"cpu": "native", "cuda": "cuda"},
    "policy_loss": {"cpu": "native", "cuda": "triton"},
    "reflection": {"cpu": "native", "cuda": "triton"},
    "span": {"cpu": "native", "cuda": "cuda"},
    "topk": {"cpu": "native", "cuda": "triton"},
    "tree": {"cpu": "native", "cuda": "cuda"},
}
_PACKAGE = {"native": "trajkern._native", "cuda": "trajkern._native", "triton": "trajkern._triton"}
_DEVICE = {"reference": "any", "native": "cpu", "cuda": "cuda", "triton": "cuda"}
LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU, and the AMD targets, that Triton's kernels are compiled for in the tests
AMD_TARGETS = ("gfx942", "gfx950")


class Block:
    """A use_backend: its choice holds until it is left, whatever was entered before, after or inside of it."""

    def __init__(self, name: str, outer: Block | None) -> None:
        self.name, self.outer, self.entered = name, outer, True


_innermost: ContextVar[Block | None] = ContextVar("use_backend", default=None)
_entered = 0  # blocks of all contexts; where there is none, none is looked up, which torch.compile could not trace
_any_entered = False
_counting = threading.Lock()


def asked() -> str | None:
    """The backend that this context's blocks ask for, or None."""
    if not _any_entered:
        return None
    block = _innermost.get()
    while block is not None and not block.entered:
        block = block.outer
    return block.name if block else None


def _count(change: int) -> None:
    global _entered, _any_entered
    with _counting:
        _entered += change
        _any_entered = _entered > 0


class Executor(Protocol):
    """What runs GPU kernels on CPU tensors: see :func:`executed_by`."""

    def problem(self, backend: str) -> str | None:
        """Why it cannot run the kernels of "triton" or "cuda", or None."""

    def launchers(self, backend: str, family: ModuleType) -> Any:
        """What has the functions of the family's module, to be called with CPU tensors."""


_executor: Executor | None = None


@contextmanager
def executed_by(executor: Executor) -> Iterator[None]:
    """Inside the block ``executor`` stands for the GPU: CPU tensors may be given to the backends of one."""
    global _executor
    before, _executor = _executor, executor
    _kernels.cache_clear()  # it is asked when kernels are looked up, not when they are called
    try:
        yield
    finally:
        _executor = before
        _kernels.cache_clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend, whatever the device's owner is.

    Args:
        name: "reference" (plain torch, any device), "native" (C++, CPU tensors), "triton" (GPU tensors; CPU tensors
            under Triton's interpreter) or "cuda" (GPU tensors; the families written in CUDA C++). Inside
            ``trajkern.testing.compiled`` the last two take CPU tensors.

    The choice is this thread's, and of asyncio this task's and those that it starts, until the block is left; other
    threads have their own. Blocks may overlap: of those that are not left, the one entered last is heeded. Autograd's
    threads for a GPU have none: what ``torch.utils.checkpoint`` computes again there needs its ``context_fn``. A
    function that torch.compile traces inside a block has its graph broken at each op. An op that the backend does not
    have, or cannot run on the tensors' device, raises; nothing falls back.
    """
    name = check_choice("name", name, NAMES)
    if (why := _unavailable(name)) is not None:
        raise RuntimeError(f"backend {name!r} is not available: {why}")
    block = Block(name, _innermost.get())
    _innermost.set(block)
    _count(+1)
    try:
        yield
    finally:
        block.entered = False
        _count(-1)
        if _innermost.get() is block:
            _innermost.set(block.outer)


def backends() -> dict[str, str]:
    """Every backend and "available", or why it is not and what to install."""
    return {name: _unavailable(name) or "available" for name in NAMES}


def _unavailable(name: str) -> str | None:
    if name == "native" and (why := _ext.problem("_C")):
        return f"trajkern._C is not built ({why}); run `pip install .` with a C++17 compiler {_ext.SOURCE}"
    if _executor is not None and _DEVICE[name] == "cuda":
        return _executor.problem(name)
    if name == "cuda":
        if torch.version.hip is not None:
            return _ON_ROCM
        if why := _ext.problem("_C_cuda"):
            command = f"`TRAJKERN_CUDA=1 pip install .` {_ext.SOURCE}"
            return f"trajkern._C_cuda is not built ({why}); install nvcc, then {command}"
        if not torch.cuda.is_available():
            build = "" if torch.version.cuda else "a CUDA build of torch on "
            return f"no CUDA device; it takes {build}a machine with an NVIDIA GPU"
    if name == "triton":
        if not _has_triton():
            return "triton is not installed; run `pip install triton` (Linux)"
        if torch.cuda.is_available():
            return _unfit_gpu()
        if not _interpreted():
            return "no CUDA device; Triton runs without one only in its interpreter (TRITON_INTERPRET=1 from the start)"
    return None


_ON_ROCM = "torch is built for ROCm, where CUDA C++ does not run; its families run as the reference's torch there"


def _unfit_gpu() -> str | None:
    """Why no Triton kernel is made for the current GPU, or None."""
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        target = gpu.gcnArchName.partition(":")[0]
        known, needed = target in AMD_TARGETS, f"one of {', '.join(AMD_TARGETS)}"
        found = f"is {target}"
    else:
        known, needed = (gpu.major, gpu.minor) >= LEAST_CAPABILITY, "compute capability 8.0 or more"
        found = f"has compute capability {gpu.major}.{gpu.minor}"
    if known:
        return None
    return f"the kernels need {needed}, and {gpu.name} {found}; use_backend('reference') runs there"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def wants_reference(family: str, x: Tensor) -> bool:
    """True where the plain torch expression is what runs: asked for, or a family whose native kernels are not built.

    Never of meta tensors, whose shapes an op's fake knows.
    """
    if (name := asked()) is not None:
        return name == "reference" and not x.is_meta
    device = "cpu" if x.is_cpu else x.device.type
    owner = OWNERS[family].get(device)
    if owner == "native":
        return not _ext.CPU_BUILT
    if owner != "cuda":
        return owner is None and device != "meta"
    return torch.version.hip is not None or _ext.problem("_C_cuda") is not None


def reference() -> ModuleType:
    return importlib.import_module("trajkern.reference")


@cache
def _kernels(family: str, device: str, asked_for: str | None) -> ModuleType:
    name = asked_for or OWNERS[family][device]
    if name not in (*OWNERS[family].values(), "native"):
        raise RuntimeError(f"backend {name!r} has no {family} kernels; it is one of {sorted(OWNERS[family].values())}")
    executed = _executor is not None and device == "cpu" and _DEVICE[name] == "cuda"
    if device != _DEVICE[name] and not executed and not (name == "triton" and _interpreted()):
        raise RuntimeError(f"backend {name!r} runs on {_DEVICE[name]} tensors, got {device} tensors")
    if name == "triton" and device == "cuda" and torch.cuda.is_available() and (why := _unfit_gpu()):
        raise RuntimeError(f"{family}: {why}")
    module = importlib.import_module(f"{_PACKAGE[name]}.{family}")
    return _executor.launchers(name, module) if executed and _executor else module


def launcher(family: str, device: str, op: str) -> Callable[..., Any]:
    """Calls ``op``'s launcher for ``device``, which bears its name in the family's module of every backend."""

    def launch(*args: Any) -> Any:
        return getattr(_kernels(family, device, asked()), op)(*args)

    return launch
