"""`make gpu-check`: on a machine with an NVIDIA GPU and no network, what it says of the kernels, most telling first.

Smoke of Triton's kernels, the native build, smoke of what it built, numerics, timings of each family, what is held
besides, sanitizers, then the head's workspaces and the whole benchmark. Each stage has its own limit, so that one that
fails or runs out of time costs nothing but itself. OUT/<gpu>/<date>.json is rewritten before and after every stage; the
stages' own files stand in OUT/<gpu>/<date>/, which they fill as they go, and the benchmark's page beside them. Exit
status: 0 all stages passed, 1 some did not, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 590  # for everything
GRACE = 10  # seconds between asking a stage to stop and killing it
TAIL = 60  # lines of a stage's output that are kept


TIMINGS = {  # family -> seconds, the most telling first
    "head": 22,
    "logprob": 16,
    "advantage": 12,
    "policy_loss": 10,
    "tree": 8,
    "span": 6,
    "reflection": 6,
}
WORKERS = 12  # of pytest
SANITIZED = (  # ops whose cases together launch every kernel
    "linear_token_stats",
    "linear_divergence",
    "linear_topk",
    "token_stats",
    "policy_loss",
    "reflection_rewards",
    "group_advantages",
    "gae",
    "whiten",
    "span_reduce",
    "spread",
    "subtree_reduce",
    "sibling_advantages",
    "branch_coefficients",
)


class Stage(NamedTuple):
    name: str
    command: list[str]
    limit: float  # seconds, less where less is left
    report: Path | None = None  # the file it leaves, .json, or .jsonl where it adds a line at a time
    environment: dict[str, str] = {}


def output_of(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_gpu() -> Any:
    """The properties of the GPU, or the end of the program."""
    try:
        import torch
    except ImportError as error:
        sys.exit(refuse(f"{sys.executable} has no torch ({error}); name another: make gpu-check PYTHON=..."))
    if not torch.cuda.is_available():
        sys.exit(refuse(f"torch {torch.__version__} sees no NVIDIA GPU; run this on a machine that has one"))
    return torch.cuda.get_device_properties(0)


def refuse(message: str) -> int:
    print(f"gpu-check: {message}", file=sys.stderr)
    return 2


def describe_machine(gpu: Any) -> dict[str, Any]:
    import torch

    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_bytes": gpu.total_memory,
        "multiprocessors": gpu.multi_processor_count,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": (output_of("nvcc", "--version") or "").rpartition("\n")[2] or None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {name: version_of(name) for name in ("triton", "numpy", "pybind11", "pytest", "setuptools")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "commit": output_of("git", "rev-parse", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _heed_interrupts() -> None:
    """A job that a shell puts in the background starts with them ignored, and so would its stages."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(command: list[str], limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a stage, showing its output; one that outlasts its limit is interrupted, so that it can still report."""
    start, tail = time.monotonic(), []
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )
    except OSError as error:  # there is no such program
        return {
            "command": command,
            "status": 127,
            "seconds": 0.0,
            "limit": limit,
            "timed_out": False,
            "tail": [str(error)],
        }
    timers = [
        threading.Timer(limit, os.killpg, (process.pid, signal.SIGINT)),
        threading.Timer(limit + GRACE, os.killpg, (process.pid, signal.SIGKILL)),
    ]
    for timer in timers:
        timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        tail = [*tail[1 - TAIL :], line.rstrip()]
    status = process.wait()
    for timer in timers:
        timer.cancel()
    seconds = time.monotonic() - start
    return {
        "command": command,
        "status": status,
        "seconds": round(seconds, 2),
        "limit": round(limit, 1),
        "timed_out": seconds > limit,
        "tail": tail,
    }


def read_lines(path: Path) -> list[Any]:
    """What is whole of a file that gets a line of JSON at a time: whoever wrote it may have been stopped in one."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def module(name: str, *arguments: str) -> list[str]:
    """A module of the checkout, installed or not."""
    return [sys.executable, "-u", str(ROOT / "bench" / "checkout.py"), name, *arguments]


def smoke(name: str, families: tuple[str, ...], limit: float, folder: Path) -> Stage:
    lines = folder / f"{name}.jsonl"
    return Stage(name, module("trajkern._bench.smoke", "--op", *families, "--results", str(lines)), limit, lines)


def tests(name: str, arguments: list[str], limit: float, folder: Path) -> Stage:
    """pytest on the GPU; with pytest-xdist a broken GPU context fails one worker's tests, not all."""
    lines = folder / f"{name}.jsonl"
    workers = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    chosen = ["-q", "-m", "not slow", "--device", "cuda", *workers, *arguments]
    command = [sys.executable, "-u", str(ROOT / "bench" / "gpu_tests.py"), str(lines), *chosen]
    return Stage(name, command, limit, lines)


