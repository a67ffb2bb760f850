"""The parts of `make gpu-check` that need no GPU: its refusals, its stages' limits and its reports."""

from __future__ import annotations

import importlib.util
import json
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
    found = [done for _, done in gpu_check.run_all(list(stages), time.monotonic() + 600, {"KNOB": "90"})]
    assert [done["status"] for done in found[::2]] == [None] * len(stages)  # a stage is named before it runs
    return found[1::2]


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


def _options(command: list[str]) -> tuple[str, list[str]]:
    """The module that a stage runs, and its options."""
    at = next(i for i, word in enumerate(command) if word.endswith("checkout.py")) + 1
    end = at + 2 if command[at] == "trajkern" else at + 1
    return " ".join(command[at:end]), [x.partition("=")[0] for x in command[end:] if x.startswith("--")]


@pytest.mark.slow
def test_the_stages_are_commands_that_exist(gpu_check, tmp_path: Path) -> None:
    """Every option of a stage is known to its command, every file is there, and the limits fit."""
    plan = gpu_check.stages(tmp_path, tmp_path / "report.html")
    names = [stage.name for stage in plan]
    timed = [f"timings-{x}" for x in ("head", "logprob", "advantage", "policy_loss", "tree", "span", "reflection")]
    first = ["smoke", "build", "smoke-native", "numerics", *timed, "held", "memcheck", "racecheck"]
    assert names == [*first, "workspace", "benchmark"]
    limits = {stage.name: stage.limit for stage in plan}
    assert sum(limits[name] for name in timed) == 80 and sum(limits[name] for name in first) < gpu_check.SECONDS
    known: dict[str, str] = {}
    for stage in plan:
        if any(word.endswith("checkout.py") for word in stage.command):
            program, options = _options(stage.command)
            if program not in known:
                asked = [sys.executable, str(SCRIPT.parent / "checkout.py"), *program.split(), "--help"]
                known[program] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
            assert all(option in known[program] for option in options), stage.command
        for word in stage.command:
            assert not word.startswith("tests/") or (SCRIPT.parents[1] / word).exists()
    for stage in plan:
        if stage.name in ("memcheck", "racecheck"):
            assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} and "--kernel-name" not in stage.command


@pytest.mark.slow
def test_what_is_sanitized_launches_every_kernel(gpu_check) -> None:
    pytest.importorskip("triton")
    from tests.device_watch import HostRead
    from tests.test_launches import _watched_both_ways
    from trajkern._bench.kernels import VARIANTS
    from trajkern.testing import spec_of

    launched: set[str] = set()
    for op in gpu_check.SANITIZED:
        for case in spec_of(op).cases:
            if not case.large:
                try:
                    launched.update(*(watch.launches for watch in _watched_both_ways(spec_of(op), case)))
                except HostRead:  # the head's, which is told apart below
                    continue
    of_the_head = {"fold_kernel", "gradient_kernel"}
    missing = {v.kernel.__name__ for v in VARIANTS} - {name.removeprefix("triton::") for name in launched}
    assert missing <= of_the_head and "linear_token_stats" in gpu_check.SANITIZED


def test_a_late_stage_is_interrupted_and_keeps_its_output(gpu_check) -> None:
    code = "import time\ntry:\n  print('begun'); time.sleep(60)\nexcept KeyboardInterrupt:\n  print('told')"
    (done,) = _run(gpu_check, _python(gpu_check, code, limit=3))
    assert done["timed_out"] and done["tail"] == ["begun", "told"]


def test_a_missing_report_is_an_error(gpu_check, tmp_path: Path) -> None:
    (done,) = _run(gpu_check, _python(gpu_check, "", report=tmp_path / "none.json"))
    assert done["status"] == 0 and "no report" in done["error"]
    assert not gpu_check.passed({"stages": {"a": done}})


def test_a_line_that_was_cut_off_is_left_out(gpu_check, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert gpu_check.read_lines(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}]


def test_every_test_is_a_line(gpu_check, tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('why')\n"
    )
    lines = tmp_path / "lines.jsonl"
    command = [sys.executable, str(SCRIPT.parent / "gpu_tests.py"), str(lines), "-q", "-p", "no:cacheprovider"]
    subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True)
    cases = {case["test"].split("::")[1]: case for case in gpu_check.read_lines(lines)}
    assert {name: case["outcome"] for name, case in cases.items()} == {
        "test_a": "passed",
        "test_b": "failed",
        "test_c": "skipped",
    }
    assert "assert 1 == 2" in cases["test_b"]["why"] and cases["test_a"]["why"] is None


