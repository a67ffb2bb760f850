"""The command line, as a user meets it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import trajkern as tk
from trajkern import cli
from trajkern.testing import SPECS

RESULTS = Path(__file__).parent.parent / "bench" / "results"


def trajkern(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "trajkern", *args], capture_output=True, text=True)


def test_info_in_a_fresh_process() -> None:
    done = trajkern("info")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"trajkern {tk.__version__}"
    assert max(map(len, lines)) <= cli.WIDTH
    words = done.stdout.split()
    for name in (*tk.backends(), *(spec.name for spec in SPECS)):
        assert name in words


def test_info_says_which_ops_never_ran_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "RUN_ON_GPU", {"token_stats": "NVIDIA H200"})
    lines = {line.split()[0]: line for line in cli.report() if line.startswith("    ")}
    assert lines["token_stats"].endswith("triton, run on NVIDIA H200")
    assert lines["gae"].endswith("cuda, not yet run on a GPU")


def test_ops_that_ran_on_a_gpu_are_those_with_a_committed_result() -> None:
    passed = set()
    for path in RESULTS.rglob("*.json"):
        saved = json.loads(path.read_text())
        report = saved.get("stages", {}).get("benchmark", {}).get("results", saved)  # as gpu-check wraps it
        if report.get("device") == "cuda":
            passed |= {
                (case["op"], report["machine"]["gpu"]) for case in report["cases"] if case["gate"]["trajkern"]["passed"]
            }
    assert set(cli.RUN_ON_GPU) == {op for op, _ in passed}
    assert set(cli.RUN_ON_GPU.items()) <= passed


def test_backend_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tk, "backends", lambda: {"cuda": "not built; install nvcc, then `pip install .`"})
    assert "  cuda      not built; install nvcc, then `pip install .`" in list(cli.report())


@pytest.mark.parametrize(
    "argv, meant",
    [
        (["vaildate"], "; did you mean 'validate'?"),
        (["bench", "--quik"], "; did you mean '--quick'?"),
        (["bench", "--quik=2"], "; did you mean '--quick'?"),
        (["validate", "--op", "policy_los"], "; did you mean 'policy_loss'?"),
        (["validate", "--wholly-else"], ";"),
        (["validate", "left", "over"], ";"),
    ],
)
def test_a_misspelt_flag_or_choice_is_told_what_was_meant(
    argv: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.endswith(f"{meant} --help lists what there is")
    assert line.startswith("trajkern") and line.count("did you mean") == meant.count("did you mean")


def test_help_lists_the_commands() -> None:
    done = trajkern("--help")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= cli.WIDTH
    for command, text in cli.COMMANDS.items():
        assert f"  {command:<10}{text}" in done.stdout.splitlines()


@pytest.mark.parametrize("args", [["validat"], [], ["info", "--colour"]], ids=["unknown", "none", "unknown-flag"])
def test_what_it_cannot_read_ends_with_status_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trajkern") and line.endswith(" --help lists what there is")


def test_unknown_command_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["validat"])
    error = capsys.readouterr().err
    assert "'validat'" in error
    assert all(command in error for command in cli.COMMANDS)


def test_train_gets_its_arguments_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    trainer = types.ModuleType("trajkern.trainer")
    trainer.cli_main = lambda argv: seen.append(argv) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trajkern.trainer", trainer)
    assert cli.main(["train", "--help", "--steps", "3", "info"]) == 3
    assert seen == [["--help", "--steps", "3", "info"]]


def test_info_does_not_load_the_trainer() -> None:
    code = "import sys; from trajkern.cli import main; main(['info']); sys.exit('trajkern.trainer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


FAILING_OUTPUT = """
import os, signal, sys
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
reader, writer = os.pipe()
os.close(reader)
os.dup2(writer if sys.argv[1] == "pipe" else os.open("/dev/full", os.O_WRONLY), 1)
os.execv(sys.executable, [sys.executable, "-m", "trajkern", *sys.argv[2:]])
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's device that is always full")
@pytest.mark.parametrize(("output", "status"), [("pipe", 141), ("disk", 1)])
@pytest.mark.parametrize("args", [["info"], ["validate", "--op", "gae", "--intensity", "0"]])
def test_an_output_that_takes_nothing_ends_a_command_without_a_traceback(
    args: list[str], output: str, status: int
) -> None:
    done = subprocess.run([sys.executable, "-c", FAILING_OUTPUT, output, *args], stderr=subprocess.PIPE, text=True)
    said = "" if output == "pipe" else "trajkern: [Errno 28] No space left on device\n"
    assert (done.returncode, done.stderr) == (status, said)


def test_what_the_outputs_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(cli, "report", lambda: ["café \udcff"])
    assert cli.main(["info"]) == 0
    assert written.getvalue() == b"caf\\xe9 \\udcff\n"


def test_ctrl_c_ends_a_command_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "report", stopped)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr() == ("", "trajkern: stopped by Ctrl-C\n")


AT_AN_IMPORT = """
import signal, sys
class Finder:
    left = {left}
    def find_spec(self, *_):
        if "trajkern._start" in sys.modules:
            Finder.left -= 1
            if not Finder.left:
                signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("left", [5, 400])
@pytest.mark.parametrize("start", [["-m", "trajkern"], ["{folder}/trajkern"]], ids=["module", "script"])
def test_ctrl_c_during_the_imports_ends_in_a_line(left: int, start: list[str], tmp_path: Path) -> None:
    """Of torch and of the package, before a command has begun."""
    (tmp_path / "sitecustomize.py").write_text(AT_AN_IMPORT.format(left=left))
    (tmp_path / "trajkern").write_text("import sys\nfrom trajkern.cli import main\nsys.exit(main())\n")
    command = [sys.executable, *(word.format(folder=tmp_path) for word in start), "info"]
    paths = os.pathsep.join([str(tmp_path), str(Path(tk.__file__).parent.parent)])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "trajkern: stopped by Ctrl-C\n")


@pytest.mark.parametrize("rank", [False, True])
def test_a_rank_leaves_without_the_interpreters_end(rank: bool, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'the end')\n")
    paths = os.pathsep.join([str(tmp_path), str(Path(tk.__file__).parent.parent)])
    environment = os.environ | {"PYTHONPATH": paths} | ({"TORCHELASTIC_RUN_ID": "1"} if rank else {})
    for words, status in ((["info"], 0), (["train", "--recipe", "nothing"], 2)):
        command = [sys.executable, "-m", "trajkern", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == status and done.stdout.endswith("the end\n") != rank
        assert (done.stderr if status else done.stdout).startswith("trajkern")


def test_a_program_that_imports_the_package_keeps_its_ctrl_c() -> None:
    code = "import signal, trajkern; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
