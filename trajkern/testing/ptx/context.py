"""``with compiled("sm_90")``: the kernels of a GPU that is not there, executed on CPU tensors as they were compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from trajkern import _backends
from trajkern._checks import check_choice
from trajkern._native._args import kernels_from
from trajkern.testing.ptx.by_nvcc import CudaLibrary, trajkern_library
from trajkern.testing.ptx.device import Pointers, Watch
from trajkern.testing.ptx.execution import Execution

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
ORDERS = ("lowest", "random")

_library = cache(trajkern_library)


@contextmanager
def compiled(arch: str, *, order: str = "lowest", seed: int | None = 0) -> Iterator[Execution]:
    """Execute compiled GPU kernels on CPU tensors, and check what they do.

    Inside the block every Triton kernel that is launched on CPU tensors is compiled for ``arch`` by Triton itself, and
    its PTX is executed instruction by instruction; trajkern's own ops run their GPU kernels this way under
    ``use_backend("triton")`` or ``use_backend("cuda")``. Raises :class:`KernelFault` at

    - an access outside the tensors that a launch was given, or at an address that is no multiple of its width,
    - a read of memory that nothing has written, and, at the end of the block, a tensor that ``torch.empty`` or the like
      made inside it and of which kernels have written a part only,
    - threads that touch the same memory, one of them writing, with no barrier between (a shuffle is none),
    - lanes that wait at a barrier, a shuffle or a vote for others that never come.

    The approximate instructions (``ex2.approx`` and others) err by as much as their manual allows. Speed is not the
    GPU's, and neither is memory ordered as weakly as there: what blocks of one launch tell each other is not modelled.

    Args:
        arch: the architecture, such as "sm_90".
        order: "lowest" runs the warps that are furthest behind, the fastest; "random" any, as drawn with ``seed``.
        seed: of the order and of the approximations' errors; None: no errors.

    Yields:
        What was launched: ``launches`` counts by kernel.

    Raises:
        NotImplementedError: for an instruction that is not executed here (tensor cores, atomics, asynchronous copies,
            local memory, calls); it names the instruction and its line.
        RuntimeError: where Triton runs as its interpreter, or what compiles the kernels is missing.
    """
    arch = check_choice("arch", arch, ARCHITECTURES)
    order = check_choice("order", order, ORDERS)
    if order == "random" and seed is None:
        raise ValueError('order="random" needs a seed')
    execution, capability = Execution(order, seed), int(arch.removeprefix("sm_"))
    with ExitStack() as stack:
        if _triton_problem() is None:
            from trajkern.testing.ptx.by_triton import driven

            stack.enter_context(driven(capability, execution))
        stack.enter_context(_backends.executed_by(_Executor(capability, execution)))
        stack.enter_context(Watch(execution.device))
        yield execution
    execution.device.check_all_written()


@cache
def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; run `pip install triton` (Linux; no GPU is needed)"
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, under which Triton compiles nothing; start Python without it"
    return None


class _Executor:
    """What trajkern's ops find in the place of a GPU."""

    def __init__(self, capability: int, execution: Execution) -> None:
        self.capability, self.execution = capability, execution

    def problem(self, backend: str) -> str | None:
        """Why a backend of GPU kernels cannot run, or None."""
        if backend == "triton":
            return _triton_problem()
        try:
            self._cuda()
        except RuntimeError as error:
            return str(error)
        return None

    def launchers(self, backend: str, family: ModuleType) -> Any:
        """A family's launchers, which run its GPU kernels on CPU tensors."""
        return _Launchers(family, self._by_nvcc if backend == "cuda" else self._by_triton)

    def _cuda(self) -> CudaLibrary:
        library = _library(self.capability)
        library.execution = self.execution
        return library

    def _by_triton(self, launcher: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with Watch(self.execution.device):  # again, since torch's dispatcher suspends the context's
            results = launcher(*args)
        self.execution.device.check_written(results)
        return results

    def _by_nvcc(self, launcher: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        device = self.execution.device
        with Watch(device), Pointers(device), kernels_from(self._cuda()):
            results = launcher(*args)
        self.execution.device.check_written(results)
        return results


class _Launchers:
    """The functions of a module, each called by ``run``."""

    def __init__(self, module: ModuleType, run: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
        self._module, self._run = module, run

    def __getattr__(self, name: str) -> Callable[..., Any]:
        launcher = getattr(self._module, name)
        return lambda *args: self._run(launcher, args)
