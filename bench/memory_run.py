"""``trajkern bench --memory``: how long a batch trains with each form of the head and the loss.

Predicts, for the heads of published models in bfloat16, the longest batch that fits GPUs of 80 and 141 GB, and measures
the peak of each form beside the formula: on a GPU at the models' sizes by the allocator, on a CPU at a sixteenth of
their width and vocabulary in float32 by the resident memory, each form in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from trajkern._bench import ceilings, peers, results
from trajkern._bench.case import OURS, Problem
from trajkern._bench.head import loss_problem
from trajkern._bench.head_memory import FORMS, GPUS, MODELS, Sizes, longest, whole
from trajkern._bench.memory import give_back, peak_bytes
from trajkern._bench.results import Refused
from trajkern._bench.text import size
from trajkern._parser import Parser
from trajkern._start import say

FORMAT = 1  # of the results file
SCALE = {"cpu": 16, "cuda": 1}  # what width and vocabulary are divided by
TOKENS = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16_384)}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
SHOWN = (8192, 32_768, 131_072)  # tokens of a batch whose memory is printed
PEERS = {"trl": "linear_logprobs", "liger": "linear_policy_loss"}  # by way of which op


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.form:
        for point in measure(args.form, args.device):
            print(json.dumps(point), flush=True)
        return 0
    try:
        return _run(args)
    except Refused as reason:
        say(f"trajkern bench --memory: {reason}")
        return 2


def _run(args: argparse.Namespace) -> int:
    for option, path in (("--json", args.json), ("--png", args.png)):
        results.check_takes(option, path)
    report = results.of_format("--load", args.load, FORMAT) if args.load else measured(args.device)
    with results.of_file("--load", args.load) if args.load else contextlib.nullcontext():
        print("\n".join(lines(report)))
        results.write("--json", args.json, json.dumps(report, indent=1) + "\n")
        if args.png:
            from trajkern._bench.memory_plot import draw
            from trajkern._bench.plots import png

            results.write("--png", args.png, png(draw, report, 9.6))
        return 0 if any(report["points"].values()) else 1


def measured(device: str) -> dict[str, Any]:
    """Every form in a process of its own; why one cannot in the place of its version."""
    versions = {name: peers.version(peers.PEERS[name]) for name in PEERS}
    points: dict[str, list[dict[str, int]]] = {}
    for form in FORMS:
        if form in PEERS and peers.trouble(peers.PEERS[form]):
            continue
        print(f"{form} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "trajkern._bench.memory_run", "--device", device, "--form", form]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        points[form] = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode:
            last = done.stderr.strip().rpartition("\n")[2] or f"ended with status {done.returncode}"
            versions[form] = f"{versions.get(form, '')} {last}".strip()
    machine = ceilings.machine(device)
    return {
        "format": FORMAT,
        "date": ceilings.now(),
        "device": device,
        "scale": SCALE[device],
        "machine": machine,
        "versions": ceilings.versions(),
        "peers": versions,
        "points": points,
    }


def measure(form: str, device: str) -> Any:
    """Peaks of one form, as they come: {model, tokens, width, vocabulary, itemsize, peak_bytes, predicted_bytes}."""
    dtype, host = DTYPE[device], device == "cpu"
    for name, model in MODELS.items():
        width, vocabulary = model.width // SCALE[device], model.vocabulary // SCALE[device]
        for tokens in TOKENS[device]:
            problem = loss_problem(tokens, width, vocabulary, dtype)(device)
            step = _of(problem, form, device)
            if tokens == TOKENS[device][0]:
                step()  # what libraries set up once is no part of a peak
            give_back()
            peak = peak_bytes(step, device)
            of = Sizes(tokens, width, vocabulary, dtype.itemsize, host)
            yield {"model": name, **of._asdict(), "peak_bytes": peak, "predicted_bytes": FORMS[form](of)}
            del problem, step


def _of(problem: Problem, form: str, device: str) -> Any:
    if op := PEERS.get(form):
        options = {"compiled": False} if form == "liger" else {}  # its loss of a few numbers a token, of no weight here
        made = peers.PEERS[form].forms[op](problem, device, **options)
        problem.peers[form] = made if op == problem.op else problem.compose(made)  # type: ignore[misc]
    return problem.step(OURS if form == "trajkern" else form)


def lines(report: dict[str, Any]) -> list[str]:
    """For a terminal of 80 columns."""
    out = [
        "Head and loss, forward and backward, bfloat16, predicted (the body's checkpointed",
        "hidden states counted; its weights, gradients and all optimizer states not):",
        "",
        f"{'':<12} {'':<9}"
        + "".join(f"{f'{n // 1024}k tokens':>13}" for n in SHOWN)
        + "   longest in GB:"
        + "".join(f"{name.split()[0]:>8}" for name in GPUS),
    ]
    for name, model in MODELS.items():
        for form in FORMS:
            sizes = "".join(f"{size(whole(form, model, n)):>13}" for n in SHOWN)
            most = "".join(f"{longest(form, model, memory) // 1024:>7,}k" for memory in GPUS.values())
            out.append(f"{name:<12} {form:<9}{sizes}{'':<17}{most}")
    where = report["machine"].get("gpu") or report["machine"]["cpu"]
    shrunk = "" if report["scale"] == 1 else f", width and vocabulary over {report['scale']}"
    out += ["", f"Measured beyond weight and hidden states, {where}, {report['date'][:10]}{shrunk}:", ""]
    for form, points in report["points"].items():
        for p in points:
            ratio = p["peak_bytes"] / p["predicted_bytes"]
            found = f"{size(p['peak_bytes']):>10} measured {size(p['predicted_bytes']):>10} predicted {ratio:>6.2f}"
            out.append(f"{p['model']:<12} {form:<9} {p['tokens']:>7,} tokens {found}")
    return out + [f"{name}: {version}" for name, version in report["peers"].items()]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="trajkern bench --memory", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write every number there")
    add("--png", type=Path, metavar="FILE", help="write the chart there")
    add("--load", type=Path, metavar="FILE", help="measure nothing: show what --json wrote")
    add("--form", choices=FORMS, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
