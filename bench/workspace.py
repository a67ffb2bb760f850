"""How the head's time and peak memory go with its workspace: a line for each size, as soon as it is known."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from trajkern._bench.head import loss_problem
from trajkern._bench.memory import peak_bytes
from trajkern._bench.run import clocks, release
from trajkern._bench.timing import race

SIZES = (2**26, 2**28, 2**29, 2**30, 2**31, 2**32)  # bytes
ROUNDS = (3, 10)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trajkern._bench.workspace", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--shape", type=int, nargs=3, default=(8192, 4096, 131_072), help="rows, width, vocabulary")
    parser.add_argument("--results", type=Path, help="a line of JSON for each size is added to this file")
    args = parser.parse_args(argv)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    clock, row_bytes = clocks(args.device)[False], 4 * args.shape[2]
    for size in (None, *(x for x in SIZES if x >= row_bytes)):
        options = {} if size is None else {"workspace_bytes": size}
        rows, width, vocabulary = args.shape
        problem = loss_problem(rows, width, vocabulary, dtype, **options)(args.device)
        step = problem.step("trajkern")
        samples = race({"ours": step, "products": problem.bare}, clock, seconds=0.0, rounds=ROUNDS)
        times = {name: statistics.median(x) for name, x in samples.items()}
        row = {"workspace_bytes": size, "shape": list(args.shape), **times, "peak_bytes": peak_bytes(step, args.device)}
        print(
            f"workspace {'default' if size is None else f'{size >> 20:,} MiB'}: {1e3 * times['ours']:.2f} ms, "
            f"{times['ours'] / times['products']:.3f} of the products, peak {row['peak_bytes'] / 2**20:,.0f} MiB",
            flush=True,
        )
        if args.results:
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        del problem, step
        release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
