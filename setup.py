"""Builds trajkern._C (CPU, where there is a compiler) and trajkern._C_cuda (where torch has CUDA and nvcc is found).

The one build-time knob is the environment variable TRAJKERN_CUDA: "auto" (the default) builds _C_cuda if the torch that
is installed is a CUDA build and nvcc is found, "0" never does, "1" does, or fails without nvcc, and a list of
architectures such as "90" or "80,90" is built and nothing else.
Sanitizers that the compiler's own variable CFLAGS asks for (-fsanitize=address) make a slow _C with objects of its own.

Without a C++17 compiler nothing is built, and what is installed is pure Python: every op then runs as the reference on
a CPU, and Triton's kernels on a GPU; `trajkern info` says so. A compiler that fails on a source is an error.
"""

import os
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import zlib
from glob import glob
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError
from setuptools.modified import newer_group

CUDA_ARCHS = ("80", "90", "100")
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
WARNINGS = ["-Wall", "-Werror=switch"]  # a switch names every member of its enumeration
# Not -ffast-math: the order of every sum is part of the contract, and so are infinities and NaN.
CPU_FLAGS = ["-O3", *WARNINGS, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", *OPENMP]
SANITIZERS = [flag for flag in os.environ.get("CFLAGS", "").split() if re.match("-f(no-)?sanitize", flag)]
CPU_FLAGS += ["-O1", "-g", *SANITIZERS] if SANITIZERS else []
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", *WARNINGS])]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))


def compiler_problem() -> str | None:
    """Why no C++ module of Python can be compiled here, or None."""
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    includes = {sysconfig.get_path(name) for name in ("include", "platinclude")}
    command = [*compiler, "-std=c++17", *OPENMP, *(f"-I{path}" for path in includes), "-fsyntax-only", "-x", "c++", "-"]
    try:
        done = subprocess.run(command, input="#include <Python.h>\n#include <omp.h>\n", capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return next(iter(done.stderr.splitlines()), f"{compiler[0]} failed") if done.returncode else None


def torch_cuda() -> str | None:
    """The CUDA version of the torch that is installed, seen from an isolated build too; None where it has none."""
    folders = [*sys.path, *(sysconfig.get_path(name) for name in ("purelib", "platlib")), site.getusersitepackages()]
    files = (Path(folder) / "torch" / "version.py" for folder in folders)
    found = next((file for file in files if file.is_file()), None)
    return runpy.run_path(str(found)).get("cuda") if found else None


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_archs() -> list[str]:
    """The architectures to build _C_cuda for, or none where it is not to be built."""
    knob = os.environ.get("TRAJKERN_CUDA") or "auto"
    if knob == "0" or (knob == "auto" and NO_COMPILER):
        return []
    if NO_COMPILER:
        raise SystemExit(f"TRAJKERN_CUDA={knob} asks for the CUDA kernels, but there is no compiler: {NO_COMPILER}")
    nvcc = find_nvcc()
    if nvcc is None:
        if knob != "auto":
            raise SystemExit(f"TRAJKERN_CUDA={knob} asks for the CUDA kernels, but there is no nvcc on the PATH")
        print("trajkern: no nvcc on the PATH, so trajkern._C_cuda is not built", file=sys.stderr)
        return []
    if knob == "auto" and not torch_cuda():
        print("trajkern: no CUDA build of torch here, so trajkern._C_cuda is not built", file=sys.stderr)
        return []
    if knob not in ("auto", "1"):
        archs = re.split(r"[,; ]+", knob)
        if not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
            raise SystemExit(f"TRAJKERN_CUDA must be auto, 0, 1 or architectures such as 80,90; got {knob!r}")
        return archs
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    print(f"trajkern: building trajkern._C_cuda with {nvcc} for sm_{', sm_'.join(archs)}", file=sys.stderr)
    return archs


def run_nvcc(*args: str) -> None:
    command = [find_nvcc(), *args]
    print(*command, flush=True)
    if subprocess.run(command).returncode:
        raise CompileError(f"nvcc failed: {' '.join(command)}\nTRAJKERN_CUDA=0 builds without the CUDA kernels")


class BuildExt(build_ext):
    """Compiles only what changed, into folders that outlive the build and bear a hash of the flags; .cu by nvcc."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # the link is cheap; ParallelCompile decides about each object

    def build_extensions(self) -> None:
        compile_host, link_host = self.compiler._compile, self.compiler.link_shared_object

        def compile_one(obj: str, src: str, *args) -> None:
            partial = f"{obj}.partial"  # an interrupted compiler leaves no object that looks finished
            if src.endswith(".cu"):
                run_nvcc(*NVCC_FLAGS, *ARCH_FLAGS, "-Icsrc", "-c", src, "-o", partial)
            else:
                compile_host(partial, src, *args)
            os.replace(partial, obj)

        def link(objects: list[str], output: str, **options) -> None:
            if os.path.basename(output).startswith("_C_cuda."):  # nvcc knows where its static runtime is
                self.mkpath(os.path.dirname(output))
                run_nvcc("-shared", "--cudart=static", *objects, "-o", output)
            else:
                link_host(objects, output, **options)

        self.compiler.src_extensions.append(".cu")
        self.compiler._compile, self.compiler.link_shared_object = compile_one, link
        super().build_extensions()

    def build_extension(self, ext: Pybind11Extension) -> None:
        made_with = [pybind11.__version__, *ext.extra_compile_args]
        if ext.name.endswith("_cuda"):
            made_with += NVCC_FLAGS + ARCH_FLAGS
        folder = f"{ext.name}-{sys.implementation.cache_tag}-{zlib.crc32(repr(made_with).encode()):08x}"
        self.build_temp = os.path.join("build", folder)
        super().build_extension(ext)


def extension(name: str, sources: list[str], **flags: list[str]) -> Pybind11Extension:
    return Pybind11Extension(name, sources, include_dirs=["csrc"], depends=HEADERS, cxx_std=17, **flags)


BINDINGS = sorted(glob("csrc/bind/*.cpp"))  # of the families that both modules have
CPU_SOURCES = ["csrc/module.cpp", *BINDINGS, *sorted(glob("csrc/cpu/*.cpp") + glob("csrc/recipes/*.cpp"))]
CUDA_SOURCES = ["csrc/module_cuda.cpp", *BINDINGS, *sorted(glob("csrc/cuda/*.cu"))]
NO_COMPILER = compiler_problem()
ARCHS = cuda_archs()
ARCH_FLAGS = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
ARCH_FLAGS += [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHS[-1:]]

extensions = []
if NO_COMPILER:
    print(f"trajkern: no C++17 compiler, so only the Python files are installed: {NO_COMPILER}", file=sys.stderr)
else:
    link = [*OPENMP, *SANITIZERS]
    extensions.append(extension("trajkern._C", CPU_SOURCES, extra_compile_args=CPU_FLAGS, extra_link_args=link))
if ARCHS:
    extensions.append(extension("trajkern._C_cuda", CUDA_SOURCES, extra_compile_args=["-O3", *WARNINGS]))

ParallelCompile(needs_recompile=lambda obj, src: newer_group([src, *HEADERS], obj)).install()
setup(
    packages=[
        *find_packages(include=["trajkern", "trajkern.*"]),
        "trajkern._bench",
        *(f"trajkern._bench.{name}" for name in find_packages("bench")),
        "trajkern._triton",
    ],
    package_dir={"trajkern._bench": "bench", "trajkern._triton": "triton_kernels"},
    package_data={"trajkern": ["py.typed"], "trajkern.testing.ptx": ["cudart.cpp"]},
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExt},
)
