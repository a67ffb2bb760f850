"""``trajkern bench``: see ``--help``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trajkern._bench import (
    advantage,
    ceilings,
    growth,
    head,
    hosts,
    logprob,
    peers,
    policy_loss,
    recipes,
    reflection,
    shapes,
    span,
    topk,
    tree,
)
from trajkern._bench.case import OURS, TimedCase
from trajkern._bench.memory import hold
from trajkern._bench.run import Settings, clocks, release, run, shares
from trajkern._bench.table import markdown, seconds
from trajkern._bench.text import text

FAMILIES = {
    "logprob": logprob.CASES,
    "head": head.CASES,
    "advantage": advantage.CASES,
    "policy_loss": policy_loss.CASES,
    "reflection": reflection.CASES,
    "tree": tree.CASES,
    "span": span.CASES,
    "topk": topk.CASES,
    "recipes": recipes.CASES,
    "hosts": hosts.CASES,
}
TIMED = tuple(dict.fromkeys(case.op for cases in FAMILIES.values() for case in cases))
FORMAT = 2  # of the results file


class Refused(Exception):
    """Why nothing is run."""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--static" in argv:
        from trajkern._bench.static import main as static

        return static([x for x in argv if x != "--static"])
    if "--memory" in argv:
        from trajkern._bench.memory_run import main as memory

        return memory([x for x in argv if x != "--memory"])
    args = _parser().parse_args(argv)
    try:
        _refuse(args)
        report = _load(args.load) if args.load else _measured(args)
    except Refused as reason:
        print(f"trajkern bench: {reason}", file=sys.stderr)
        return 2
    if "ceilings" in report:
        print(text(report), end="")
        _write(args.markdown, markdown(report))
        _draw(report, args)
    return 0 if report["complete"] and not _failed(report) else 1


def _refuse(args: argparse.Namespace) -> None:
    """Everything that would make the run useless is said before it."""
    if not args.load and args.device == "cuda" and not torch.cuda.is_available():
        raise Refused(f"--device cuda: torch {torch.__version__} sees no NVIDIA GPU")
    if args.rows is not None and (args.rows < 128 or args.rows % 8):
        raise Refused(f"--rows must be a multiple of 8, and at least 128; got {args.rows}")
    for name in ("json", "markdown", "html"):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            raise Refused(f"--{name} {path}: cannot be written")
    if args.png and not (args.png.is_dir() and os.access(args.png, os.W_OK)):
        raise Refused(f"--png {args.png}: is not a folder that can be written to")
    if (args.html or args.png) and not find_spec("matplotlib"):
        raise Refused("--html and --png need matplotlib: pip install matplotlib")


def _draw(report: dict[str, Any], args: argparse.Namespace) -> None:
    if args.html:
        from trajkern._bench.report import html

        _write(args.html, html(report))
    if args.png:
        from trajkern._bench.plots import PICTURES, png

        for name, (draw, _) in PICTURES.items():
            if picture := png(draw, report):
                (args.png / f"{name}.png").write_bytes(picture)


def _load(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"--load {path}: {error}") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        version = report.get("format", "none") if isinstance(report, dict) else "none"
        raise Refused(f"--load {path}: results of format {version}; this trajkern reads format {FORMAT}")
    return report


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {
        "format": FORMAT,
        "date": ceilings.now(),
        "device": args.device,
        "quick": args.quick,
        "gated": not args.ungated,
        "complete": False,
        "machine": ceilings.machine(args.device),
        "versions": ceilings.versions(),
        "cases": [],
    }
    if args.peers:
        report["peers"] = peers.versions()
    try:
        measure(report, args)
        report["complete"] = True
    except KeyboardInterrupt:
        print("trajkern bench: interrupted; what was measured is kept", file=sys.stderr)
    report["machine"]["load_average_after"] = os.getloadavg()[0]
    _save(report, args)
    return report


def measure(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Fill the report, and save it after every case."""
    hold()
    settings = Settings.of(args.device, args.quick, args.peers, not args.ungated)
    clock = clocks(args.device)
    report["ceilings"] = ceilings.measure(args.device, clock[False], settings.seconds / 2)
    release()
    for case in chosen(args):
        print(f"{case.name}: ", end="", file=sys.stderr, flush=True)
        result = run(case, settings, clock[case.host], report["ceilings"])
        ours = result["seconds"].get(OURS)
        print(seconds(ours["median"]) if ours else "gate failed", file=sys.stderr)
        report["cases"].append(result)
        _save(report, args)
        release()
    after = ceilings.measure(args.device, clock[False], settings.seconds / 2)
    report["ceilings"] = ceilings.best(report["ceilings"], after)
    for result in report["cases"]:
        result |= shares(result, report["ceilings"])
    if args.growth:
        ops = {case.op for case in chosen(args)}
        report["growth"] = growth.measure(
            args.device, clock[False], settings.seconds / 4, ops, lambda line: print(line, file=sys.stderr)
        )


def chosen(args: argparse.Namespace) -> list[TimedCase]:
    if args.shapes:
        candidates = [case for name in args.shapes for case in shapes.cases(name, args.device, args.rows)]
    else:
        candidates = [case for cases in FAMILIES.values() for case in cases if args.device in case.devices]
    return [case for case in candidates if not args.op or {case.op, case.family} & set(args.op)]


def _failed(report: dict[str, Any]) -> bool:
    """Whether trajkern or a form of torch is wrong; a peer that is has its own line."""
    packages = report.get("peers", {})
    return any(not g["passed"] for case in report["cases"] for name, g in case["gate"].items() if name not in packages)


def _save(report: dict[str, Any], args: argparse.Namespace) -> None:
    _write(args.json, json.dumps(report, indent=1) + "\n")


def _write(path: Path | None, content: str) -> None:
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(content)
        partial.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trajkern bench",
        description="Time every op beside torch's forms of it, in one process. Each contender is first checked against "
        "the float64 reference; one that is wrong gets no time. The exit status is 1 if trajkern or torch is.",
    )
    add = parser.add_argument
    add(
        "--op",
        choices=(*FAMILIES, *TIMED),
        action="extend",
        nargs="+",
        metavar="OP",
        help=f"families or ops; default: all of {', '.join(FAMILIES)}",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--peers", action="store_true", help=f"time other packages, too: {', '.join(peers.PEERS)}")
    add(
        "--shapes",
        choices=shapes.MODELS,
        action="extend",
        nargs="+",
        metavar="MODEL",
        help=f"the heads of these models instead: {', '.join(shapes.MODELS)}",
    )
    add("--rows", type=int, help=f"tokens of --shapes; default: {shapes.ROWS['cpu']}, {shapes.ROWS['cuda']:,} on a GPU")
    add("--growth", action="store_true", help="how time and memory grow with each size, too")
    add("--quick", action="store_true", help="few rounds and no torch.compile: under a minute")
    add(
        "--ungated", action="store_true", help="trust the contenders: no comparison with float64, which the report says"
    )
    add("--json", type=Path, metavar="FILE", help="write every number there, after each case")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    add("--html", type=Path, metavar="FILE", help="write the report there: one page with tables and plots")
    add("--png", type=Path, metavar="FOLDER", help="write the report's plots there")
    add("--load", type=Path, metavar="FILE", help="measure nothing: show what --json wrote")
    add(
        "--static",
        action="store_true",
        help="measure nothing: compile for GPUs and predict; see `trajkern bench --static --help`",
    )
    add(
        "--memory",
        action="store_true",
        help="instead, the longest batch that each head and loss trains; see `trajkern bench --memory --help`",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
