"""GRPO beside two controls at equal compute, from the same warm-up, over several seeds.

Writes a table in Markdown and the numbers in JSON. Flags of the trainer follow ``--``:
``python -m trajkern._bench.experiments.controls --seeds 0 1 2 -- --task count_bits --steps 200``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from trajkern._bench.experiments.arms import WARM_UP, run_arms
from trajkern.trainer.config import parse

CONTROLS = ("random-rewards", "supervised")
UNLIMITED = ["--time-limit", "1e9"]  # a step left out would make the compute unequal


def arms_of(recipe: str, flags: str) -> dict[str, str]:
    """The recipe's arm and the controls', which start from its warm-up."""
    return {recipe: flags, **{control: f"{flags} --control {control}" for control in CONTROLS}}


def table(seeds: list[list[dict[str, Any]]], samples: int) -> str:
    """The accuracies as a Markdown table, a row a seed: pass@1 / pass@k / greedy."""
    names = ("pass@1", f"pass@{samples}", "greedy")
    arms = ["warm-up", *(result["arm"] for result in seeds[0])]
    lines = [f"Held-out {' / '.join(names)}.", "", f"| seed | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for results in seeds:
        accuracies = [results[0]["before"], *(result["after"] for result in results)]
        cells = [" / ".join(f"{accuracy[name]:.3f}" for name in names) for accuracy in accuracies]
        lines.append(f"| {results[0]['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(prog="python -m trajkern._bench.experiments.controls", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/controls"), help="folder of the results, made new")
    options = parser.parse_args(argv[:split])
    flags = [*UNLIMITED, *argv[split + 1 :]]
    config = parse(flags)
    options.out.mkdir(parents=True)
    arms = arms_of(config.recipe, shlex.join(flags))
    seeds: list[list[dict[str, Any]]] = []
    for seed in options.seeds:
        results = run_arms(options.out, arms, seed, show=True)
        seeds.append([result for result in results if result["arm"] != WARM_UP])
        text = table(seeds, config.eval.samples)
        (options.out / "controls.md").write_text(text)
        numbers = {"config": config.to_json(), "results": [result for results in seeds for result in results]}
        (options.out / "controls.json").write_text(json.dumps(numbers, indent=2))
    print(f"\n{text}\n{options.out / 'controls.md'}\n{options.out / 'controls.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
