"""``make attack``: hostile calls of everything public, and the table of what came of them, docs/errors.md.

Each surface's calls run in a process of their own, which announces a call before it runs: a call that kills or hangs
the process is known, and the next process goes on behind it.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.attack import page
from tests.attack.case import GOOD, Case, outcome

ROOT = Path(__file__).resolve().parents[2]
SURFACES = {
    "functions": "ops, layouts and recipes",
    "odd": "odd arguments of these, by both backends",
    "pairs": "several odd arguments of these",
    "methods": "methods of layouts and of recipes, and testing",
    "credit": "credit",
    "adapters": "adapters",
    "structures": "structures from outside",
    "command": "the command line",
    "returned": "what users' code returns",
}
SECONDS = 120  # after which a call hangs


class Found(NamedTuple):
    """What came of a call."""

    surface: str
    name: str
    label: str
    came: str
    fault: str


def worker(surface: str, seed: int, first: int, step: int, heavy: bool) -> None:
    """Every ``step``-th call from the ``first`` on, and all that are right; a line before each and one behind."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    show = sys.stdout
    make = import_module(f"tests.attack.{surface}").cases
    cases: Iterator[Case] = make(seed) if "seed" in inspect.signature(make).parameters else make()
    for i, case in enumerate(cases):
        if i < first or (case.heavy and not heavy) or not (i % step == 0 or case.label == GOOD):
            continue
        print(json.dumps([i, case.name, case.label]), file=show, flush=True)
        signal.alarm(SECONDS)
        result = outcome(case)
        signal.alarm(0)
        print(json.dumps([i, case.name, case.label, *result]), file=show, flush=True)


def _late(*_: Any) -> None:
    raise KeyboardInterrupt("no answer")  # which no handler of errors takes for one


def attacked(surface: str, step: int = 1, heavy: bool = True, seed: int = 0) -> list[Found]:
    """What came of a surface's calls; a process that died is begun again behind the call that killed it."""
    found, first = [], 0
    while True:
        numbers = map(str, (seed, first, step, int(heavy)))
        command = [sys.executable, "-m", "tests.attack", "--worker", surface, *numbers]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # of what the calls leave
            around = os.environ | {"TMPDIR": folder}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=around)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found += [Found(surface, *line[1:]) for line in lines if len(line) == 5]
        if done.returncode == 0:
            return found
        if not lines or len(lines[-1]) != 3:
            raise RuntimeError(f"the process of {surface} did not start: {done.stderr[-2000:]}")
        number, name, label = lines[-1]
        found.append(Found(surface, name, label, "the process died", f"the process ended with {done.returncode}"))
        first = number + 1


def records(found: list[Found], seed: int = 0) -> list[dict[str, Any]]:
    """Of each surface how many calls there were, and how many ended badly."""
    from trajkern.cli import cpu_name

    command = f'make attack ARGS="--seed {seed}"' if seed else "make attack"
    made = {"command": command, "processor": cpu_name(), "date": datetime.date.today().isoformat()}
    tried, bad = Counter(x.surface for x in found), Counter(x.surface for x in found if x.fault)
    return [
        {"area": f"hostile calls: {what}", "tried": tried[name], "fell_short": bad[name], "reason": "", **made}
        for name, what in SURFACES.items()
        if tried[name]
    ]


def main(argv: list[str]) -> int:
    """Run the command; the exit status is 1 where a call ended badly."""
    if argv[:1] == ["--worker"]:
        surface, *numbers = argv[1:]
        seed, first, step, heavy = map(int, numbers)
        worker(surface, seed, first, step, bool(heavy))
        return 0
    parser = argparse.ArgumentParser(prog="make attack ARGS=...", description="Hostile calls of everything public.")
    parser.add_argument("--only", choices=SURFACES, nargs="+", help="some of it, and write nothing")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write what was tried and what fell short there")
    args = parser.parse_args(argv)
    found: list[Found] = []
    for surface in args.only or SURFACES:
        part = attacked(surface, seed=args.seed)
        bad = [x for x in part if x.fault]
        print(f"{SURFACES[surface]:<28}{len(part):>7,} calls{len(bad):>6} bad", flush=True)
        for x in bad:
            print(f"  {x.name}  {x.label}  {x.fault}")
        found += part
    if not args.only:
        (ROOT / "docs" / "errors.md").write_text(page.text(found, SURFACES))
    if args.report:
        args.report.write_text(json.dumps(records(found, args.seed), indent=1) + "\n")
    return 1 if any(x.fault for x in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
