"""``make fuzz``: every op under random options against the float64 reference, and the bits that are promised.

A case is an op with a value for each of its options (dtypes, layouts, masks, sizes, trees, ...) and random numbers. Its
result and gradients must be within the registry's budgets; the same bits twice; and, where that is promised, the same
bits repacked, alone as in a batch, and on two threads as on one. By luck a case may take more than its budget, which is
made of torch's own error; so half of an op's cases must stay within half of theirs, which is that error. A case that
fails is made smaller, and printed as code that can be pasted. What is done is kept under runs/, from where a run that
was stopped goes on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.fuzz.chunk import draw
from tests.fuzz.examine import TARGETS, snippet
from tests.fuzz.problem import Options
from trajkern.cli import cpu_name

CHUNK = 50
TWICE_AS_MANY = ("policy_loss", "policy_loss on a tree", "linear_policy_loss", "linear_policy_loss on a tree")
TYPICAL, ENOUGH = 0.5, 25  # the largest median of the shares of budgets; of how many cases it is taken
AREAS = (
    "against the reference",
    "twice",
    "repacked",
    "alone against in a batch",
    "1 thread against 2",
    "a result",
    "half of an op's cases within half of their budgets",
)


class Progress:
    """What is done, in a file that is replaced as a whole; and the case under way, which is left by a crash."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path, self.under_way = path, path.with_suffix(".case")
        self.chunks: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
            self.under_way.unlink(missing_ok=True)
        elif path.exists():
            self.chunks = json.loads(path.read_text())

    def crashed(self) -> tuple[str, str] | None:
        """(the chunk, code that shows the case again) of the case that killed the last run."""
        if not self.under_way.exists():
            return None
        key, _, code = self.under_way.read_text().partition("\n")
        self.under_way.unlink()
        return key, code

    def announce(self, key: str, target: str, options: Options, seed: int) -> None:
        self.under_way.write_text(f"{key}\n{snippet(target, options, seed)}")

    def keep(self, key: str, found: dict[str, Any]) -> None:
        self.chunks[key] = found
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.chunks, indent=1))
        partial.replace(self.path)
        self.under_way.unlink(missing_ok=True)


def planned(names: list[str], cases: int) -> Iterator[tuple[str, int, int]]:
    """(target, chunk, cases in it); the first chunk of each target before the second of any."""
    weights = {name: 1 + (name in TWICE_AS_MANY) for name in names}
    total, before, shares = sum(weights.values()), 0, {}
    for name, weight in weights.items():
        shares[name] = cases * (before + weight) // total - cases * before // total
        before += weight
    for number in range(-(-max(shares.values()) // CHUNK)):
        for name, share in shares.items():
            if share > number * CHUNK:
                yield name, number, min(CHUNK, share - number * CHUNK)


def key_of(target: str, number: int, count: int) -> str:
    return f"{target} #{number}, {count} cases"


def fuzz(progress: Progress, plan: list[tuple[str, int, int]], seed: int) -> None:
    """Draw what is not done yet."""
    if crash := progress.crashed():
        key, code = crash
        progress.keep(
            key, {"cases": 1, "held": {"a result": 1}, "faults": {"a result": "the process died"}, "code": code}
        )
    for place, (target, number, count) in enumerate(plan):
        key = key_of(target, number, count)
        if key in progress.chunks:
            continue
        _show(f"{place} of {len(plan)} chunks, {target}")
        own = zlib.crc32(f"{seed} {key}".encode())
        done = draw(target, own, count, lambda o, s, key=key, target=target: progress.announce(key, target, o, s))
        found: dict[str, Any] = {"cases": done.cases, "held": dict(done.held), "shares": done.shares}
        if done.failure:
            options, drawn, faults = done.failure
            found |= {"faults": faults, "code": snippet(target, options, drawn)}
            _show("")
            print(f"{target}: {faults}\n\n{_indented(found['code'])}\n", flush=True)
        progress.keep(key, found)
    _show("")


def _show(words: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{words:<79}", end="" if words else "\r", file=sys.stderr, flush=True)


def _indented(code: str) -> str:
    return "\n".join(f"  {line}" for line in code.splitlines())


def medians(plan: list[tuple[str, int, int]], chunks: list[dict[str, Any]]) -> dict[str, float]:
    """The median share of the budget of each target with enough cases: a fault of every case shows in it, however lucky
    each of them may be."""
    shares: dict[str, list[float]] = {}
    for (target, *_), found in zip(plan, chunks, strict=True):
        shares.setdefault(target, []).extend(found.get("shares", ()))
    return {target: statistics.median(found) for target, found in shares.items() if len(found) >= ENOUGH}


def records(chunks: list[dict[str, Any]], typical: dict[str, float], command: str) -> list[dict[str, Any]]:
    """Of each property how often it was tried and how often it fell short."""
    tried: Counter[str] = Counter({AREAS[-1]: len(typical)})
    short: Counter[str] = Counter({AREAS[-1]: sum(x > TYPICAL for x in typical.values())})
    for found in chunks:
        tried.update(found["held"])
        short.update(found.get("faults", {}).keys())
    made = {"command": command, "processor": cpu_name(), "date": datetime.date.today().isoformat()}
    return [
        {"area": f"fuzz: {area}", "tried": tried[area], "fell_short": short[area], "reason": "", **made}
        for area in AREAS
        if tried[area] or short[area]
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make fuzz ARGS=...", description="Every op under random options.")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="decides all cases; default: %(default)s")
    add("--cases", type=int, default=10_000, help="how many; default: %(default)s")
    add("--only", choices=TARGETS, nargs="+", metavar="TARGET", help=f"some of {', '.join(TARGETS)}")
    add("--fresh", action="store_true", help="forget what is done of these cases")
    add("--report", type=Path, metavar="FILE", help="write what was tried and what fell short there, as JSON")
    return parser


def main(argv: list[str]) -> int:
    """Run the command; the exit status is 1 where a case fails."""
    args = _parser().parse_args(argv)
    if args.cases < 1:
        _parser().error(f"--cases must be at least 1; got {args.cases}")
    torch.set_num_threads(1)
    plan = list(planned(args.only or [*TARGETS], args.cases))
    folder = Path("runs/fuzz")
    progress = Progress(folder / f"seed-{args.seed}-cases-{args.cases}.json", args.fresh)
    try:
        fuzz(progress, plan, args.seed)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from {progress.path}")
        return 130
    chunks = [progress.chunks[key_of(*part)] for part in plan]
    options = f"--seed {args.seed} --cases {args.cases}" + "".join(f" --only {x!r}" for x in args.only or ())
    typical = medians(plan, chunks)
    found = records(chunks, typical, f'make fuzz ARGS="{options}"')
    for line in found:
        print(f"{line['area']:<36}{line['tried']:>8,} tried{line['fell_short']:>6} fell short")
    for chunk in chunks:
        if "faults" in chunk:
            print(f"\n{chunk['faults']}\n{_indented(chunk['code'])}")
    large = {target: share for target, share in typical.items() if share > TYPICAL}
    for target, share in large.items():
        print(
            f"\n{target}: half of the cases take more than {share:.3g} of their budgets; {TYPICAL} is torch's own error"
        )
    if args.report:
        args.report.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if large or any("faults" in chunk for chunk in chunks) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
