"""Every Triton kernel compiles for each GPU generation, on a machine without one, and keeps its values in registers."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter is on, and it compiles nothing", allow_module_level=True)

from trajkern._bench.kernels import CAPABILITIES, VARIANTS, Variant, compiled  # noqa: E402
from trajkern._triton import configs  # noqa: E402


def _launched() -> set[str]:
    """The kernels that a launcher starts: the names called as ``name[grid](...)``."""
    trees = [ast.parse(path.read_text()) for path in Path(configs.__file__).parent.glob("*.py")]
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}


def test_every_kernel_is_listed() -> None:
    assert _launched() == {v.kernel.__name__ for v in VARIANTS}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.kernel.__name__}-{v.name}".rstrip("-"))
def test_compiles_without_spilling(variant: Variant, capability: int, tmp_path: Path) -> None:
    made = compiled(variant, capability)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")], usage
    if variant.wide_loads:
        assert re.search(r"ld\.global\S*\.v[48]\.b32", made.asm["ptx"]), "no 16-byte loads"
