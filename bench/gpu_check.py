"""`make gpu-check`: on a machine with an NVIDIA GPU and no network, build in place, test, and measure.

Everything goes into one JSON file, OUT/<gpu>/<date>.json, rewritten after every stage, so that a stage that fails or
runs out of time costs nothing but itself; the benchmark's report stands beside it as .html. The GPU's copy bandwidth
and GEMM rate are the benchmark's "ceilings". Exit status: 0 all stages passed, 1 some did not, 2 there is no GPU.
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
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 590  # for everything
GRACE = 10  # seconds between asking a stage to stop and killing it
TAIL = 60  # lines of a stage's output that are kept


class Stage(NamedTuple):
    name: str
    command: list[str]
    limit: float  # seconds, less where less is left
    report: Path | None = None  # the file it leaves
    read: Callable[[Path], Any] | None = None


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


def read_junit(path: Path) -> list[dict[str, Any]]:
    """Every test of a pytest run: its name, outcome, seconds, and why it did not pass."""
    cases = []
    for case in ET.parse(path).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        cases.append(
            {
                "test": f"{case.get('classname')}::{case.get('name')}",
                "outcome": "passed" if problem is None else problem.tag,
                "seconds": float(case.get("time", 0)),
                "why": None if problem is None else f"{problem.get('message')}\n{problem.text or ''}"[:2000],
            }
        )
    return cases


def tests(device: str, limit: float, folder: Path) -> Stage:
    name = f"tests-{device}"
    report = folder / f"{name}.xml"
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-m", "not slow", "--device", device]
    if importlib.util.find_spec("xdist"):  # a broken GPU context then fails one worker's tests, not all
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    return Stage(name, [*command, f"--junitxml={report}"], limit, report, read_junit)


def sanitizer(tool: str, limit: float) -> Stage:
    """compute-sanitizer over the package's own CUDA kernels on the registry's cases in float32."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    ours = ["--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=tk"]
    code = (
        "from trajkern.validate import main; import sys;"
        " sys.exit(main(['--device', 'cuda', '--dtype', 'float32', '--op', 'group_advantages',"
        " '--op', 'subtree_reduce', '--op', 'span_reduce', '--op', 'spread']))"
    )
    return Stage(tool, [program, *ours, sys.executable, "-c", code], limit)


def stages(folder: Path, page: Path) -> list[Stage]:
    """The most telling first, since a late one gets only the time that is left; ``page`` is the benchmark's report."""
    build = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "-v", "-e", "."]
    cli = [sys.executable, "-m", "trajkern"]
    report, validation = folder / "benchmark.json", folder / "validation.json"
    validate = [*cli, "validate", "--device", "cuda", "--json", str(validation)]
    benchmark = [*cli, "bench", "--device", "cuda", "--peers", "--growth", "--json", str(report)]
    if importlib.util.find_spec("matplotlib"):
        benchmark += ["--html", str(page)]
    return [
        Stage("build", build, 120),
        tests("cuda", 180, folder),
        Stage("validation", validate, 60, validation, read_json),
        Stage("benchmark", benchmark, 200, report, read_json),
        sanitizer("memcheck", 60),
        sanitizer("racecheck", 60),
        tests("cpu", 240, folder),
    ]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def run_all(plan: list[Stage], deadline: float, environment: dict[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, what came of it) of every stage; a report that is missing or broken is an ``error``."""
    for stage in plan:
        print(f"\ngpu-check: {stage.name}", flush=True)
        left = deadline - time.monotonic() - GRACE
        done = run(stage.command, max(1, min(stage.limit, left)), environment)
        if stage.read and stage.report:
            try:
                done["results"] = stage.read(stage.report)
            except (OSError, ValueError, ET.ParseError) as error:
                done["error"] = f"no report: {error}"
        yield stage.name, done


def passed(result: dict[str, Any]) -> bool:
    return all(done["status"] == 0 and "error" not in done for done in result["stages"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON file")
    out = parser.parse_args().out
    gpu = find_gpu()
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    path = out / name / f"{datetime.datetime.now(datetime.timezone.utc):%Y%m%d-%H%M%S}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    deadline = time.monotonic() + SECONDS
    result: dict[str, Any] = {"machine": describe_machine(gpu), "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        plan = stages(Path(folder), path.with_suffix(".html"))
        for stage, done in run_all(plan, deadline, {"TRAJKERN_CUDA": f"{gpu.major}{gpu.minor}"}):
            result["stages"][stage] = done
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(result, indent=1) + "\n")
            partial.replace(path)
    print(f"\ngpu-check: {'passed' if passed(result) else 'FAILED'}; results in {path}")
    return 0 if passed(result) else 1


if __name__ == "__main__":
    sys.exit(main())
