"""CUDA sources whose launches a CPU executes: the host half as nvcc compiles it, the kernels as their PTX.

The library is linked against cudart.cpp in the CUDA runtime's place. One compilation makes both halves, since the names
of kernels in an unnamed namespace differ between two.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from trajkern.testing.ptx.execution import Execution
from trajkern.testing.ptx.faults import KernelFault
from trajkern.testing.ptx.parser import Kernel, parse
from trajkern.testing.ptx.program import Program, decode

RUNTIME = Path(__file__).with_name("cudart.cpp")
FLAGS = ("-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden")
OPTIMISED = ("-O3", "-lineinfo")  # the kernels, as setup.py has them; the bindings are not: they compile sooner
MOST_SHARED = 48 * 1024  # bytes a block can have without asking for more, which nothing here does
Callback = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


def nvcc() -> str:
    """The compiler's path. Raises RuntimeError where there is none."""
    path = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if path is None:
        raise RuntimeError(
            "there is no nvcc on the PATH, which compiles the CUDA kernels that a CPU is to execute; install the CUDA "
            "toolkit (no GPU or driver is needed)"
        )
    return path


def _object(source: Path, capability: int, folder: Path, headers: Sequence[Path]) -> Path:
    """``source`` compiled, a .cu's PTX beside it; a name that bears its content's hash is compiled once."""
    included = sorted(p for path in headers for p in path.iterdir() if p.suffix in (".h", ".cuh"))
    made_from = b"".join(p.read_bytes() for p in [source, *included])
    digest = hashlib.sha256(made_from + repr((FLAGS, OPTIMISED, capability)).encode()).hexdigest()[:16]
    target = folder / f"{source.parent.name}-{source.stem}-{digest}.o"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as name:
        built, kept = Path(name) / "built.o", Path(name)
        command = [nvcc(), *FLAGS, "-gencode", f"arch=compute_{capability},code=compute_{capability}"]
        command += [*OPTIMISED, "--keep", "--keep-dir", name] if source.suffix == ".cu" else ["-O0"]
        command += [f"-I{path}" for path in _python_headers()]
        _run([*command, "-c", str(source), "-o", str(built)])
        if source.suffix == ".cu":
            os.replace(kept / f"{source.stem}.ptx", target.with_suffix(".ptx"))
        os.replace(built, target)
    return target


def _python_headers() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise RuntimeError(
            "pybind11 is not installed, which binds the CUDA kernels that a CPU is to execute; "
            "run `pip install pybind11`"
        ) from None
    return [pybind11.get_include(), sysconfig.get_paths()["include"]]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


class CudaLibrary:
    """A Python module of CUDA sources, ``name``, whose kernels ``execution`` runs when a function of it launches them.

    ``folder`` keeps what was compiled for the next time, ``headers`` are the folders of what the sources include.
    """

    def __init__(
        self, name: str, sources: Sequence[Path], capability: int, folder: Path, headers: Sequence[Path] = ()
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda s: _object(s, capability, folder, headers), [*sources, RUNTIME]))
        self.kernels: dict[str, Kernel] = {}
        for path in objects:
            if path.with_suffix(".ptx").exists():
                self.kernels |= parse(path.with_suffix(".ptx").read_text())
        for kernel, plain in zip(self.kernels.values(), _plain(list(self.kernels)), strict=True):
            kernel.name = plain
        digest = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
        library = folder / f"{digest}-{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not library.exists():
            partial = library.with_suffix(f".{os.getpid()}.partial")
            # -Bsymbolic: a CUDA runtime that torch has loaded stays out
            _run(["g++", "-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(partial)])
            os.replace(partial, library)
        self.module = _loaded(f"{digest}.{name}", library)  # pybind11 keeps modules by their full names
        self.execution: Execution | None = None
        self._programs: dict[str, Program] = {}
        self._error: BaseException | None = None
        self._callback = Callback(self._launch)  # kept alive
        ctypes.CDLL(str(library)).ptx_set_callback(self._callback)

    def __getattr__(self, name: str) -> Any:
        """A function of the module, which raises what the execution of its launches raised."""
        function = getattr(self.module, name)

        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except RuntimeError:
                error, self._error = self._error, None
                if error is not None:
                    raise error from None
                raise

        return call

    def _launch(self, name: bytes, grid: Any, block: Any, shared: int, args: Any) -> int:
        try:
            self._execute(name.decode(), tuple(grid[:3]), tuple(block[:3]), shared, args)
        except BaseException as error:  # none may pass through C++
            self._error = error
            return 1
        return 0

    def _execute(self, name: str, grid: Any, block: Any, shared: int, args: Any) -> None:
        if self.execution is None:
            raise RuntimeError(f"{name} was launched outside of an execution")
        if name not in self._programs:
            self._programs[name] = decode(self.kernels[name])
        if shared > MOST_SHARED:
            raise KernelFault(name, f"asks for {shared} bytes of shared memory, and a launch can have {MOST_SHARED}")
        program = self._programs[name]
        parameters = {
            p.name: np.frombuffer(ctypes.string_at(args[k], p.size), np.uint8)
            for k, p in enumerate(program.kernel.parameters)
        }
        self.execution.execute(program, grid, block, shared, parameters, False)


def _plain(mangled: list[str]) -> list[str]:
    """Names as in the source, with template arguments; as they are where there is no c++filt."""
    program = shutil.which("c++filt")
    if program is None or not mangled:
        return mangled
    done = subprocess.run([program, *mangled], capture_output=True, text=True, check=True)
    return [_short(line) for line in done.stdout.splitlines()]


def _short(full: str) -> str:
    """Without namespaces, result and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", full)
    depth = 0
    for at, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and not depth:
            return name[:at]
    return name


def _loaded(name: str, library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def trajkern_library(capability: int, csrc: Path | None = None, folder: Path | None = None) -> CudaLibrary:
    """trajkern's own CUDA kernels; ``csrc``: other sources than the checkout's."""
    root = Path(__file__).resolve().parents[3]
    csrc = root / "csrc" if csrc is None else csrc
    sources = [csrc / "module_cuda.cpp", *sorted(csrc.glob("bind/*.cpp")), *sorted(csrc.glob("cuda/*.cu"))]
    if len(sources) == 1:
        raise RuntimeError(
            f"there are no CUDA sources in {csrc}: an installed package has none; run this from a checkout of trajkern"
        )
    folder = root / "build" / "ptx" if folder is None else folder
    return CudaLibrary("_C_cuda", sources, capability, folder, [csrc / name for name in ("bind", "common", "cuda")])
