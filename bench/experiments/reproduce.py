"""Does each recipe do what its authors say? Every row of rows/ over several seeds, from one warm-up a seed.

``make reproduce`` runs all rows, writes bench/reproduction/ROW.json and from these bench/reproduction.md with its
picture; ``ARGS="--only nsr"`` runs one row, ``ARGS=--page-only`` runs none. What has run is kept under runs/reproduce
and not run again while its flags and sources are the same, so that a run that was stopped goes on where it was. Seeds
of your own: ``ARGS="--seeds 30 31 32 33 --results runs/mine"``, whose page is runs/mine/reproduction.md.
Results of other seeds in bench/reproduction/again/ have a table of their own on the page.
``ARGS="--page-only --best nsr rlcr srl"`` also draws the README's picture.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from trajkern._bench.experiments import page, stored
from trajkern._bench.experiments.arms import run_arms
from trajkern._bench.experiments.rows import COMPARISONS

RUNS, BEST = Path("runs/reproduce"), Path("docs/reproduction-best.png")


def run(row: str, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The results of the row's warm-up and arms with one seed, on one thread; and what failed, in words."""
    torch.set_num_threads(1)
    comparison, failures = COMPARISONS[row], []
    results = run_arms(
        RUNS / row,
        stored.flags_of(comparison),
        seed,
        share_warm_up=comparison.shares_warm_up,
        version=stored.version(comparison),
        failed=lambda arm, error: failures.append(f"{row}, {arm}, seed {seed}: {type(error).__name__}: {error}"),
    )
    return results, failures


def end_with_parent() -> None:
    """Ends this worker when the process that started it has ended, however: it would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_rows(seeds: dict[str, list[int]], jobs: int, folder: Path) -> list[str]:
    """Run these rows with their seeds and keep the results of each that is through; returns what failed."""
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in seeds}
    failures: list[str] = []
    with ProcessPoolExecutor(jobs, initializer=end_with_parent) as pool:
        futures: dict[Future[Any], str] = {
            pool.submit(run, row, seed): row for row, some in seeds.items() for seed in some
        }
        for future in as_completed(list(futures)):
            row = futures.pop(future)
            try:
                some, failed = future.result()
            except Exception as error:  # of the row's arms together, or a worker that died
                some, failed = [], [f"{row}: {type(error).__name__}: {error}"]
            results[row] += some
            failures += failed
            for result in some:
                print(f"{row}, seed {result['seed']}, {result['arm']}: {result['elapsed']:.0f} s", flush=True)
            for line in failed:
                print(f"FAILED {line}", flush=True)
            if results[row] and row not in futures.values():
                stored.save(folder, row, COMPARISONS[row], seeds[row], results[row])
    return failures


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trajkern._bench.experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS), metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default each row's own")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--results", type=Path, default=stored.RESULTS, help="folder of the rows' JSON files")
    parser.add_argument("--report", type=Path, help="the page; by default bench/reproduction.md, or one in --results")
    parser.add_argument(
        "--best", nargs="+", choices=list(COMPARISONS), metavar="ROW", help=f"draw {BEST} of these rows"
    )
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    options = parser.parse_args(argv)
    ours = options.results == stored.RESULTS
    if ours and not options.page_only and options.seeds is not None:
        parser.error("--results must be a folder of your own with --seeds: the committed results are of each row's own")
    seeds = {row: options.seeds or list(COMPARISONS[row].seeds) for row in options.only}
    report = options.report or (page.REPORT if ours else options.results / page.REPORT.name)
    failures = [] if options.page_only else run_rows(seeds, options.jobs, options.results)
    rows = stored.load(options.results, COMPARISONS)
    if not rows:
        parser.error(f"--results must hold results to make a page of; {options.results} has none")
    if absent := sorted({*(options.best or ())} - rows.keys()):
        parser.error(f"--best must be rows that have results; {', '.join(absent)} have none")
    again = stored.load(options.results / "again", COMPARISONS)
    page.write(report, rows, [name for name in COMPARISONS if name not in rows], again)
    print(report)
    if options.best:
        page.draw_some(BEST, rows, options.best)
    for line in failures:
        print(f"FAILED {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
