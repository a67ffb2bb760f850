"""``python -m bench``: see ``--help``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from bench import advantage, ceilings, head, logprob, policy_loss, reflection, span, tree
from bench.case import OURS
from bench.run import Settings, clocks, release, run
from bench.table import markdown, seconds

FAMILIES = {
    "logprob": logprob.CASES,
    "head": head.CASES,
    "advantage": advantage.CASES,
    "policy_loss": policy_loss.CASES,
    "reflection": reflection.CASES,
    "tree": tree.CASES,
    "span": span.CASES,
}


def main() -> int:
    args = _parser().parse_args()
    args.only = args.only or list(FAMILIES)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"bench: torch {torch.__version__} sees no NVIDIA GPU", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "date": ceilings.now(), "device": args.device, "quick": args.quick, "complete": False,
        "machine": ceilings.machine(args.device), "versions": ceilings.versions(), "cases": [],
    }  # fmt: skip
    try:
        measure(report, args)
        report["complete"] = True
    except KeyboardInterrupt:
        print("bench: interrupted; what was measured is kept", file=sys.stderr)
    report["machine"]["load_average_after"] = os.getloadavg()[0]
    if "ceilings" in report:
        text = markdown(report)
        print(text)
        _write(args.markdown, text)
    _write(args.json, json.dumps(report, indent=1) + "\n")
    failed = any(not verdict["passed"] for case in report["cases"] for verdict in case["gate"].values())
    return 0 if report["complete"] and not failed else 1


def measure(report: dict[str, Any], args: argparse.Namespace) -> None:
    """Fill the report, and save it after every case."""
    settings = Settings.of(args.device, args.quick)
    clock = clocks(args.device)
    report["ceilings"] = ceilings.measure(args.device, clock[False], settings.seconds / 2)
    release()
    copy_bandwidth = report["ceilings"]["copy_bytes_per_second"]
    for case in (c for name in args.only for c in FAMILIES[name] if args.device in c.devices):
        print(f"{case.name}: ", end="", file=sys.stderr, flush=True)
        result = run(case, settings, clock[case.host], copy_bandwidth)
        found = result["seconds"].get(OURS)
        print(seconds(found["median"]) if found else "gate failed", file=sys.stderr)
        report["cases"].append(result)
        _write(args.json, json.dumps(report, indent=1) + "\n")
        release()


def _write(path: Path | None, text: str) -> None:
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text)
        partial.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Time every op beside torch's forms of it, in one process. Each contender is first checked against "
        "the float64 reference; one that is wrong gets no time, and makes the exit status 1.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--only", choices=FAMILIES, action="append", help="this family (repeatable); default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there, after each case")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument("--quick", action="store_true", help="few rounds and no torch.compile: under half a minute")
    return parser


if __name__ == "__main__":
    sys.exit(main())