def timings(family: str, limit: float, folder: Path) -> Stage:
    """Without peers and without the float64 gate, which takes longer than the timing; what is wrong, others find."""
    report = folder / f"timings-{family}.json"
    options = ["--device", "cuda", "--quick", "--ungated", "--op", family, "--json", str(report)]
    return Stage(f"timings-{family}", module("trajkern._bench", *options), limit, report)


def sanitizer(tool: str, limit: float) -> Stage:
    """compute-sanitizer over every kernel that a registry's case in float32 launches, Triton's among them.

    torch's caching allocator would hide small overruns in the blocks that it hands out.
    """
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    watched = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    ops = [f"--op={name}" for name in SANITIZED]
    command = [*watched, *module("trajkern", "validate", "--device", "cuda", "--dtype", "float32", *ops)]
    return Stage(tool, command, limit, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def stages(folder: Path, page: Path) -> list[Stage]:
    """The most telling first: a late one gets only the time that is left. ``page`` is the benchmark's report."""
    build = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-v", "-e", "."]
    report, sweep = folder / "benchmark.json", folder / "workspace.jsonl"
    benchmark = module("trajkern._bench", "--device", "cuda", "--peers", "--growth", "--json", str(report))
    if importlib.util.find_spec("matplotlib"):
        benchmark += ["--html", str(page)]
    held = ["tests/test_invariance.py", "tests/test_contract.py", "tests/test_launches.py"]
    return [
        smoke("smoke", ("head", "divergence", "topk", "logprob", "policy_loss", "reflection"), 20, folder),
        Stage("build", build, 120),
        smoke("smoke-native", ("advantage", "span", "tree"), 15, folder),
        tests("numerics", ["tests/test_numerics.py"], 60, folder),
        *(timings(family, limit, folder) for family, limit in TIMINGS.items()),
        tests("held", held, 60, folder),
        sanitizer("memcheck", 60),
        sanitizer("racecheck", 40),
        Stage("workspace", module("trajkern._bench.workspace", "--results", str(sweep)), 40, sweep),
        Stage("benchmark", benchmark, 300, report),
    ]


def run_all(plan: list[Stage], deadline: float, environment: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what came of it) of every stage, before it runs and after; a missing or broken report is an ``error``."""
    for stage in plan:
        print(f"\ngpu-check: {stage.name}", flush=True)
        left = max(1, deadline - time.monotonic() - GRACE)
        yield stage.name, {"command": stage.command, "limit": min(stage.limit, left), "status": None}
        done = run(stage.command, min(stage.limit, left), {**environment, **stage.environment})
        if stage.report:
            try:
                done["results"] = (read_lines if stage.report.suffix == ".jsonl" else read_json)(stage.report)
            except (OSError, ValueError) as error:
                done["error"] = f"no report: {error}"
        yield stage.name, done


def succeeded(done: dict[str, Any]) -> bool:
    return done["status"] == 0 and "error" not in done


def passed(result: dict[str, Any]) -> bool:
    return all(map(succeeded, result["stages"].values()))


def check(gpu: Any, out: Path, plan_of: Callable[[Path, Path], list[Stage]]) -> int:
    """Run the stages that ``plan_of`` makes for a folder of their files and for the benchmark's page."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    path = out.absolute() / name / f"{datetime.datetime.now(datetime.timezone.utc):%Y%m%d-%H%M%S}.json"
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    print(f"gpu-check: results go to {path}, those of single stages to {folder}, as they come", flush=True)
    deadline = time.monotonic() + SECONDS
    result: dict[str, Any] = {"machine": describe_machine(gpu), "stages": {}}
    plan = plan_of(folder, path.with_suffix(".html"))
    for stage, done in run_all(plan, deadline, {"TRAJKERN_CUDA": f"{gpu.major}{gpu.minor}"}):
        result["stages"][stage] = done
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)
    for stage, done in result["stages"].items():
        print(f"gpu-check: {'ok  ' if succeeded(done) else 'FAIL'} {stage}, {done['seconds']:.0f} s")
    print(f"\ngpu-check: {'passed' if passed(result) else 'FAILED'}; results in {path}")
    return 0 if passed(result) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    return check(find_gpu(), parser.parse_args().out, stages)


if __name__ == "__main__":
    sys.exit(main())
