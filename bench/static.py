"""``trajkern bench --static``: what the compilers and the roofline say of every GPU kernel, on a machine without a GPU.

Each kernel is compiled for each architecture; registers, spills, shared memory and the widths of its global loads and
stores are read from the machine code. For the benchmark's cases, the bytes that the launches move stand beside the
fewest that any implementation must, with the time that the larger of bytes / bandwidth and FLOP / rate allows on each
GPU; where a result of a real GPU is there, its median stands beside.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from trajkern._backends import AMD_TARGETS
from trajkern._bench import head_model, results
from trajkern._bench.table import seconds
from trajkern._bench.text import WIDTH
from trajkern._parser import Parser
from trajkern._start import say

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT.parent / "csrc" / "cuda"
ARCHS = (80, 90, 100)


class GPU(NamedTuple):
    """A data sheet: bytes per second of the memory, FLOP per second of dense bfloat16 products."""

    arch: int
    bandwidth: float
    rate: float


# NVIDIA's data sheets of the SXM parts: A100 80GB, H100, H200, and one GPU of an HGX B200
GPUS = {
    "A100": GPU(80, 2.039e12, 312e12),
    "H100": GPU(90, 3.35e12, 989e12),
    "H200": GPU(90, 4.8e12, 989e12),
    "B200": GPU(100, 8.0e12, 2250e12),
}


@dataclass
class Kernel:
    """What the compiler made of one specialisation for one architecture; sizes in bytes, widths in bits."""

    family: str
    name: str
    arch: int | str  # a compute capability, or AMD's target
    registers: int  # AMD's vector registers
    spilled: int  # of a thread, AMD's scratch among it
    shared: int
    loads: list[int]  # the widths that occur, ascending
    stores: list[int]


class Case(NamedTuple):
    """A case of the benchmark on a GPU: the fewest bytes, those that the launches move, and the products' FLOP."""

    op: str
    work: str
    shape: str
    fewest: float
    moved: float
    flops: float = 0.0

    def predicted(self, gpu: GPU) -> float:
        return max(self.moved / gpu.bandwidth, self.flops / gpu.rate)


def cases() -> Iterator[Case]:
    """By the launchers: each launch reads its arrays once and writes its results once, from and to the memory."""
    logits = 2 * 8192 * 151_936
    shape = "8,192 × 151,936 bfloat16"
    yield Case("token_logprobs", "forward", shape, logits, logits)
    yield Case("token_stats", "forward, entropy", shape, logits, logits)
    for work in ("forward + backward", "forward + in-place backward"):
        yield Case("token_logprobs", work, shape, 3 * logits, 3 * logits)
    yield Case("token_stats", "forward + backward, entropy", shape, 3 * logits, 3 * logits)
    yield from _head_cases(8192, 4096, 131_072)
    tokens = 2**20
    # the mask is read twice: first to count each trajectory's tokens
    yield Case(
        "policy_loss",
        "forward + backward, grpo with KL",
        "1,048,576 tokens, 1,024 trajectories",
        17 * tokens,
        18 * tokens,
    )
    pack = 4 * 4096 * 256
    # the deviations' float64 columns are one a reference token, written once and read by every member of the group
    shape = "4,096 rollouts of 256 tokens, groups of 8"
    yield Case("reflection_rewards", "forward", shape, 3 * pack, 4 * pack + pack / 4)
    for count in (65_536, 1_000_000, 10_000_000):
        yield Case("spread", "forward", f"{count:,} tokens", 4 * count, 4 * count)
        held = 4 * count // 2  # half of the tokens lie in a span
        for op in ("sum", "max"):
            yield Case("span_reduce", "forward", f"{op}, {count:,} tokens", held, held)


