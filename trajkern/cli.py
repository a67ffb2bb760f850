"""The command line: ``trajkern info``, ``validate``, ``bench`` and ``train``."""

from __future__ import annotations

import argparse
import io
import platform
import re
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import trajkern as tk
from trajkern import _ext, _start
from trajkern._backends import AMD_TARGETS, OWNERS
from trajkern._no_memory import ran_out
from trajkern._parser import Parser

WIDTH = 80
COMMANDS = {
    "info": "versions, backends and what each lacks, ops and who runs them",
    "validate": "every op on this machine against the float64 reference",
    "bench": "every op's time and memory, beside torch and other packages",
    "train": "teach a small language model to reason with GRPO (extra: train)",
}
# op -> the GPU on which its GPU kernel passed the benchmark's gate, by the results committed in bench/results
RUN_ON_GPU: dict[str, str] = {}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: the command's, 141 where who read the output has gone, as `head` does,
    1 where nothing can be written or memory ran out, 130 after Ctrl-C."""
    if argv is not None:
        return _ended(argv)
    try:
        status = _ended(sys.argv[1:])
    except SystemExit as left:
        if not isinstance(left.code, int):
            raise
        status = left.code
    if _start.is_program() and torch.distributed.is_available() and torch.distributed.is_torchelastic_launched():
        _start.leave(status)
    return status


def _ended(argv: list[str]) -> int:
    _start.open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of names that the terminal's encoding lacks
    try:
        _start.began()
        try:
            return _command(argv)
        finally:
            if sys.stdout is not None and not sys.stdout.closed:
                print(end="", flush=True)  # a full disk, and a pipe's end, may be met here first
    except BrokenPipeError:
        _start.forget(sys.stdout)
        return 141
    except OSError as error:
        _start.forget(sys.stdout)
        _start.say(f"trajkern: {error}")
        return 1
    except Exception as error:
        if (words := ran_out(error)) is None:
            raise
        _start.say(f"trajkern: {words}")
        return 1
    except KeyboardInterrupt:
        _start.say("trajkern: stopped by Ctrl-C")
        return 130


def _command(argv: list[str]) -> int:
    command = _parser().parse_args(argv[:1]).command  # what follows belongs to the command
    return {"info": info, "validate": validate, "bench": bench, "train": train}[command](argv[1:])


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = Parser(
        prog="trajkern",
        usage="trajkern {info,validate,bench,train} ...",
        description="Kernels for reinforcement learning of language-model agents.",
        epilog=f"commands:\n{listed}\n\n`trajkern COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trajkern {tk.__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    return parser


def train(argv: list[str]) -> int:
    from trajkern.trainer import cli_main

    return cli_main(argv)


def validate(argv: list[str]) -> int:
    from trajkern.validate import main

    return main(argv)


def bench(argv: list[str]) -> int:
    from trajkern._bench.__main__ import main

    return main(argv)


def info(argv: list[str]) -> int:
    Parser(prog="trajkern info", description=f"Print {COMMANDS['info']}.").parse_args(argv)
    print("\n".join(report()))
    return 0


def report() -> Iterator[str]:
    """The lines of ``trajkern info``."""
    yield f"trajkern {tk.__version__}"
    for title, rows in (("versions", _versions()), ("machine", _machine()), ("backends", tk.backends().items())):
        yield ""
        yield title
        for name, text in rows:
            yield from _entry(name, text, 12)
    yield ""
    yield from _ops()


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in ("torch", "triton", "numpy"):
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"


def _machine() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"
    yield "threads", f"{torch.get_num_threads()} (torch.set_num_threads changes it)"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield "gpu", ", ".join(gpus) or "none that torch sees"


def cpu_name() -> str:
    """The processor's model as the system knows it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", path.read_text(), re.M) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _ops() -> Iterator[str]:
    from trajkern.testing import SPECS

    on_rocm = torch.version.hip is not None
    yield f"{'ops':<25}{'on a CPU':<12}on an {'AMD' if on_rocm else 'NVIDIA'} GPU"
    for family, owner in OWNERS.items():
        yield f"  {family}"
        for spec in (s for s in SPECS if s.family == family):
            seen = f"run on {RUN_ON_GPU[spec.name]}" if spec.name in RUN_ON_GPU else "not yet run on a GPU"
            runs = "reference" if on_rocm and owner["cuda"] == "cuda" else owner["cuda"]
            yield f"    {spec.name:<21}{owner['cpu'] if _ext.CPU_BUILT else 'reference':<12}{runs}, {seen}"
    if on_rocm:
        yield from _entry("", "CUDA C++ does not run on ROCm: its families run as the reference's torch, gae and", 2)
        yield from _entry("", "discounted_returns one token at a time. Triton's kernels are compiled for", 2)
        yield from _entry("", f"{' and '.join(AMD_TARGETS)} in the tests, and have not run there.", 2)
    elif _ext.problem("_C_cuda"):
        yield "  On a GPU, the ops of a cuda that is not built run as the reference."


def _entry(name: str, text: str, indent: int) -> list[str]:
    first, later = f"  {name:<{indent - 2}}", " " * indent
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)
