"""``make soak``: runs that are killed at random moments, ranks of which one is, and very many steps in one process.

What came of each is written beside this file and onto docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trajkern._bench.reliability.page import Row, record, row
from trajkern._bench.reliability.runs import difference, ended, started, teaches
from trajkern._bench.reliability.signals import alone, together
from trajkern._bench.reliability.writes import writes
from trajkern.trainer.folder import METRICS

TINY = "--threads 1 --time-limit inf --tiny.layers 1 --tiny.width 32 --tiny.heads 2 --tiny.ffn 64 --questions 300"
SIZES = f"{TINY} --prompts 7 --rollouts 4 --eval.heldout 10 --eval.validation 9 --eval.samples 3"
WARM_UP = "--warmup.steps 40 --warmup.check-every 20 --warmup.batch 20 --warmup.demonstrations 128 --warmup.lr 1e-2"
RUN = f"{SIZES} {WARM_UP} --warmup.pass-at-1 2 --steps 12 --eval.every 5 --checkpoint-every 1 --resume last".split()
LONG = f"{SIZES} {WARM_UP} --eval.every 1000 --checkpoint-every 1000".split()
RANKS = [
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--max-restarts",
    "1",
    "-m",
    "trajkern",
]
KILLS = "SIGKILL at a random moment of a run, which `--resume last` ends: bit for bit as without"
RANK_KILLS = "SIGKILL of one of two ranks; torchrun starts both again from the last checkpoint: bit for bit as without"
PARTS = ("kills", "writes", "signals", "rank-signals", "ranks", "steps")
ALLOWED = 2**22  # bytes of resident memory between a fifth of the steps and all of them: what the system rounds to


def kills(count: int, folder: Path, seed: int) -> list[Row]:
    """Kills at random moments of a run's life; each run is started again until it ends, and compared with one that
    nothing has stopped."""
    draw, log = random.Random(seed), folder / "log"
    began, expected = time.monotonic(), folder / "whole"
    if ended(started([*RUN, "--out", str(expected)], log)) or not teaches(expected, 8):
        raise SystemExit(f"a run that is not killed must train; see {log}")
    lasts = time.monotonic() - began
    killed, runs, wrong, found = 0, 0, list[str](), row(KILLS, 0, 0, "make soak")
    while killed < count:
        out, status, runs = folder / f"run{runs}", -signal.SIGKILL, runs + 1
        while status == -signal.SIGKILL:
            child = started([*RUN, "--out", str(out)], log)
            if killed < count:
                time.sleep(draw.uniform(0, lasts))
                os.kill(child, signal.SIGKILL)
            status = ended(child)
            killed += status == -signal.SIGKILL
        how = f"status {status}" if status else difference(out, expected)
        wrong += [f"run {runs}: {how}"] if how else []
        shutil.rmtree(out)
        print(f"{killed} kills, {runs} runs, {len(wrong)} of them not as the one that was not stopped", flush=True)
        found = row(KILLS, max(killed, len(wrong)), len(wrong), "make soak", "; ".join(wrong[:3]))
        record("soak", [found])  # also of an attack that is itself stopped
    return [found]


def steps(count: int, folder: Path) -> list[Row]:
    """Resident memory of one process over many steps."""
    out = folder / "long"
    child = started([*LONG, "--steps", str(count), "--out", str(out)], folder / "log")
    seen: list[tuple[int, int]] = []
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.1)
        if done := steps_done(out):
            seen.append((done, resident(child)))
    seen = [(done, size) for done, size in seen if size]
    taken = steps_done(out)
    if taken < count:
        return [row(area_of(count), count, count - taken, "make soak", f"it ended after {taken}; see {folder / 'log'}")]
    second = [size for done, size in seen if count / 5 <= done <= 2 * count / 5]
    last = [size for done, size in seen if done >= 4 * count / 5]
    if not second or not last:
        raise SystemExit(f"--steps must be so many that memory can be read while they are taken; got {count}")
    early, late = statistics.median(second), statistics.median(last)
    grown = late - early
    print(f"{count} steps: {early / 2**20:.1f} MiB resident, then {late / 2**20:.1f}", flush=True)
    reason = f"{grown / 2**20:.1f} MiB more in the last fifth than in the second" if grown > ALLOWED else ""
    return [row(area_of(count), count, count if reason else 0, "make soak", reason)]


def area_of(count: int) -> str:
    return f"steps of the trainer in one process; resident memory grows by less than {ALLOWED >> 20} MiB"


def steps_done(out: Path) -> int:
    """Of the main loop."""
    path = out / METRICS
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        tail = file.read().splitlines()[1:]
    found = [json.loads(line) for line in tail if line.endswith(b"}")]
    return max((x["step"] for x in found if x["phase"] == "main"), default=0)


def resident(child: int) -> int:
    """Bytes, or 0 where it has ended."""
    try:
        return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def ranks(count: int, folder: Path, seed: int) -> list[Row]:
    """Two ranks under torchrun, one of which is killed at a random moment; its agent starts both again."""
    draw, expected, wrong = random.Random(seed), folder / "ranks", list[str]()
    began = time.monotonic()
    if torchrun(expected, folder).wait():
        raise SystemExit(f"two ranks that are not killed must train; see {folder / 'log'}")
    lasts, killed, late = time.monotonic() - began, 0, 0
    while killed < count and late < count + 5:
        out = folder / f"ranks{killed}-{late}"
        agent = torchrun(out, folder)
        time.sleep(lasts * draw.uniform(0.4, 0.9))
        children = [int(x) for x in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]
        if len(children) < 2:
            late += 1  # it had not begun, or was at its end
            agent.wait()
            continue
        os.kill(draw.choice(children), signal.SIGKILL)
        killed += 1
        how = f"status {status}" if (status := agent.wait()) else difference(out, expected)
        wrong += [f"kill {killed}: {how}"] if how else []
        print(f"{killed} kills of one of two ranks, {len(wrong)} not as without", flush=True)
    return [row(RANK_KILLS, killed, len(wrong), "make soak", "; ".join(wrong[:3]))]


def torchrun(out: Path, folder: Path) -> subprocess.Popen:
    with open(folder / "log", "a") as log:
        command = [sys.executable, *RANKS, "train", *RUN, "--out", str(out)]
        return subprocess.Popen(command, stdout=log, stderr=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of runs of one process; by default 100")
    parser.add_argument("--steps", type=int, default=10_000, help="in one process; by default 10,000")
    parser.add_argument("--ranks", type=int, default=3, help="kills of one of two ranks; by default 3")
    what = "kills, torn writes, power cuts and errors at a run's calls on files; by default at each"
    parser.add_argument("--writes", type=int, default=10**6, metavar="N", help=what)
    what = "signals at a phase of a run of one process; by default each at each"
    parser.add_argument("--signals", type=int, default=10**6, metavar="N", help=what)
    what = "signals at a phase of two ranks under torchrun; by default 40"
    parser.add_argument("--rank-signals", type=int, default=40, metavar="N", help=what)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts of it; by default all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="folder for the runs; by default one that is removed at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        attacks: dict[str, Callable[[int], list[Row]]] = {
            "kills": lambda n: kills(n, folder, arguments.seed),
            "writes": lambda n: writes(n, folder / "writes", arguments.seed),
            "signals": lambda n: alone(n, folder / "signals", arguments.seed),
            "rank-signals": lambda n: together(n, folder / "signals", arguments.seed),
            "ranks": lambda n: ranks(n, folder, arguments.seed),
            "steps": lambda n: steps(n, folder),
        }
        for part in arguments.only:
            if count := getattr(arguments, part.replace("-", "_")):
                rows = attacks[part](count)
                record("soak", rows)
                if any(x.fell_short for x in rows):
                    raise SystemExit("\n".join(f"{x.area}: {x.fell_short} fell short: {x.reason}" for x in rows))


if __name__ == "__main__":
    main()
