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

from trajkern._backends import AMD_TARGETS, OWNERS  # noqa: E402
from trajkern._bench import static  # noqa: E402
from trajkern._bench.kernels import VARIANTS, Variant, compiled  # noqa: E402
from trajkern._bench.static import read_amdgcn  # noqa: E402
from trajkern._triton import configs, head  # noqa: E402
from trajkern.losses.kinds import AGGREGATES, FORMS, KL_ESTIMATORS, SAMPLER_CORRECTIONS  # noqa: E402

SOURCES = [ast.parse(path.read_text()) for path in sorted(Path(configs.__file__).parent.glob("*.py"))]
MEMBERS = {
    "FORM": {*FORMS},
    "KL": {"none", *KL_ESTIMATORS},
    "AGGREGATE": {*AGGREGATES},
    "CORRECTION": {*SAMPLER_CORRECTIONS},
    "KIND": {"forward", "reverse", "mixture"},
}


def _launched() -> set[str]:
    """The kernels that a launcher starts: the names called as ``name[grid](...)``."""
    calls = [node.func for tree in SOURCES for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.value.id for f in calls if isinstance(f, ast.Subscript) and isinstance(f.value, ast.Name)}


def test_every_kernel_is_listed() -> None:
    assert _launched() == {v.kernel.__name__ for v in VARIANTS}


def test_every_kernel_is_in_the_static_report() -> None:
    assert {static.family_of(v.kernel.fn.__module__) for v in VARIANTS} <= {*OWNERS}
    assert static.family_of(head.gather_kernel.fn.__module__) == "head"


@pytest.mark.parametrize(
    "capability", [pytest.param(x, marks=() if x == 90 else pytest.mark.slow) for x in static.ARCHS]
)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.kernel.__name__}-{v.name}".rstrip("-"))
def test_compiles_without_spilling(variant: Variant, capability: int, tmp_path: Path) -> None:
    kernel = compiled(variant, capability)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"(STACK|LOCAL):(\d+)", usage) == [("STACK", "0"), ("LOCAL", "0")], usage
    if variant.wide_loads:
        assert re.search(r"ld\.global\S*\.v[48]\.b32", kernel.asm["ptx"]), "no 16-byte loads"


FIRST = {v.kernel.__name__: v for v in reversed(VARIANTS)}


AMD = [
    pytest.param(
        variant,
        arch,
        id=f"{variant.kernel.__name__}-{variant.name}-{arch}",
        marks=() if variant in FIRST.values() and arch == AMD_TARGETS[0] else pytest.mark.slow,
    )
    for variant in VARIANTS
    for arch in AMD_TARGETS
]


@pytest.mark.parametrize(("variant", "arch"), AMD)
def test_compiles_for_amd_s_gpus_without_scratch(variant: Variant, arch: str) -> None:
    """64 lanes a wavefront, and no register leaves for the memory."""
    kernel = compiled(variant, arch)
    assert kernel.asm["hsaco"][:4] == b"\x7fELF" and kernel.metadata.target.warp_size == 64
    assert f"amdgcn-amd-amdhsa--{arch}" in kernel.asm["amdgcn"]
    code = read_amdgcn(kernel.asm["amdgcn"])
    assert code.name == variant.kernel.__name__ and 0 < code.registers <= 512 and code.spilled == 0
    if variant.wide_loads:
        assert 128 in code.loads


@pytest.mark.parametrize("path", sorted(Path(configs.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_no_kernel_and_no_launcher_counts_on_32_lanes(path: Path) -> None:
    """A warp's lanes come from configs.lanes_of; the shuffles and votes that need their number are Triton's."""
    text = path.read_text()
    assert not re.search(r"\b32 \*|\* 32\b|// 32\b|\bwarpSize\b|inline_asm|libdevice", text)


@pytest.mark.parametrize("switch", MEMBERS)
def test_every_member_is_compiled_and_every_name_is_one(switch: str) -> None:
    assert {v.options[switch] for v in VARIANTS if switch in v.options} == MEMBERS[switch]
    compared = {
        node.comparators[0].value
        for tree in SOURCES
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == switch
        if isinstance(node.comparators[0], ast.Constant)
    }
    assert compared <= MEMBERS[switch]


@pytest.mark.parametrize("switch", MEMBERS)
def test_a_member_without_code_is_refused(switch: str) -> None:
    names = {"AGGREGATE": "finish_kernel", "KIND": "divergence_kernel"}
    kernel = names.get(switch, "tokens_kernel")
    variant = next(v for v in VARIANTS if v.kernel.__name__ == kernel and v.options[switch] != "none")
    with pytest.raises(triton.CompilationError) as raised:
        compiled(variant._replace(options=variant.options | {switch: "novel"}), 90)
    errors: list[BaseException | None] = [raised.value]
    while errors[-1] is not None:
        errors.append(errors[-1].__cause__)
    assert any("novel" in str(error) for error in errors)
