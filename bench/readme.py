"""``make readme``: the table of times in docs/speed.md, from the results under bench/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trajkern._bench.case import COMPILED, OURS
from trajkern._bench.table import overview, peers_of, seconds, table
from trajkern._bench.text import size

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- times: begin (make readme) -->", "<!-- times: end -->"
COLUMNS = ("op", "work", OURS, "eager", COMPILED, "fastest package", "peak memory; eager's")

Report = dict[str, Any]


def section(results: Path) -> str:
    """A heading and a table for each machine, those with a GPU first, then what no GPU has measured yet."""
    measured = [(folder.name, newest(folder)) for folder in sorted(results.iterdir()) if folder.is_dir()]
    reports = sorted(measured, key=lambda entry: "gpu" not in entry[1]["machine"])
    on_gpus = {case["op"] for _, report in reports if "gpu" in report["machine"] for case in report["cases"]}
    missing = sorted({case["op"] for _, report in reports for case in report["cases"]} - on_gpus)
    parts = [f"{heading(report, folder)}\n\n{table(COLUMNS, rows(report))}" for folder, report in reports]
    if not on_gpus:
        parts.append("**None of these figures has been measured on a GPU yet.**")
    elif missing:
        parts.append(f"Not measured on a GPU yet: {', '.join(f'`{op}`' for op in missing)}.")
    return "\n\n".join(parts)


def newest(folder: Path) -> Report:
    """The last benchmark of a machine; of ``make gpu-check``'s file, the stage that measures."""
    report = json.loads(max(folder.glob("*.json")).read_text())
    return report["stages"]["benchmark"]["results"] if "stages" in report else report


def heading(report: Report, folder: str) -> str:
    machine, versions = report["machine"], report["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    others = ", ".join(f"{name} {report['peers'][name]}" for name in peers_of(report) if name != "torch")
    return (
        f"{where}, {report['date'][:10]}, torch {versions['torch']}{', ' if others else ''}{others}; medians of one "
        f"process (all of it: `bench/results/{folder}`):"
    )


def rows(report: Report) -> list[tuple[str, ...]]:
    def time(case: dict[str, Any], name: str) -> str:
        return seconds(case["seconds"][name]["median"]) if name in case["seconds"] else "–"

    def package(case: dict[str, Any]) -> str:
        timed = [name for name in peers_of(report) if name in case["seconds"]]
        best = min(timed, key=lambda name: case["seconds"][name]["median"], default=None)
        return f"{time(case, best)} ({best})" if best else "–"

    def memory(case: dict[str, Any]) -> str:
        shown = "memory_of" in case and {OURS, "eager"} <= case["peak_bytes"].keys()
        return "; ".join(size(case["peak_bytes"][name]) for name in (OURS, "eager")) if shown else ""

    return [
        (
            f"`{case['op']}`",
            f"{case['work']}: {case['shape']}",
            time(case, OURS),
            time(case, "eager"),
            time(case, COMPILED),
            package(case),
            memory(case),
        )
        for case in overview(report)
    ]


def replaced(text: str, tables: str) -> str:
    """``text`` with ``tables`` between its two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main() -> None:
    PAGE.write_text(replaced(PAGE.read_text(), section(ROOT / "bench" / "results")))


if __name__ == "__main__":
    main()
