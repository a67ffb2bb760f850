"""The parts of `make gpu-check` that need no GPU: its refusals, its stages' limits and its reports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_gpu(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "sees no NVIDIA GPU" in done.stderr
    assert not list(tmp_path.iterdir())


def _python(gpu_check, code: str, limit: float = 60, **report) -> tuple:
    return gpu_check.Stage("stage", [sys.executable, "-u", "-c", code], limit, **report)


def _run(gpu_check, *stages) -> list[dict]:
    return [done for _, done in gpu_check.run_all(list(stages), time.monotonic() + 600, {"KNOB": "90"})]


def test_a_failed_stage_does_not_stop_the_rest(gpu_check) -> None:
    failed, passed = _run(
        gpu_check,
        _python(gpu_check, "print('no'); raise SystemExit(3)"),
        _python(gpu_check, "import os; print(os.environ['KNOB'])"),
    )
    assert (failed["status"], failed["tail"]) == (3, ["no"])
    assert (passed["status"], passed["tail"]) == (0, ["90"])
    assert gpu_check.passed({"stages": {"a": passed}})
    assert not gpu_check.passed({"stages": {"a": passed, "b": failed}})


def test_a_missing_program_costs_only_its_stage(gpu_check, tmp_path: Path) -> None:
    missing = gpu_check.Stage("memcheck", [str(tmp_path / "compute-sanitizer")], 60)
    failed, passed = _run(gpu_check, missing, _python(gpu_check, "print('yes')"))
    assert failed["status"] == 127 and "No such file" in failed["tail"][0]
    assert passed["status"] == 0


def test_the_stages_are_commands_that_exist(gpu_check, tmp_path: Path) -> None:
    """Every option of a stage is known to its command."""
    plan = gpu_check.stages(tmp_path, tmp_path / "report.html")
    names = [stage.name for stage in plan]
    assert names == ["build", "tests-cuda", "validation", "benchmark", "memcheck", "racecheck", "tests-cpu"]
    assert sum(stage.limit for stage in plan[:-1]) <= 700
    help_of = {
        name: subprocess.run([sys.executable, "-m", "trajkern", name, "--help"], capture_output=True, text=True)
        for name in ("validate", "bench")
    }
    for stage in plan:
        if "trajkern" in stage.command:
            at = stage.command.index("trajkern")
            for option in (x for x in stage.command[at + 2 :] if x.startswith("--")):
                assert option in help_of[stage.command[at + 1]].stdout


def test_a_late_stage_is_interrupted_and_keeps_its_output(gpu_check) -> None:
    code = "import time\ntry:\n  print('begun'); time.sleep(60)\nexcept KeyboardInterrupt:\n  print('told')"
    (done,) = _run(gpu_check, _python(gpu_check, code, limit=3))
    assert done["timed_out"] and done["tail"] == ["begun", "told"]


def test_a_missing_report_is_an_error(gpu_check, tmp_path: Path) -> None:
    stage = _python(gpu_check, "", report=tmp_path / "none.xml", read=gpu_check.read_junit)
    (done,) = _run(gpu_check, stage)
    assert done["status"] == 0 and "no report" in done["error"]
    assert not gpu_check.passed({"stages": {"a": done}})


def test_every_test_is_in_the_report(gpu_check, tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('why')\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    cases = {case["test"].split("::")[1]: case for case in gpu_check.read_junit(report)}
    assert {name: case["outcome"] for name, case in cases.items()} == {
        "test_a": "passed",
        "test_b": "failure",
        "test_c": "skipped",
    }
    assert "assert 1 == 2" in cases["test_b"]["why"] and cases["test_a"]["why"] is None
