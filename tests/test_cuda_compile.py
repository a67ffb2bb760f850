"""Every .cu file compiles for every architecture the wheel is built for, and no kernel spills a register."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
ARCHS = ("80", "90", "100")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, arch: str, tmp_path: Path) -> None:
    command = [str(NVCC), "-cubin", f"-arch=sm_{arch}", "-O3", "-std=c++17", "-Xptxas=-v", "-Icsrc"]
    command += [str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr, re.DOTALL
    )
    assert kernels, f"{source.name} holds no kernel"
    spilled = {name: (stores, loads) for name, stores, loads in kernels if (stores, loads) != ("0", "0")}
    assert not spilled, f"(bytes stored, loaded) for sm_{arch}: {spilled}"
