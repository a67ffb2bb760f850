"""``trajkern validate``: every op that can run on this machine against the float64 reference."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import trajkern as tk
from trajkern._files import is_file, takes, write
from trajkern._parser import Parser
from trajkern._start import say
from trajkern.testing import SPECS, compiled, differences, spec_of
from trajkern.testing.ptx.context import ARCHITECTURES
from trajkern.testing.registry import OpSpec
from trajkern.testing.validation import FRESH, Result, cases_of, plan, plan_compiled, validate

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = f"{'op':<20}{'backend':<8}{'dtype':<10}{'cases':>5}{'worst':>8}  {'twice':<7}{'packed':<7}{'time':>8}"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status: 1 where anything failed."""
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        say(f"trajkern validate: --device cuda: torch {torch.__version__} sees no NVIDIA GPU")
        return 2
    if args.json is not None and not takes(args.json):
        say(f"trajkern validate: --json must be a file in an existing folder that can be written to; got {args.json}")
        return 2
    if args.compiled and (args.device or args.inputs):
        say("trajkern validate: --compiled goes with neither --device nor --inputs")
        return 2
    if args.inputs is not None:
        return _own_inputs(args)
    try:
        results = _run_compiled(args) if args.compiled else _run(args)
    except RuntimeError as error:  # a compiler that is missing
        say(f"trajkern validate: {error}")
        return 2
    if not sum(result.cases for result in results):
        say("trajkern validate: no --op runs here in any of these --dtype, so that nothing was tried")
        return 2
    failed = [result for result in results if not result.passed]
    for result in failed:
        if args.compiled:
            result.within = f'compiled("{args.compiled}"), {result.within}'
        print(f"\n{result}")
    total, cases = sum(r.seconds for r in results), sum(r.cases for r in results)
    verdict = f"{len(failed)} of {len(results)} rows failed" if failed else "all within budget"
    print(f"\n{cases:,} cases, {_seeds(args)}: {verdict}; {total:.1f} s in the ops")
    if args.json is not None:
        report: dict[str, Any] = {"version": tk.__version__, "torch": torch.__version__, "seed": args.seed}
        report |= {"seeds": args.seeds, "compiled": args.compiled, "intensity": _intensity(args)}
        report["results"] = [r.plain() for r in results]
        try:
            write(args.json, json.dumps(report, indent=1) + "\n")
        except OSError as error:
            say(f"trajkern validate: --json {args.json}: {error.strerror}")
            return 1
    return 1 if failed else 0


def _intensity(args: argparse.Namespace) -> int:
    return (0 if args.compiled else 1) if args.intensity is None else args.intensity


def _seeds(args: argparse.Namespace) -> str:
    return f"seed {args.seed}" if args.seeds == 1 else f"seeds {args.seed} to {args.seed + args.seeds - 1}"


def _run(args: argparse.Namespace) -> list[Result]:
    """The table of what this machine can run."""
    devices = [args.device] if args.device else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return _table(plan(_ops(args), devices, _dtypes(args)), args)


def _run_compiled(args: argparse.Namespace) -> list[Result]:
    """The table of the GPU's kernels, compiled for an architecture and executed on this CPU."""
    planned = plan_compiled(_ops(args), _dtypes(args))
    with compiled(args.compiled, seed=args.seed) as execution:
        for backend in dict.fromkeys(result.backend for _, result in planned):
            with tk.use_backend(backend):  # raises where what compiles it is missing
                pass
        results = _table(planned, args)
    launches, instructions = execution.stats["launches"], execution.stats["lane instructions"]
    print(f"\nkernels for {args.compiled}: {launches:,} launches, {instructions:.3g} instructions of threads")
    return results


def _ops(args: argparse.Namespace) -> list[str]:
    return args.op or [spec.name for spec in SPECS]


def _dtypes(args: argparse.Namespace) -> list[torch.dtype]:
    return [DTYPES[name] for name in args.dtype or DTYPES]


def _table(planned: list[tuple[OpSpec, Result]], args: argparse.Namespace) -> list[Result]:
    """A line as soon as it is known."""
    intensity, seeds, done = _intensity(args), range(args.seed, args.seed + args.seeds), 0
    total = sum(len(cases_of(spec, result, intensity, seeds)) for spec, result in planned)
    print(f"worst error as a share of its budget (at most 1), on {total:,} cases; {_seeds(args)}\n\n{COLUMNS}")
    for spec, result in planned:
        for _ in validate(result, spec, intensity, seeds):
            done += 1
            _progress(done, total, f"{result.op} {result.dtype}")
        _progress(0, 0, "")
        print(_line(result), flush=True)
    return [result for _, result in planned]


