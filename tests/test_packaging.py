"""What a source and a binary distribution contain, and what the native module brings into a process."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import trajkern as tk

ROOT = Path(__file__).resolve().parent.parent


def _setup(*args: str) -> None:
    environment = {**os.environ, "TRAJKERN_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built by the objects of the last build, so that it takes seconds."""
    tmp = str(tmp_path_factory.mktemp("wheel"))
    _setup("egg_info", "-e", tmp, "build", "-b", f"{tmp}/build", "bdist_wheel", "-b", f"{tmp}/bdist", "-d", tmp)
    (path,) = Path(tmp).glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == {"trajkern", f"trajkern-{tk.__version__}.dist-info"}
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "trajkern").rglob("*.py")}
    kernels = {f"trajkern/_triton/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")}
    bench = ROOT / "bench"
    benchmark = {f"trajkern/_bench/{p.relative_to(bench)}" for p in bench.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == ours | kernels | benchmark
    assert "trajkern/testing/ptx/cudart.cpp" in names
    # one native module: no CUDA without nvcc, and no runtime library of its own beside it
    (native,) = (name for name in names if ".so" in name)
    assert native.startswith("trajkern/_C.")


def test_wheel_metadata(wheel: zipfile.ZipFile, metadata: Message) -> None:
    assert metadata["Name"] == "trajkern" and metadata["Version"] == tk.__version__
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {line.split("<")[0].split(">")[0] for line in needed} == {"torch", "numpy"}
    (entry,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert b"trajkern = trajkern.cli:main" in wheel.read(entry)


def test_sdist_can_be_built(tmp_path: Path) -> None:
    _setup("egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path))
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    native = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*") if p.is_file()}
    assert native | {"setup.py", "pyproject.toml", "README.md", "LICENSE", "triton_kernels/__init__.py"} <= names
    assert "trajkern/testing/ptx/cudart.cpp" in names


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's mappings from /proc")
def test_one_openmp_runtime() -> None:
    """torch's; a second one would have its own threads, which torch.set_num_threads does not govern."""
    code = "import trajkern; from trajkern import _ext; _ext.cpu(); print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert len({line.split()[-1] for line in maps.splitlines() if "gomp" in line}) == 1
