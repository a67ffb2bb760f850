"""Signals, the lock on the results' folder, files that fail, and steps that train nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trajkern.trainer import cli_main, idle, report
from trajkern.trainer import config as configuration
from trajkern.trainer import train as training
from trajkern.trainer.checkpoint import load
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.folder import CHECKPOINT, LOCK, WARM, Folder, ResultsError
from trajkern.trainer.report import Display
from trajkern.trainer.stopping import Interrupted, interruptible

Make = Callable[..., TrainConfig]
HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 1 on elsewhere", file=file, flush=True)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_heeded_once(number: int) -> None:
    told: list[int] = []
    before = signal.signal(number, lambda n, frame: told.append(n))
    try:
        own = signal.getsignal(number)
        with interruptible(patient=False) as interrupt:
            assert not interrupt.is_set()
            signal.raise_signal(number)
            assert interrupt.is_set() and interrupt.number == number and not told
            signal.raise_signal(number)
            assert told == [number], "a second one does what it did before"
        assert signal.getsignal(number) is own
        with interruptible(patient=True) as interrupt:
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert interrupt.is_set() and told == [number]
    finally:
        signal.signal(number, before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_tasks_child_ends_by_a_signal(number: int) -> None:
    with interruptible(patient=False) as interrupt:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        assert child.pid is not None
        os.kill(child.pid, number)
        child.join(30)
        assert child.exitcode == -number and not interrupt.is_set()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_tasks_child_does_not_hold_the_folder(config: Make) -> None:
    run = config()
    folder = Folder.of(run)
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    child = context.Process(target=lambda: (begun.set(), time.sleep(60)))
    child.start()
    try:
        assert begun.wait(30)
        with pytest.raises(ValueError, match="out must be a folder that no other run works in"):
            Folder.of(run)
        folder.close()
        Folder.of(run).close()
    finally:
        child.terminate()
        child.join()


def test_a_signal_that_was_ignored_still_is() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(patient=False) as interrupt:
            signal.raise_signal(signal.SIGHUP)
            assert not interrupt.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_the_exit_status_is_the_signals(
    number: int, status: int, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(config: TrainConfig, folder: list[Path]) -> None:
        raise Interrupted(Path("there"), number)

    monkeypatch.setattr(training, "trained", stopped)
    assert cli_main([]) == status
    assert capsys.readouterr().err == f"stopped by {word}; continue with --resume there\n"


def test_two_runs_cannot_share_a_folder(config: Make) -> None:
    with contextlib.closing(Folder.of(config())) as first:
        with pytest.raises(ValueError, match=f"no other run works in; {first.path} is process"):
            Folder.of(config())
        with contextlib.closing(Folder.of(config("other"))) as other:
            assert other.path != first.path
    Folder.of(config()).close()


def test_a_dead_process_holds_no_lock(config: Make) -> None:
    settings = config()
    settings.out.mkdir()
    command = [sys.executable, "-S", "-c", HOLD, str(settings.out / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="no other run works in; .* is process 1 on elsewhere's"):
            Folder.of(settings)
        other.kill()
    Folder.of(settings).close()


def test_default_folders_are_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as open_folders:
        paths = [open_folders.enter_context(contextlib.closing(Folder.of(TrainConfig()))).path.name for _ in range(3)]
    assert paths == ["chain_sum-grpo-seed0", "chain_sum-grpo-seed0-2", "chain_sum-grpo-seed0-3"]


def test_what_a_killed_save_left_goes_at_the_next_start(config: Make) -> None:
    left = config().out / f"{WARM}.part"
    left.mkdir(parents=True)
    (left / ".tmp1").write_bytes(b"half")
    Folder.of(config()).close()
    assert not left.exists()


@pytest.mark.parametrize("way", ["out", "parent", "lock"])
def test_a_file_in_the_way(config: Make, way: str) -> None:
    settings = config("folder/run")
    where = {"out": settings.out, "parent": settings.out.parent, "lock": settings.out / "lock"}[way]
    where.parent.mkdir(parents=True, exist_ok=True)
    where.mkdir() if way == "lock" else where.write_text("mine")
    with pytest.raises(ValueError, match=f"out must be a folder that can be written to; got {settings.out}: .*folder"):
        Folder.of(settings)
    assert way == "lock" or where.read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; results go to {out}"),
        (FileNotFoundError(errno.ENOENT, "No such file", "gone/x"), "No such file: 'gone/x'"),
        (PermissionError(errno.EROFS, "Read-only file system", "y"), "Read-only file system: 'y'"),
    ],
    ids=["full", "gone", "read-only"],
)
@pytest.mark.parametrize("stands", [CHECKPOINT, WARM, None])
def test_a_file_that_fails_is_named_with_the_last_checkpoint(
    error: OSError, words: str, stands: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def failing(config: TrainConfig, folder: list[Path]) -> None:
        folder.append(tmp_path)
        raise error

    monkeypatch.setattr(training, "trained", failing)
    if stands:
        (tmp_path / stands).touch()
    assert cli_main(["--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith("trajkern train: [Errno") and words.format(out=tmp_path) in told
    standing = f"the last checkpoint stands: continue with --resume {tmp_path / (stands or '')}"
    assert told.endswith(f"; {standing if stands else 'there is no checkpoint yet'}\n")


NO_MEMORY = {
    "alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 39200 bytes.": "39200 bytes",
    "Storage size calculation overflowed with sizes=[98, 461168]": "a tensor of sizes [98, 461168]",
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has": "20.00 GiB",
    "Unable to allocate 7.45 GiB for an array with shape (1000000000,)": "7.45 GiB",
    "std::bad_alloc": "",
    "": "",
}


@pytest.mark.parametrize("text", NO_MEMORY)
@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("where", ["the run", "its command line"])
def test_memory_that_runs_out_is_told_in_a_line(
    kind: type[Exception], text: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def failing(*_: Any) -> None:
        held = bytearray(2**20)  # what the words may need
        raise kind(f"{text}{'' if held else None}")

    owner = (training, "trained") if where == "the run" else (configuration, "load")
    monkeypatch.setattr(*owner, failing)
    argv = ["--out", str(tmp_path)] if where == "the run" else ["--resume", str(tmp_path / CHECKPOINT)]
    if kind is RuntimeError and (not text or text.startswith("Unable")):
        with pytest.raises(RuntimeError):
            cli_main(argv)
        return
    assert cli_main(argv) == 1
    said = f"memory ran out: {NO_MEMORY[text]} could not be had" if NO_MEMORY[text] else "memory ran out"
    rest = "; there is no checkpoint yet" if where == "the run" else ""
    assert capsys.readouterr().err == f"trajkern train: {said}{rest}\n"


STARVED = """
import resource, sys
import torch, matplotlib.figure, reasoning_gym, trajkern.cli
from trajkern.trainer import train, update
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**29, resource.RLIM_INFINITY))
sys.exit(trajkern.cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("flag", ["--tiny.width=400000000", "--rollouts=80000000"])
def test_what_does_not_fit_is_told_in_a_line(flag: str, tmp_path: Path) -> None:
    """Under the system's own limit, of which the words need some, too."""
    argv = f"train --out {tmp_path / 'run'} --threads 1 --tiny.layers 1 --tiny.width 16 --tiny.heads 2 --questions 100"
    argv += " --warmup.steps 1 --warmup.batch 8 --warmup.demonstrations 16 --eval.heldout 4 --eval.validation 4"
    command = [sys.executable, "-c", STARVED, *argv.split(), flag]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith("trajkern train: memory ran out")
    stands = flag.startswith("--rollouts")
    assert done.stderr.endswith(f"continue with --resume {tmp_path / 'run' / WARM}\n" if stands else "checkpoint yet\n")


@pytest.mark.parametrize("place", ["file", "file/board", "read-only"])
def test_a_board_that_cannot_be_is_refused_before_anything_is_written(
    place: str, config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    if place == "read-only":
        monkeypatch.setattr("os.access", lambda path, mode: False)
    told = f"^tensorboard must be a folder that can be written to; got {tmp_path / place}"
    with pytest.raises(ValueError, match=told):
        training.train(dataclasses.replace(config(tensorboard=tmp_path / place), out=None))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_under_the_board_is_named(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    write, left = report.Board._write, [3]

    def full(board: report.Board, **event: Any) -> None:
        left[0] -= 1
        if not left[0]:
            with open("/dev/full", "wb", buffering=0) as device:
                device.write(b"0")
        write(board, **event)

    monkeypatch.setattr(report.Board, "_write", full)
    with pytest.raises(
        ResultsError, match=f"No space left on device: '{tmp_path / 'board'}/events.*; there is no check"
    ):
        training.train(config(tensorboard=tmp_path / "board"))
    assert "Traceback" not in capfd.readouterr().err


def test_a_current_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is where flags may name modules, and a run whose results go elsewhere needs none."""
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(training, "trained", lambda config, folder: None)
    assert cli_main(["--out", str(tmp_path / "run")]) == 0


def test_a_run_that_diverges_ends_in_a_line(tmp_path: Path, capsys: Any) -> None:
    out, model = tmp_path / "run", "--tiny.layers 1 --tiny.width 16 --tiny.heads 2 --questions 100 --threads 1"
    warm = "--warmup.steps 5 --warmup.batch 8 --warmup.demonstrations 16 --warmup.lr 1e30"
    assert cli_main([*f"--task chain_sum --out {out} {model} {warm}".split()]) == 1
    told = capsys.readouterr().err
    assert "trajkern train: the gradient's norm must be finite to take a step, got" in told
    assert told.endswith(f"; results go to {out}; there is no checkpoint yet\n")


def test_a_terminal_that_closes_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    display, tried = Display(), []

    def closed(*args: Any, **options: Any) -> None:
        tried.append(args)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(display._console, "print", closed)
    display.say("heard by nobody")
    assert tried and display._console.quiet


IDLE = {"live_groups": 0, "reward": 0.0}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (IDLE, "no rollout earned a reward: a longer warm-up"),
        (IDLE | {"reward": 1.0}, "the rollouts of each question earned the same"),
        (IDLE | {"gated_rollouts": 5}, "its gate may leave no group two rollouts"),
        (IDLE | {"live_groups": 3}, "what is kept of the live groups has no token to learn from"),
    ],
    ids=str,
)
def test_steps_that_train_nothing_are_told_with_the_likely_reason(values: dict[str, Any], reason: str) -> None:
    watch = idle.Idle()
    said = [watch.after(values) for _ in range(2 * idle.PATIENCE + 1)]
    assert [n + 1 for n, words in enumerate(said) if words] == [idle.PATIENCE, 2 * idle.PATIENCE]
    assert said[idle.PATIENCE - 1].startswith(f"nothing was trained in the last {idle.PATIENCE} steps; {reason}")
    assert watch.ended().startswith(f"nothing was trained in the last {2 * idle.PATIENCE + 1} steps; {reason}")


def test_a_step_that_trains_begins_the_count_again() -> None:
    watch, live = idle.Idle(), {"live_groups": 2, "reward": 0.5, "grad_norm": 0.1}
    steps = [*[IDLE] * (idle.PATIENCE - 1), live, *[IDLE] * (idle.PATIENCE - 1)]
    assert not any(watch.after(values) for values in steps) and watch.ended() is None
    assert watch.after(IDLE) is not None
    assert idle.Idle().ended() is None


def test_a_folder_that_was_replaced_is_left_alone(
    config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its path alone the run would write into what another one may lock."""
    right, steps = training.policy_step, []

    def moved(run: Any) -> Any:
        steps.append(run.step)
        if len(steps) == 3:  # behind the first regular checkpoint
            run.out.rename(tmp_path / "moved")
            run.out.mkdir()
        return right(run)

    monkeypatch.setattr(training, "policy_step", moved)
    with pytest.raises(ResultsError, match="run is another folder than the run began in: it was moved or replaced"):
        training.train(config())
    assert len(steps) == 4 and not any((tmp_path / "run").iterdir())
    assert load(tmp_path / "moved" / CHECKPOINT).place["step"] == 2


def test_a_lock_that_was_removed_ends_the_run(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run could work in the same folder."""
    right, steps = training.policy_step, []

    def unlocked(run: Any) -> Any:
        steps.append(run.step)
        if len(steps) == 3:
            (run.out / LOCK).unlink()
        return right(run)

    monkeypatch.setattr(training, "policy_step", unlocked)
    with pytest.raises(ResultsError, match="lock is no more the file by which the run has locked its folder.*continue"):
        training.train(config())


def test_a_lock_that_is_a_link_is_left_alone(config: Make, tmp_path: Path) -> None:
    settings, other = config(), tmp_path / "mine"
    other.write_text("words")
    settings.out.mkdir()
    (settings.out / LOCK).symlink_to(other)
    with pytest.raises(ValueError, match="out must be a folder that can be written to"):
        training.train(settings)
    assert other.read_text() == "words"
