"""A wheel built as anybody builds it, checked, and installed into an empty environment; with a compiler and without."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import trajkern as tk

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="wheels for Linux")]
ROOT = Path(__file__).resolve().parent.parent


def needs(*packages: str) -> None:
    """Skip where one is not installed; by its metadata, since the folder build/ looks like a module."""
    for name in packages:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: pip install build twine")


def run(*command: str | Path, **options: object) -> str:
    """What the command printed; its end must be good."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution, with the objects of the last build beside it: they are not compiled again."""
    needs("build")
    made = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", made, ROOT, env=environment())
    (archive,) = made.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(made, filter="data")
    (folder,) = (path for path in made.iterdir() if path.is_dir())
    for objects in (ROOT / "build").glob("trajkern._C-*"):
        shutil.copytree(objects, folder / "build" / objects.name, copy_function=shutil.copy2)
    return folder


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "TRAJKERN_CUDA": "0", "PYTHONPATH": "", **changes}


def built(source: Path, where: Path, **changes: str) -> Path:
    options = ("--wheel", "--no-isolation", "-o", where)
    run(sys.executable, "-m", "build", *options, source, env=environment(**changes))
    (wheel,) = where.glob("*.whl")
    return wheel


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """The interpreter of a new environment, which sees this one's torch and what torch needs, but no trajkern."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    here = Path(str(importlib.util.find_spec("torch").origin)).parent.parent  # type: ignore[union-attr]
    for path in here.iterdir():
        if "trajkern" not in path.name and not (site / path.name).exists() and path.suffix != ".pth":
            (site / path.name).symlink_to(path)
    yield python


def smoke(python: Path, wheel: Path, *options: str) -> None:
    away = python.parent.parent
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=away, env=environment())
    told = run(python, ROOT / "tests/smoke.py", *options, cwd=away, env=environment())
    assert f"trajkern {tk.__version__} works" in told
    assert run(away / "bin/trajkern", "--version", cwd=away, env=environment()).startswith(f"trajkern {tk.__version__}")


def test_a_wheel_is_built_checked_installed_and_used(source: Path, empty: Path, tmp_path: Path) -> None:
    needs("twine")
    wheel = built(source, tmp_path / "dist")
    tag = sys.implementation.cache_tag.replace("cpython-", "cp")
    assert wheel.name.startswith(f"trajkern-{tk.__version__}-{tag}-{tag}-linux_")
    told = run(sys.executable, "-m", "twine", "check", "--strict", wheel)
    assert "PASSED" in told and "WARNING" not in told
    smoke(empty, wheel)


@pytest.fixture(scope="module")
def module(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native module of the wheel."""
    where = tmp_path_factory.mktemp("module")
    with zipfile.ZipFile(built(source, where / "dist")) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        return Path(archive.extract(name, where))


def test_the_native_module_needs_no_torch(module: Path) -> None:
    """It takes pointers: of what it is linked to, nothing is torch's but the OpenMP runtime, which any will do for."""
    if shutil.which("readelf"):
        lines = run("readelf", "-d", module).splitlines()
        needed = {line.split("[")[1].split("]")[0].split(".so")[0] for line in lines if "(NEEDED)" in line}
        assert needed <= {"libstdc++", "libm", "libgomp", "libgcc_s", "libc", "libpthread", "ld-linux-x86-64"}
    run(sys.executable, "-I", "-S", ROOT / "tests/torch_free.py", module)


def test_processors_without_avx_get_the_same_bits(module: Path) -> None:
    """What is built runs from x86-64-v2 on and chooses its lanes when it runs: a Nehalem, emulated, has four."""
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("qemu-user is not installed")
    command = [sys.executable, "-I", "-S", ROOT / "tests/torch_free.py", module]
    assert run(emulator, "-cpu", "Nehalem", *command) == run(*command)


def test_without_a_compiler_it_is_pure_python(source: Path, empty: Path, tmp_path: Path) -> None:
    wheel = built(source, tmp_path / "dist", CXX="no-such-compiler")
    assert wheel.name == f"trajkern-{tk.__version__}-py3-none-any.whl"
    smoke(empty, wheel, "--pure")


def test_cuda_without_a_compiler_is_refused(source: Path) -> None:
    command = [sys.executable, "setup.py", "--version"]
    changes = {"TRAJKERN_CUDA": "1", "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=source, env=environment(**changes), capture_output=True, text=True)
    assert done.returncode != 0 and "TRAJKERN_CUDA=1 asks for the CUDA kernels, but there is no compiler" in done.stderr


def test_the_native_sources_compile_for_arm64(tmp_path: Path) -> None:
    """Every file, by a cross compiler with the headers of this Python, whose types are as wide there."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("aarch64-linux-gnu-g++ is not installed")
    pybind11 = pytest.importorskip("pybind11")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fopenmp", "-Wall", "-Werror=switch", "-ffp-contract=off"]
    flags += [f"-I{path}" for path in ("csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    folders = ("csrc/bind/*.cpp", "csrc/cpu/*.cpp", "csrc/recipes/*.cpp")
    sources = [ROOT / "csrc/module.cpp", *(path for folder in folders for path in sorted(ROOT.glob(folder)))]
    for path in sources:
        run(compiler, *flags, "-c", path, "-o", tmp_path / f"{path.parent.name}_{path.stem}.o", cwd=ROOT)
    module = tmp_path / "_C.so"
    run(compiler, "-shared", "-fopenmp", *sorted(tmp_path.glob("*.o")), "-o", module)
    assert "ARM aarch64" in run("file", module) if shutil.which("file") else module.stat().st_size > 100_000
