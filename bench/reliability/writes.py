"""``make soak ARGS="--only writes"``: calls on files that meet a kill, a torn write, a power cut or an error.

What the run leaves behind ``--resume last`` must end, bit for bit, as a run that nothing has met.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

from trajkern._bench.reliability import calls
from trajkern._bench.reliability.page import Row, row
from trajkern._bench.reliability.runs import difference, ended, run, started, teaches

SIZES = "--threads 1 --time-limit inf --tiny.layers 1 --tiny.width 16 --tiny.heads 2 --tiny.ffn 16 --questions 30"
LOOP = "--prompts 4 --rollouts 4 --eval.heldout 3 --eval.validation 3 --eval.samples 2 --eval.every 2 --steps 6"
WARM_UP = "--warmup.steps 12 --warmup.check-every 6 --warmup.batch 16 --warmup.demonstrations 16 --warmup.lr 3e-2"
RUN = f"{SIZES} {LOOP} {WARM_UP} --warmup.pass-at-1 2 --checkpoint-every 2 --resume last".split()
ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES)
KILL, HALF, CUT = "SIGKILL before", "SIGKILL halfway through", "power cut at"
AREAS = {
    KILL: "SIGKILL before each call on a file, which `--resume last` ends: bit for bit as without",
    HALF: "SIGKILL when half of a write is done; likewise",
    CUT: "power cut at each call on a file, with what was not synced lost; likewise",
    "": "ENOSPC, EROFS, EIO or EACCES from a call on a file, or from it on: a line and a status; then likewise",
}


class Try(NamedTuple):
    """What meets which call of a run."""

    resumed: bool  # whether the run goes on from its middle
    number: int
    call: str
    what: str  # KILL, HALF, CUT, or an error's name
    stays: bool = False  # whether all later calls fail, too

    def __str__(self) -> str:
        where = f"call {self.number} ({self.call}) of a {'resumed ' if self.resumed else ''}run"
        return f"{self.what} {where}{' and all later ones' if self.stays else ''}"


class Meeting:
    """Handles the calls of one run: counts them, and meets the one that is tried."""

    def __init__(self, tried: Try | None, folder: Path) -> None:
        self.tried, self.seen = tried, list[calls.Call]()
        there = [path.stat() for path in folder.rglob("*")]
        self._synced = {x.st_ino: x.st_size for x in there}  # of a file by its number, the bytes that are on the disk

    def __call__(self, call: calls.Call) -> int:
        self.seen.append(call)
        tried, at = self.tried, len(self.seen)
        if tried is None or at < tried.number or (at > tried.number and not tried.stays):
            if call.name in ("fsync", "fdatasync"):
                found = os.stat(call.paths[0])
                self._synced[found.st_ino] = found.st_size
            return 0
        if tried.what not in (KILL, HALF, CUT):
            return int(getattr(errno, tried.what))
        if tried.what == HALF:
            call.make_half()
        calls.end(call)
        return errno.EINTR

    def cut(self, folder: Path) -> None:
        """Take from the files of a folder what no call has brought to the disk."""
        for path in folder.rglob("*"):
            if path.is_file() and (size := self._synced.get(path.stat().st_ino, 0)) < path.stat().st_size:
                os.truncate(path, size)


class Attack:
    """The runs of ``folder``: one that nothing meets, one that stands at its middle, and those that are tried."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.whole, self.middle, self.out = (folder, *(folder / x for x in ("whole", "middle", "run")))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        task = folder / "questions.jsonl"
        lines = [json.dumps({"prompt": f"{n}?", "answer": str(n % 7 % 2)}) for n in range(60)]  # hard to learn
        task.write_text("\n".join(lines) + "\n")
        self.arguments = ["--task", str(task), *RUN, "--out"]
        for _ in range(2):  # the first in this process, for what is imported
            shutil.rmtree(self.whole, ignore_errors=True)
            if run([*self.arguments, str(self.whole)], folder / "log") or not teaches(self.whole, 2):
                raise SystemExit(f"a run that nothing meets must train; see {folder / 'log'}")
        plain = self.met(self.whole, None, fresh=True)[1]
        places = [n for n, call in enumerate(plain.seen) if call.name.startswith("rename") and _is_checkpoint(call)]
        self.met(self.middle, Try(False, places[1] + 3, "", KILL), fresh=True)
        shutil.copytree(self.middle, self.out)
        later = self.met(self.out, None)[1]
        self.calls = {False: [x.name for x in plain.seen], True: [x.name for x in later.seen]}

    def met(self, out: Path, tried: Try | None, fresh: bool = False) -> tuple[int, Meeting]:
        """Its status, and the calls that were met."""
        if fresh:
            shutil.rmtree(out, ignore_errors=True)
        meeting, log = Meeting(tried, out), self.folder / "met"
        log.unlink(missing_ok=True)
        status = calls.met(partial(run, [*self.arguments, str(out)], log), out, meeting)
        if tried and tried.what == CUT:
            meeting.cut(out)
        return status, meeting

    def tries(self) -> list[Try]:
        found = list[Try]()
        for resumed, names in self.calls.items():
            for number, name in enumerate(names, start=1):
                found += [Try(resumed, number, name, what) for what in (KILL, CUT)]
                found += [Try(resumed, number, name, HALF)] if "write" in name else []
                for stays in (False, True):
                    found += [Try(resumed, number, name, errno.errorcode[x], stays) for x in ERRORS]
        return found

    def why_wrong(self, tried: Try) -> str:
        """What a try showed to be wrong; empty, where nothing was."""
        shutil.rmtree(self.out, ignore_errors=True)
        if tried.resumed:
            shutil.copytree(self.middle, self.out)
        status, meeting = self.met(self.out, tried)
        said = (self.folder / "met").read_text()
        if len(meeting.seen) < tried.number:
            return f"it made {len(meeting.seen)} calls"
        if tried.what in (KILL, HALF, CUT):
            how = "" if status == -9 else f"status {status}"
        else:
            how = _why_unsaid(status, said)
        if how:
            return how
        if again := ended(started([*self.arguments, str(self.out)], self.folder / "log")):
            return f"--resume last: status {again}; see {self.folder / 'log'}"
        return difference(self.out, self.whole)


