"""``trajkern bench``: see ``--help``."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trajkern._bench import (
    advantage,
    growth,
    head,
    host_trees,
    hosts,
    logprob,
    peers,
    policy_loss,
    ranks,
    recipes,
    reflection,
    results,
    session,
    shapes,
    sizes,
    span,
    topk,
    tree,
)
from trajkern._bench.case import OPS, TimedCase
from trajkern._bench.difference import difference
from trajkern._bench.memory import hold
from trajkern._bench.results import Refused
from trajkern._bench.run import Settings, clocks
from trajkern._bench.table import markdown
from trajkern._bench.text import text
from trajkern._files import is_folder
from trajkern._parser import Parser
from trajkern._start import say

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
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
    "hosts": (*hosts.CASES, *host_trees.CASES),
    "ranks": ranks.CASES,
}
TIMED = tuple(dict.fromkeys(case.op for cases in FAMILIES.values() for case in cases))


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
        return _run(args)
    except Refused as reason:
        say(f"trajkern bench: {reason}")
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.compare:
        two = [results.load("--compare", path) for path in args.compare]
        with results.of_file("--compare", *args.compare):
            found = difference(*two)
        print(found, end="")
        return 0
    _refuse(args)
    if not args.load:
        return _shown(_measured(args), args)
    report = results.load("--load", args.load)
    with results.of_file("--load", args.load):
        return _shown(report, args)


def _shown(report: dict[str, Any], args: argparse.Namespace) -> int:
    if "ceilings" in report:
        print(text(report), end="")
        results.write("--markdown", args.markdown, markdown(report))
        _draw(report, args)
    return 0 if report["complete"] and not _failed(report) else 1


def _refuse(args: argparse.Namespace) -> None:
    """Everything that would make the run useless is said before it."""
    if not args.load and args.device == "cuda" and not torch.cuda.is_available():
        raise Refused(f"--device cuda: torch {torch.__version__} sees no NVIDIA GPU")
    if args.rows is not None and not 1 <= args.rows < 2**31:
        raise Refused(f"--rows must be in [1, 2^31); got {args.rows}")
    if args.shape and args.shapes:
        raise Refused("--shape and --shapes: give one of them")
    if not args.load:
        chosen(args)  # raises where a shape is none
    for name in ("json", "markdown", "html"):
        results.check_takes(f"--{name}", getattr(args, name))
    if args.png and not is_folder(args.png):
        raise Refused(f"--png {args.png}: is not a folder that can be written to")
    if (args.html or args.png) and not find_spec("matplotlib"):
        raise Refused("--html and --png need matplotlib: pip install matplotlib")


def _draw(report: dict[str, Any], args: argparse.Namespace) -> None:
    if args.html:
        from trajkern._bench.report import html

        results.write("--html", args.html, html(report))
    if args.png:
        from trajkern._bench.plots import PICTURES, png

        for name, (draw, _) in PICTURES.items():
            if picture := png(draw, report):
                results.write("--png", args.png / f"{name}.png", picture)


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    report = results.new_report(args.device, quick=args.quick, gated=not args.ungated)
    if args.peers:
        report["peers"] = peers.versions()
    try:
        measure(report, args)
        report["complete"] = True
    except KeyboardInterrupt:
        print("\ntrajkern bench: interrupted; what was measured is kept", file=sys.stderr)
    results.save(args.json, report)
    return report


def measure(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Fill the report, and save it after every case."""
    hold()
    settings = Settings.of(args.device, args.quick, args.peers, not args.ungated)
    cases = chosen(args)
    session.measure(report, cases, settings, lambda: results.save(args.json, report))
    if args.growth:
        clock, ops = clocks(args.device)[False], {case.op for case in cases}
        report["growth"] = growth.measure(
            args.device, clock, settings.seconds / 4, ops, lambda line: print(line, file=sys.stderr)
        )


def chosen(args: argparse.Namespace) -> list[TimedCase]:
    """The cases to run; raises :class:`Refused` for a shape that an op does not have."""
    every = not (args.op or args.shapes or args.shape)
    if args.shape:
        return _shaped(args)
    if args.shapes:
        candidates = [case for name in args.shapes for case in shapes.cases(name, args.device, args.rows)]
    elif every and args.quick and args.device == "cpu":
        candidates = [*sizes.quick(args.device), *hosts.CASES, *recipes.CASES]
    else:
        candidates = [case for cases in FAMILIES.values() for case in cases]
    asked = set(args.op or ())
    return [x for x in candidates if args.device in x.devices and (not asked or asked & {x.op, x.family})]


def _shaped(args: argparse.Namespace) -> list[TimedCase]:
    """T,H,V: the logits and the head of that size; or what the ops that --op names take."""
    dtype = DTYPES[args.dtype] if args.dtype else shapes.DTYPE[args.device]
    found: list[TimedCase] = []
    try:
        for size in args.shape:
            if not args.op:
                size = sizes.SIZES["linear_logprobs"].check("--shape", size)
                found += shapes.sized("", *size, args.device, dtype)
                continue
            ops = [op for op in sizes.SIZES if {op, OPS[op].family} & set(args.op)]
            if not ops:
                raise Refused(f"--shape goes with no --op {' '.join(args.op)}, but with {', '.join(sizes.SIZES)}")
            found += [case for op in ops for case in sizes.cases(op, size, dtype, args.device, f"--shape of {op}")]
    except ValueError as error:
        raise Refused(str(error)) from None
    return found


def _failed(report: dict[str, Any]) -> bool:
    """Whether trajkern or a form of torch is wrong; a peer that is has its own line."""
    packages = report.get("peers", {})
    return any(not g["passed"] for case in report["cases"] for name, g in case["gate"].items() if name not in packages)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part.replace("_", "")) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers such as 512,1024,32768; got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
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
    add(
        "--shape",
        type=_shape,
        action="append",
        metavar="T,H,V",
        help="tokens, hidden size and vocabulary of your own instead (repeatable); with --op the sizes that op has",
    )
    add("--dtype", choices=DTYPES, help="of --shape; default: float32, bfloat16 on a GPU")
    add("--rows", type=int, help=f"tokens of --shapes; default: {shapes.ROWS['cpu']}, {shapes.ROWS['cuda']:,} on a GPU")
    add("--growth", action="store_true", help="how time and memory grow with each size, too")
    add(
        "--quick",
        action="store_true",
        help="few rounds and no torch.compile; without --op a small case of each op: 40 s of processor time",
    )
    add(
        "--ungated", action="store_true", help="trust the contenders: no comparison with float64, which the report says"
    )
    add("--json", type=Path, metavar="FILE", help="write every number there, after each case")
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    add("--html", type=Path, metavar="FILE", help="write the report there: one page with tables and plots")
    add("--png", type=Path, metavar="FOLDER", help="write the report's plots there")
    add("--load", type=Path, metavar="FILE", help="measure nothing: show what --json wrote")
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="measure nothing: what changed from file A to B")
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
