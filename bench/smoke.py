"""Every op once at a size of the benchmark, beside torch's form of it: a line each, as soon as it is known.

A smoke test: it finds kernels that do not compile, do not launch or are plainly wrong, not errors near the budget.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trajkern import linear_divergence, reference
from trajkern._bench.__main__ import FAMILIES
from trajkern._bench.case import OURS, TimedCase

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
EAGER = "eager"
NAMES = (*(name for name in FAMILIES if name not in ("recipes", "hosts", "ranks")), "divergence")
Outcome = dict[str, torch.Tensor]


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 where an op failed."""
    parser = argparse.ArgumentParser(prog="python -m trajkern._bench.smoke", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--op", choices=NAMES, action="extend", nargs="+", help="families; default: all")
    parser.add_argument("--results", type=Path, help="a line of JSON for each op is added to this file")
    args = parser.parse_args(argv)
    passed = True
    for name, shape, both in _planned(args.op or list(NAMES), args.device):
        row = _tried(both) | {"op": name, "shape": shape}
        passed &= row["passed"]
        print(
            f"{'ok  ' if row['passed'] else 'FAIL'} {name}, {shape}: {row['says']}, {row['seconds']:.1f} s", flush=True
        )
        if args.results:
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0 if passed else 1


def _planned(families: list[str], device: str) -> Iterator[tuple[str, str, Callable[[], tuple[Outcome, Outcome]]]]:
    """(op, shape, what gives its outcome and the form's), one case an op, with its backward where there is one."""
    for family in families:
        chosen: dict[str, TimedCase] = {}
        for case in FAMILIES.get(family, ()):
            if device in case.devices and not case.host:
                better = "backward" in case.work and "backward" not in getattr(chosen.get(case.op), "work", "backward")
                if case.op not in chosen or better:
                    chosen[case.op] = case
        for op, case in chosen.items():
            yield op, f"{case.work}, {case.shape}", lambda case=case: _of_case(case, device)
    if "divergence" in families:
        yield "linear_divergence", "512 × 256 × 32,768 float32", lambda: _of_divergence(device)


def _of_case(case: TimedCase, device: str) -> tuple[Outcome, Outcome]:
    problem = case.make(device)
    if EAGER not in problem.rivals:
        raise LookupError("the benchmark has no eager form of it")
    return problem.step(OURS)(), problem.step(EAGER)()


def _of_divergence(device: str) -> tuple[Outcome, Outcome]:
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((512, 256), (32_768, 256)) * 2
    arguments = [torch.randn(size, generator=generator, device=device) / 16 for size in sizes]
    options: dict[str, Any] = {"bias": arguments[1][:, 0].contiguous(), "softcap": 2.0, "vocabulary": 32_000}
    found = []
    for function in (linear_divergence, reference.linear_divergence):
        hidden, weight, *teacher = arguments
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = function(*leaves, *teacher, beta=0.5, **options)
        grads = torch.autograd.grad(out.sum(), leaves)
        found.append({"divergence": out.detach(), "grad_hidden": grads[0], "grad_weight": grads[1]})
    return found[0], found[1]


def _tried(both: Callable[[], tuple[Outcome, Outcome]]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        ours, theirs = both()
        shares = {name: _difference(ours[name], x) for name, x in theirs.items() if name in ours}
        over = {name: x for name, x in shares.items() if not x <= _bound(ours[name], theirs[name])}
        worst = max(shares.values(), default=float("nan"))
        says = f"off by {worst:.1e}" + (f", too much: {over}" if over else "")
        row = {"passed": bool(shares) and not over, "differences": shares}
    except Exception as error:  # the next op may well run
        says = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        row = {"passed": False}
    return row | {"says": says, "seconds": time.perf_counter() - start}


def _difference(x: torch.Tensor, y: torch.Tensor) -> float:
    """The norm of the difference as a share of the form's."""
    x, y = x.double(), y.double()
    return float((x - y).norm() / y.norm().clamp_min(1e-30))


def _bound(x: torch.Tensor, y: torch.Tensor) -> float:
    return max(BOUNDS.get(x.dtype, 0.0), BOUNDS.get(y.dtype, 0.0))


if __name__ == "__main__":
    sys.exit(main())
