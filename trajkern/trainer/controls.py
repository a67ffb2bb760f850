"""GRPO beside two controls at equal compute, from the same warm-up, over several seeds.

Writes a table in Markdown and the numbers in JSON. Flags of the trainer follow ``--``:
``python -m trajkern.trainer.controls --seeds 0 1 2 -- --task count_bits --steps 200``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trajkern.trainer.config import parse
from trajkern.trainer.train import Result, train

CONTROLS = ("random-rewards", "supervised")
UNLIMITED = ["--time-limit", "1e9"]  # a step left out would make the compute unequal


def run_seed(seed: int, out: Path, flags: list[str]) -> dict[str, Any]:
    """Train one seed, then both controls from its warm-up; accuracies by arm, the start as ``warm-up``."""
    first = parse([*flags, "--seed", str(seed), "--out", str(out / f"seed{seed}")])
    main = train(first)
    found = {"seed": seed, "warm-up": asdict(main.before), first.recipe: _outcome(main)}
    start = str(main.checkpoint.with_name("warmup.safetensors"))
    for control in CONTROLS:
        folder = str(out / f"seed{seed}-{control}")
        result = train(parse([*flags, "--resume", start, "--control", control, "--out", folder]))
        found[control] = _outcome(result)
    return found


def _outcome(result: Result) -> dict[str, Any]:
    clock = vars(result.clock)
    return {**asdict(result.after), "steps": result.steps, "seconds": round(result.seconds, 1), **clock}


def table(rows: list[dict[str, Any]], samples: int) -> str:
    """The accuracies as a Markdown table, a row a seed: pass@1 / pass@k / greedy."""
    arms = [name for name in rows[0] if name != "seed"]
    lines = [
        f"Held-out pass@1 / pass@{samples} / greedy.",
        "",
        "| seed | " + " | ".join(arms) + " |",
        "|---" * (len(arms) + 1) + "|",
    ]
    for row in rows:
        cells = [" / ".join(f"{row[arm][k]:.3f}" for k in ("pass_at_1", "pass_at_k", "greedy")) for arm in arms]
        lines.append(f"| {row['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    own, flags = argv[:split], [*UNLIMITED, *argv[split + 1 :]]
    parser = argparse.ArgumentParser(prog="python -m trajkern.trainer.controls", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/controls"), help="folder of the results, made new")
    options = parser.parse_args(own)
    options.out.mkdir(parents=True)
    config = parse(flags)
    rows = []
    for seed in options.seeds:
        rows.append(run_seed(seed, options.out, flags))
        text = table(rows, config.eval.samples)
        (options.out / "controls.md").write_text(text)
        (options.out / "controls.json").write_text(json.dumps({"config": config.to_json(), "seeds": rows}, indent=2))
    print(f"\n{text}\n{options.out / 'controls.md'}\n{options.out / 'controls.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