def _is_checkpoint(call: calls.Call) -> bool:
    return call.paths[-1].endswith("/checkpoint.safetensors") and ".part/" not in call.paths[-1]


def _why_unsaid(status: int, said: str) -> str:
    """What is wrong with how a run ended that an error has met: it may have gone on, or says in one line why not."""
    lines = [line for line in said.splitlines() if line.startswith("trajkern train: ")]
    if "Traceback" in said or (status and len(lines) != 1) or status not in (0, 1, 2):
        return f"status {status}: {said[-300:]!r}"
    if status == 1 and not re.search("the last checkpoint stands: continue with --resume|no checkpoint yet", lines[0]):
        return f"it does not say what stands: {lines[0]}"
    named = re.search("--resume (.+)$", lines[0]) if status else None
    return f"there is no {named[1]}" if named and not os.path.isfile(named[1]) else ""


def writes(count: int, folder: Path, seed: int) -> list[Row]:
    """``count`` of the tries, at random."""
    if lacking := calls.why_not():
        raise SystemExit(lacking)
    attack = Attack(folder)
    every = attack.tries()
    chosen = random.Random(seed).sample(every, min(count, len(every)))
    wrong: dict[str, list[str]] = {area: [] for area in AREAS}
    for done, tried in enumerate(chosen, start=1):
        if why := attack.why_wrong(tried):
            wrong[tried.what if tried.what in AREAS else ""].append(f"{tried}: {why}")
            print(f"{tried}: {why}", flush=True)
        if done % 50 == 0:
            print(f"{done} of {len(chosen)} tries, {sum(map(len, wrong.values()))} of them wrong", flush=True)
    tried_of = {area: sum((x.what if x.what in AREAS else "") == area for x in chosen) for area in AREAS}
    return [
        row(AREAS[area], tried_of[area], len(wrong[area]), "make soak", "; ".join(wrong[area][:3]))
        for area in AREAS
        if tried_of[area]
    ]