def _head_cases(rows: int, width: int, vocabulary: int) -> Iterator[Case]:
    """Float32 logits in the default workspace; the weight is read once for every block of rows."""
    shape = f"{rows:,} × {width:,} × {vocabulary:,} bfloat16"
    hidden, weight, logits = 2 * rows * width, 2 * vocabulary * width, 4 * rows * vocabulary
    product = 2 * rows * width * vocabulary
    columns, workspace = 32_768, 2**28
    blocks = -(-rows // (workspace // (4 * columns)))
    forward = blocks * weight + -(-vocabulary // columns) * hidden + 2 * logits
    yield Case("linear_logprobs", "forward", shape, hidden + weight, forward, product)
    step = head_model.default_step(rows, width, vocabulary)
    fewest = 2 * (hidden + weight)
    yield Case("linear_policy_loss", "forward + backward", shape, fewest, step.moved, step.flops)


def triton_kernels(archs: list[int | str], families: set[str], folder: Path) -> Iterator[Kernel]:
    import triton

    from trajkern._bench import kernels

    chosen = [v for v in kernels.VARIANTS if family_of(v.kernel.fn.__module__) in families]
    for number, variant in enumerate(chosen):
        _progress(f"triton {number + 1}/{len(chosen)} {variant.kernel.__name__}")
        for arch in archs:
            compiled = kernels.compiled(variant, arch)
            if isinstance(arch, int):
                cubin = folder / "kernel.cubin"
                cubin.write_bytes(compiled.asm["cubin"])
                (code,) = read_cubin(cubin, str(triton.knobs.nvidia.cuobjdump.path))
            else:
                code = read_amdgcn(compiled.asm["amdgcn"])
            name = f"{variant.kernel.__name__} {variant.name}".strip()
            shared = compiled.metadata.shared
            yield Kernel(
                family_of(variant.kernel.fn.__module__),
                name,
                arch,
                code.registers,
                code.spilled,
                shared,
                code.loads,
                code.stores,
            )


def cuda_kernels(archs: list[int], families: set[str], folder: Path, nvcc: str, dump: str) -> Iterator[Kernel]:
    files = [path for path in sorted(SOURCES.glob("*.cu")) if path.stem in families]

    def built(job: tuple[Path, int]) -> Path:
        source, arch = job
        cubin = folder / f"{source.stem}.{arch}.cubin"
        command = [nvcc, "-cubin", f"-arch=sm_{arch}", "-O3", "-std=c++17", f"-I{SOURCES.parent}"]
        subprocess.run([*command, str(source), "-o", str(cubin)], check=True, capture_output=True)
        return cubin

    jobs = [(source, arch) for source in files for arch in archs]
    with ThreadPoolExecutor(2) as pool:
        for (source, arch), cubin in zip(jobs, pool.map(built, jobs), strict=True):
            _progress(f"nvcc {source.name} sm_{arch}")
            for code in read_cubin(cubin, dump):
                yield Kernel(source.stem, _plain(code.name), arch, *code[1:])


class Code(NamedTuple):
    """One kernel's machine code, read."""

    name: str
    registers: int
    spilled: int
    shared: int
    loads: list[int]
    stores: list[int]


def read_cubin(cubin: Path, dump: str) -> list[Code]:
    def said(option: str) -> str:
        return subprocess.run([dump, option, str(cubin)], check=True, capture_output=True, text=True).stdout

    return read_code(said("--dump-resource-usage"), said("--dump-sass"))


def read_code(usage: str, sass: str) -> list[Code]:
    """From what cuobjdump prints: resources by function, and the machine code of each."""
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*\.\.\.\.|\Z|Function : )", sass, re.DOTALL))
    rows = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return [
        Code(
            name, int(registers), int(stack) + int(local), int(shared), *(_widths(code[name], x) for x in ("LD", "ST"))
        )
        for name, registers, stack, shared, local in rows
    ]


def read_amdgcn(text: str) -> Code:
    """From the assembly that becomes an hsaco: its metadata, and the widths of its accesses to global memory."""
    numbers = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
    # a spilled scalar register that found a lane of a vector register has no scratch
    spilled = max(numbers["private_segment_fixed_size"], 4 * numbers["vgpr_spill_count"])
    name = re.findall(r"^\s+\.name:\s+(\w+_kernel)$", text, re.M)[-1]
    sizes = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16}
    widths = (
        sorted({sizes.get(kind, 8) for kind in re.findall(rf"\b(?:global|buffer)_{way}_([a-z0-9]+)", text)})
        for way in ("load", "store")
    )
    return Code(name, numbers["vgpr_count"], spilled, numbers["group_segment_fixed_size"], *widths)


def _widths(sass: str, kind: str) -> list[int]:
    """Bits of one thread's global loads or stores: LDG.E.128, LDG.E.64, LDG.E (32), LDG.E.U16, LDG.E.U8."""
    suffixes = re.findall(rf"\b{kind}G((?:\.\w+)*)", sass)
    sizes = (re.search(r"\.(?:[US])?(256|128|64|16|8)\b", suffix) for suffix in suffixes)
    return sorted({int(size[1]) if size else 32 for size in sizes})


def family_of(module: str) -> str:
    """The family of a kernel's module, which bears its name or begins with it."""
    name = module.rpartition(".")[2]
    return next(family for family in _FAMILIES if name == family or name.startswith(f"{family}_"))


def _plain(mangled: str) -> str:
    """The kernel's name and template arguments without namespaces, result and parameters."""
    program = shutil.which("c++filt")
    full = subprocess.run([program, mangled], capture_output=True, text=True).stdout.strip() if program else mangled
    return plain(full)


def plain(full: str) -> str:
    short = re.sub(r"\(anonymous namespace\)::|\b\w+::|^void ", "", full)
    depth = 0
    for at, character in enumerate(short):
        depth += (character == "<") - (character == ">")
        if character == "(" and not depth:
            return short[:at]
    return short