@pytest.mark.slow
def test_smoke_and_the_timings_run_from_a_checkout(tmp_path: Path) -> None:
    """Two of the stages' own programs, on the CPU, in a small family."""
    checkout, lines = str(SCRIPT.parent / "checkout.py"), tmp_path / "smoke.jsonl"
    smoke = [sys.executable, checkout, "trajkern._bench.smoke", "--device", "cpu", "--op", "span"]
    done = subprocess.run([*smoke, "--results", str(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["op"] for row in rows] == ["span_reduce", "spread"] and all(row["passed"] for row in rows)
    assert done.stdout.count("ok   ") == 2
    report = tmp_path / "timings.json"
    options = ["--quick", "--ungated", "--op", "span_reduce", "--json", str(report)]
    done = subprocess.run([sys.executable, checkout, "trajkern._bench", *options], capture_output=True, text=True)
    assert done.returncode == 0 and "Nothing was compared with float64" in " ".join(done.stdout.split())
    assert not json.loads(report.read_text())["gated"]


def test_smoke_says_what_fails_and_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from trajkern._bench import smoke

    good, bad = ({"x": torch.ones(3)}, {"x": torch.ones(3)}), ({"x": torch.zeros(3)}, {"x": torch.ones(3)})
    planned = [("a", "1", lambda: bad), ("b", "1", lambda: 1 / 0), ("c", "1", lambda: good)]
    monkeypatch.setattr(smoke, "_planned", lambda families, device: iter(planned))
    assert smoke.main(["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["FAIL a", "FAIL b", "ok   c"]
    assert "too much" in lines[0] and "ZeroDivisionError" in lines[1]


STAND_IN = """
import json, sys, time
for number in range(int(sys.argv[2])):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"number": number}) + "\\n")
    print("line", number)
    time.sleep(float(sys.argv[3]))
"""
REHEARSAL = """
import importlib.util, sys
from pathlib import Path
from types import SimpleNamespace
spec = importlib.util.spec_from_file_location("gpu_check", sys.argv[1])
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)
gpu_check.GRACE = 2
gpu = SimpleNamespace(name="NVIDIA Slow 1", major=9, minor=0, total_memory=1, multi_processor_count=1)
def plan(folder, page):
    def stage(name, limit, lines, pause):
        file = folder / f"{name}.jsonl"
        command = [sys.executable, "-u", "-c", sys.argv[3], str(file), str(lines), str(pause)]
        return gpu_check.Stage(name, command, limit, file)
    quick = [stage(x.name, 60, 2, 0) for x in gpu_check.stages(folder, page)[:4]]
    return [*quick, stage("late", 3, 100, 0.5), stage("next", 60, 1, 0), stage("killed", 60, 200, 0.3)]
sys.exit(gpu_check.check(gpu, Path(sys.argv[2]), plan))
"""


def test_killed_in_the_middle_the_result_is_whole_up_to_there(tmp_path: Path) -> None:
    """Slow stand-ins for the stages: one outlasts its limit and costs only itself; then everything is killed."""
    command = [sys.executable, "-u", "-c", REHEARSAL, str(SCRIPT), str(tmp_path), STAND_IN]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "gpu-check: killed" in said[-2:][0] and "line 0" in line:
            break
    time.sleep(1)
    process.kill()
    process.wait()
    (path,) = (tmp_path / "nvidia-slow-1").glob("*.json")
    assert str(path) in said[0]  # where the results go is said first
    result = json.loads(path.read_text())
    *done, late, after, killed = result["stages"].items()
    assert [name for name, _ in done] == ["smoke", "build", "smoke-native", "numerics"]
    assert all(x["status"] == 0 and len(x["results"]) == 2 for _, x in done)
    assert late[1]["timed_out"] and late[1]["status"] != 0 and 3 <= len(late[1]["results"]) <= 12
    assert after[1]["status"] == 0 and not after[1]["timed_out"]
    assert killed[0] == "killed" and killed[1]["status"] is None and "results" not in killed[1]
    lines = path.with_suffix("") / "killed.jsonl"
    assert len(lines.read_text().splitlines()) >= 2 and result["machine"]["gpu"] == "NVIDIA Slow 1"
