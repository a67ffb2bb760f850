"""``make soak ARGS="--only signals rank-signals"``: each signal at each phase of a run, and of two ranks of torchrun.

As ``python -m trajkern._bench.reliability.signals PHASE SIGNAL WHOM train ...`` it is the trainer, which is met so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trajkern import _start
from trajkern._bench.reliability.page import Row, row
from trajkern._bench.reliability.runs import difference, ended, started
from trajkern._bench.reliability.writes import Attack
from trajkern.trainer import cli_main

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
PHASES = {  # what begins it, and at which of its calls
    "the start": ("trajkern.trainer.train:joined", 1),
    "setting up": ("trajkern.trainer.train:set_up", 1),
    "the warm-up": ("trajkern.trainer.train:imitate", 5),
    "the end of the warm-up": ("trajkern.trainer.train:begin_main", 1),
    "sampling": ("trajkern.trainer.train:collect", 4),
    "an update": ("trajkern.trainer.train:update", 4),
    "an evaluation": ("trajkern.trainer.train:evaluate", 4),
    "writing metrics": ("trajkern.trainer.report:Metrics.write", 16),
    "saving": ("trajkern.trainer.checkpoint:save", 3),
    "inside of saving": ("safetensors.torch:save_file", 2),
    "the curve": ("trajkern.trainer.train:plot", 1),
    "the summary": ("trajkern.trainer.train:summary", 1),
    "the end": ("trajkern.trainer.run:Run.close", 1),
}
WHOM = ("rank 0", "rank 1", "both ranks", "the agent", "the group")
RANK = "trajkern._bench.reliability.signals"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SECONDS = 120  # after which a run hangs
AREA = "SIGINT, SIGTERM, SIGHUP and SIGKILL at each phase of a run, which `--resume last` ends: bit for bit as without"
RANKS_AREA = "the same signals to a rank, to both, to torchrun's agent and to its group; likewise"


class Try(NamedTuple):
    phase: str
    number: int
    after: bool = False  # the phase's call, else before
    times: int = 1
    whom: str = "rank 0"

    def __str__(self) -> str:
        name = f"{self.times} {signal.Signals(self.number).name}"
        return f"{name} {'after' if self.after else 'before'} {self.phase}, to {self.whom}"


def armed(tried: Try) -> Callable[[], None]:
    """Have the signal come at the phase; returns what takes that back."""
    where, left = PHASES[tried.phase]
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    kept, counted = getattr(owner, name), [left]

    @functools.wraps(kept)
    def met(*args: Any, **options: Any) -> Any:
        counted[0] -= 1
        if not counted[0] and not tried.after:
            _send(tried)
        result = kept(*args, **options)
        if not counted[0] and tried.after:
            _send(tried)
        return result

    setattr(owner, name, met)
    return lambda: setattr(owner, name, kept)


def _send(tried: Try) -> None:
    """From the process to which the signal goes, or for all of them from rank 0."""
    rank = int(os.environ.get("RANK", 0))
    if tried.whom in (f"rank {rank}", "both ranks"):
        for _ in range(tried.times):
            os.kill(os.getpid(), tried.number)
    elif rank == 0 and tried.whom == "the agent":
        os.kill(os.getppid(), tried.number)
    elif rank == 0 and tried.whom == "the group":
        os.killpg(os.getpgid(os.getppid()), tried.number)


def why_wrong(status: int, said: str, tried: Try) -> str:
    """What is wrong with how a run of one process ended: a checkpoint and the signal's status, or the run's end."""
    if tried.number == signal.SIGKILL:
        return "" if status == -9 else f"status {status}"
    if "Traceback" in said or status not in (0, 128 + tried.number, -tried.number):
        return f"status {status}: {said[-300:]!r}"
    words = said.rstrip("\n").splitlines()[-1:] if status == 128 + tried.number else []
    return "" if all(x.startswith(("stopped ", "trajkern: stopped")) for x in words) else f"it says {words}"


def met_alone(attack: Attack, tried: Try) -> str:
    """What was wrong with one process; empty, where nothing was."""
    shutil.rmtree(attack.out, ignore_errors=True)
    log = attack.folder / "met"
    log.unlink(missing_ok=True)
    undo = armed(tried)
    try:
        child = started([*attack.arguments, str(attack.out)], log)
    finally:
        undo()
    if why := why_wrong(ended(child), log.read_text() if log.exists() else "", tried):
        return why
    return resumed(attack)


def resumed(attack: Attack) -> str:
    if again := ended(started([*attack.arguments, str(attack.out)], attack.folder / "log")):
        return f"--resume last: status {again}; see {attack.folder / 'log'}"
    return difference(attack.out, attack.whole)


def met_together(attack: Attack, tried: Try) -> str:
    """Likewise with two ranks, whose last checkpoint two ranks continue."""
    shutil.rmtree(attack.out, ignore_errors=True)
    words = [tried.phase, str(int(tried.number)), str(int(tried.after)), str(tried.times), tried.whom]
    status, said = torchrun(attack, words, attack.out)
    if status is None or "Traceback" in said:
        return f"{'it hung' if status is None else f'status {status}'}: {said[-600:]!r}"
    status, said = torchrun(attack, [], attack.out)
    if status:
        return f"--resume last: status {status}: {said[-300:]!r}"
    return difference(attack.out, attack.folder / "ranks")


def torchrun(attack: Attack, words: list[str], out: Path) -> tuple[int | None, str]:
    """The agent's status, None where it hung, and what the ranks have said of what went wrong."""
    logs = attack.folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    command = [sys.executable, *TORCHRUN, "--redirects", "3", "--log-dir", str(logs), "-m", RANK]
    command += [*words, "train", *attack.arguments, str(out)]
    with open(attack.folder / "torchrun", "w") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            status: int | None = agent.wait(SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        with contextlib.suppress(ProcessLookupError):  # what an agent leaves that is killed
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
    return status, "".join(path.read_text(errors="replace") for path in sorted(logs.rglob("stderr.log")))


def tries() -> list[Try]:
    found = [Try(phase, n, after) for phase in PHASES for n in SIGNALS for after in (False, True)]
    return found + [Try(phase, n, times=2) for phase in PHASES for n in SIGNALS[:3]]


def alone(count: int, folder: Path, seed: int) -> list[Row]:
    """``count`` of the tries with one process, at random."""
    return [_tried(AREA, tries(), count, seed, functools.partial(met_alone, Attack(folder)))]


def together(count: int, folder: Path, seed: int) -> list[Row]:
    """``count`` of the tries with two ranks, at random."""
    attack, every = Attack(folder), [Try(x, n, whom=w) for x in PHASES for n in SIGNALS for w in WHOM]
    if torchrun(attack, [], folder / "ranks")[0]:
        raise SystemExit(f"two ranks that nothing meets must train; see {folder / 'logs'}")
    return [_tried(RANKS_AREA, every, count, seed, functools.partial(met_together, attack))]


def _tried(area: str, every: list[Try], count: int, seed: int, attempt: Callable[[Try], str]) -> Row:
    wrong, chosen = list[str](), random.Random(seed).sample(every, min(count, len(every)))
    for done, tried in enumerate(chosen, start=1):
        if why := attempt(tried):
            wrong.append(f"{tried}: {why}")
            print(wrong[-1], flush=True)
        if done % 10 == 0:
            print(f"{done} of {len(chosen)} signals, {len(wrong)} not as without", flush=True)
    return row(area, len(chosen), len(wrong), "make soak", "; ".join(wrong[:3]))


if __name__ == "__main__":
    at = sys.argv.index("train")
    if at > 1:
        phase, number, after, times, whom = sys.argv[1:at]
        armed(Try(phase, int(number), after == "1", int(times), whom))
    try:
        status = cli_main(sys.argv[at + 1 :])
    except SystemExit as left:
        status = int(left.code or 0)
    _start.leave(status)  # as the command does