def measurements(folder: Path) -> dict[tuple[str, str, str], dict[str, float]]:
    """(op, work, shape) -> GPU's folder -> median seconds, by the results of ``make gpu-check`` that are there."""
    medians: dict[tuple[str, str, str], dict[str, float]] = {}
    for path in sorted(folder.glob("*/*.json")):
        report = json.loads(path.read_text())
        stages = report.get("stages", {}) if isinstance(report, dict) else {}
        found = [stage.get("results") for name, stage in stages.items() if name.startswith(("timings", "benchmark"))]
        for case in (case for x in found if isinstance(x, dict) for case in x.get("cases", ())):
            if ours := case["seconds"].get("trajkern"):
                medians.setdefault((case["op"], case["work"], case["shape"]), {})[path.parent.name] = ours["median"]
    return medians


def text(kernels: list[Kernel], chosen: list[Case], measured: dict[tuple[str, str, str], dict[str, float]]) -> str:
    """For a terminal of 80 columns."""
    lines = [f"{'kernel':<40}{'arch':>8}{'regs':>6}{'spill':>6}{'shared':>8}{'load':>6}{'store':>6}"]
    family = None
    for k in kernels:
        if k.family != family:
            family = k.family
            lines += ["", family]
        widths = "".join(f"{max(x):>6}" if x else "     –" for x in (k.loads, k.stores))
        lines.append(f"  {k.name[:38]:<38}{k.arch:>8}{k.registers:>6}{k.spilled:>6}{k.shared:>8}{widths}")
    lines += ["", "load, store: bits of a thread's widest access; spill, shared: bytes"]
    lines += ["", "cases: bytes of all launches, in times of what no program avoids, and the times"]
    lines += ["that the data sheets' bandwidth and bfloat16 rate allow for them"]
    for case in chosen:
        lines += ["", *textwrap.wrap(f"{case.op}, {case.work}: {case.shape}", WIDTH, subsequent_indent="  ")]
        times = "".join(f"  {name} {seconds(case.predicted(gpu))}" for name, gpu in GPUS.items())
        lines.append(f"  {case.moved / 1e9:.3g} GB  {case.moved / case.fewest:.2f} ×{times}")
        lines += [f"  measured, {name}: {seconds(median)}" for name, median in measured.get(case[:3], {}).items()]
    if any(case.op == "linear_policy_loss" for case in chosen):
        lines += ["", *head_model.lines()]
    return "\n".join(lines) + "\n"


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line[:78]:<78}", end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        results.check_takes("--json", args.json)
        return _run(args)
    except results.Refused as reason:
        say(f"trajkern bench --static: {reason}")
        return 2


def _run(args: argparse.Namespace) -> int:
    archs, families = args.arch or [*ARCHS, *AMD_TARGETS], set(args.op or _FAMILIES)
    kernels: list[Kernel] = []
    with tempfile.TemporaryDirectory() as name:
        try:
            kernels += triton_kernels(archs, families, Path(name))
        except ImportError as error:
            print(f"trajkern bench --static: no Triton kernels: {error}", file=sys.stderr)
        nvcc, dump = shutil.which("nvcc"), shutil.which("cuobjdump") or _tritons_dump()
        if nvcc and dump and SOURCES.is_dir():
            kernels += cuda_kernels([x for x in archs if isinstance(x, int)], families, Path(name), nvcc, dump)
        else:
            missing = "a checkout of the sources" if nvcc and dump else "nvcc" if dump else "cuobjdump"
            print(f"trajkern bench --static: no CUDA kernels without {missing}", file=sys.stderr)
    _progress("")
    chosen = [case for case in cases() if _owner(case.op) in families]
    measured = measurements(ROOT / "results")
    kernels.sort(key=lambda k: (_FAMILIES.index(k.family), k.name, isinstance(k.arch, str), k.arch))
    print(text(kernels, chosen, measured), end="")
    if args.json:
        rows = [case._asdict() | {name: case.predicted(gpu) for name, gpu in GPUS.items()} for case in chosen]
        content = json.dumps({"kernels": [asdict(k) for k in kernels], "cases": rows}, indent=1) + "\n"
        results.write("--json", args.json, content)
    return 0 if kernels and not any(k.spilled for k in kernels) else 1


def _owner(op: str) -> str:
    from trajkern._bench.case import OPS

    return OPS[op].family


def _tritons_dump() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.knobs.nvidia.cuobjdump.path)


_FAMILIES = ("logprob", "head", "divergence", "topk", "policy_loss", "reflection", "advantage", "span", "tree")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="trajkern bench --static", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument(
        "--op",
        choices=_FAMILIES,
        action="extend",
        nargs="+",
        metavar="FAMILY",
        help=f"only these: {', '.join(_FAMILIES)}",
    )
    parser.add_argument(
        "--arch",
        type=lambda x: int(x) if x.isdigit() else x,
        choices=(*ARCHS, *AMD_TARGETS),
        action="extend",
        nargs="+",
        help="default: all",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