def _progress(done: int, total: int, what: str) -> None:
    """A bar on a terminal's last line, which the next line of the table replaces."""
    if sys.stderr.isatty():
        bar = f"[{'#' * (30 * done // total):<30}] {done:,} of {total:,}  {what}" if total else ""
        print(f"\r{bar:<79}", end="" if total else "\r", file=sys.stderr, flush=True)


def _line(r: Result) -> str:
    bits = f"{_bits(r.repeatable):<7}{_bits(r.invariant):<7}"
    worst = f"{r.worst:.2f}" if r.worst < 1e4 else f"{r.worst:.0e}"
    mark = "" if r.passed else " FAIL"
    return f"{r.op:<20}{r.backend:<8}{r.dtype:<10}{r.cases:>5}{worst:>8}  {bits}{r.seconds * 1e3:>5.0f} ms{mark}"


def _bits(same: bool) -> str:
    return "same" if same else "DIFFER"


def _own_inputs(args: argparse.Namespace) -> int:
    """One op on the tensors of a file."""
    if len(args.op or ()) != 1:
        say("trajkern validate: --inputs needs exactly one --op")
        return 2
    if not is_file(args.inputs):
        say(f"trajkern validate: --inputs {args.inputs}: is no file that can be read")
        return 2
    spec = spec_of(args.op[0])
    try:
        inputs = read_inputs(args.inputs, args.device or "cpu")
        found = differences(spec, getattr(tk, spec.name), inputs)
    except Exception as error:  # of a file that is none, or of arguments that the op refuses
        say(f"trajkern validate: --inputs {args.inputs}: {' '.join(str(error).split())[:400]}")
        return 2
    print(f"{spec.name} on {args.inputs}: worst error as a share of its budget (at most 1)")
    for name, worst in found.items():
        print(f"  {name:<20}{worst.share:>8.2f}{'' if worst.share <= 1 else f' FAIL: {worst}'}")
    return 0 if all(worst.share <= 1 for worst in found.values()) else 1


def read_inputs(path: Path, device: str) -> dict[str, Any]:
    """The keyword arguments in a safetensors file.

    A tensor bears its argument's name, a tree's ``tree.parent`` and ``tree.node_lengths``; what is no tensor stands in
    the file's metadata as JSON, a ``config`` as the fields of :class:`trajkern.PolicyLoss`.
    """
    from safetensors import safe_open

    with safe_open(path, "pt", device=device) as file:
        inputs: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        inputs |= {name: json.loads(text) for name, text in (file.metadata() or {}).items() if name != "format"}
    if "config" in inputs:
        inputs["config"] = tk.PolicyLoss(**inputs["config"])
    parts = {name.removeprefix("tree."): inputs.pop(name) for name in [*inputs] if name.startswith("tree.")}
    return inputs | ({"tree": tk.Tree(**parts)} if parts else {})


def _count(text: str) -> int:
    return _between(text, 1, 1_000_000)


def _seed(text: str) -> int:
    return _between(text, 0, 2**62)


def _between(text: str, low: int, high: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = low - 1  # as more digits than Python reads
    if not low <= number <= high:
        raise argparse.ArgumentTypeError(f"must be a whole number from {low:,} to {high:,}, got {text[:40]!r}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="trajkern validate",
        description="Run every op, backend and precision that this machine can, forward and backward, against the "
        "float64 reference; twice, and in another order. Exit status 1 where an error exceeds its budget or bits "
        "differ.",
    )
    add = parser.add_argument
    add("--op", action="append", choices=[s.name for s in SPECS], metavar="OP", help="only this op (repeatable)")
    add("--device", choices=("cpu", "cuda"), help="default: every device there is")
    add("--dtype", action="append", choices=DTYPES, help="only this precision (repeatable)")
    add("--intensity", type=int, choices=FRESH, help="how many fresh draws of each case; default: 1, 0 if compiled")
    compiling = "execute the GPU's kernels on this CPU, compiled for this architecture, such as sm_90"
    add("--compiled", choices=ARCHITECTURES, metavar="ARCH", help=compiling)
    add("--seed", type=_seed, default=0, help="of the fresh draws; default: %(default)s")
    add("--seeds", type=_count, default=1, metavar="N", help="this and the next N - 1 seeds; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write every result there")
    add("--inputs", type=Path, metavar="FILE", help="a safetensors file with the arguments of the one --op given")
    return parser
