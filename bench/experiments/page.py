"""The page of the comparison, from the rows' stored results alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trajkern._bench.experiments import panels
from trajkern._bench.experiments.comparisons import Test
from trajkern._bench.experiments.measures import compared, measured
from trajkern._bench.experiments.statistics import Finding, holm, paired, verdict
from trajkern._bench.experiments.stored import Row

REPORT = Path("bench/reproduction.md")
_SMALLEST = 1e-4  # of a p that is written out
_HEAD = """# What the recipes do on tasks that have what they need

`make reproduce` wrote this from `bench/reproduction/`: a JSON file a row with every seed's figures and curves,
flags, machine and commit. Each row is a recipe beside its authors' baselines and controls, on a generated task with the
structure that the effect needs; all arms of a row start from one warm-up a seed unless the row says otherwise. Settings
were chosen on other seeds than a row shows. The built-in model has about 100,000 parameters: this shows
whether an effect is there, not its size in the paper.

A row's hypotheses stand in `bench/experiments/rows/`: the recipe is better in a measure than another arm. Differences
are paired by seed, intervals are Student's t at 95 %, and p is two-sided and corrected by Holm over all {tests}
hypotheses of this page. A row **reproduces** if every one of its hypotheses has its direction and a corrected p below
.05. It **does not** if the interval of one lies wholly on the other side, or excludes the smallest difference that
would matter, where one is stated. Else it **cannot be told**.

All of this took {hours:.1f} hours of one thread, warm-ups and evaluations included.
"""
_CAPTION = """A line is the mean over seeds, its band reaches from the lowest seed to the highest. A curve over another
measure has a thin line a seed, bars have a dot a seed and the standard error, and a calibration curve is of all seeds
together, its circles as large as the share of answers."""


def findings_of(rows: dict[str, Row]) -> dict[str, list[Finding]]:
    """What the seeds say of every hypothesis, p corrected over all rows' of them."""
    every = [
        (name, row, test, paired(differences(row, test))) for name, row in rows.items() for test in row.comparison.tests
    ]
    found: dict[str, list[Finding]] = {name: [] for name in rows}
    for (name, row, test, difference), corrected in zip(every, holm([x[3].p for x in every]), strict=True):
        sign = 1 if test.better == "higher" else -1
        found[name].append(Finding(difference, corrected, sign, test.matters, len(row.seeds)))
    return found


def differences(row: Row, test: Test) -> list[float]:
    """The first arm's measure less the other's, on the seeds where both have it."""
    first, other = row.arms[next(iter(row.comparison.arms))], row.arms[test.against]
    pairs = [compared(first[s], other[s], test.measure) for s in row.seeds if s in first and s in other]
    return [x - y for x, y in pairs if x is not None and y is not None]


def write(report: Path, rows: dict[str, Row], absent: Sequence[str] = (), again: dict[str, Row] | None = None) -> None:
    """Write the page, and the picture beside it.

    Args:
        report: the page.
        rows: with their results.
        absent: rows that have no results.
        again: rows that have run once more, on other seeds.
    """
    found = findings_of(rows)
    verdicts = {name: verdict(some) for name, some in found.items()}
    picture = report.with_suffix(".png")
    report.parent.mkdir(parents=True, exist_ok=True)
    panels.draw(rows, verdicts, picture)
    notes = report.with_name("reproduction_notes.md")
    lines = [*_head(rows, found), *_summary(rows, found, verdicts)]
    if absent:
        lines += [f"Rows without results, of which nothing is claimed: {', '.join(absent)}.", ""]
    lines += _again(again) if again else []
    lines += [f"![a panel a row]({picture.name})", ""]
    lines += [_CAPTION, ""]
    lines += [notes.read_text()] if notes.exists() else []
    for name, row in rows.items():
        lines += _section(name, row, found[name], verdicts[name])
    report.write_text("\n".join(lines).rstrip() + "\n")


def draw_some(picture: Path, rows: dict[str, Row], names: Sequence[str]) -> None:
    """Draw the panels of some rows alone, with the verdicts that they have among all."""
    verdicts = {name: verdict(found) for name, found in findings_of(rows).items()}
    panels.draw({name: rows[name] for name in names}, verdicts, picture)


def _head(rows: dict[str, Row], found: dict[str, list[Finding]]) -> list[str]:
    tests, hours = sum(map(len, found.values())), sum(map(_elapsed, rows.values())) / 3600
    return [_HEAD.format(tests=tests, hours=hours)]


def _summary(rows: dict[str, Row], found: dict[str, list[Finding]], verdicts: dict[str, str]) -> list[str]:
    lines = ["| row | claim | tested | verdict |", "|---|---|---|---|"]
    for name, row in rows.items():
        tested = _tested(row, found[name])
        lines.append(f"| [{name}](#{name}) | {row.comparison.claim} | {tested} | **{verdicts[name]}** |")
    return [*lines, ""]


def _tested(row: Row, found: list[Finding]) -> str:
    """A cell with a line a hypothesis."""
    pairs = zip(row.comparison.tests, found, strict=True)
    return "<br>".join(f"{test.measure} against {test.against}: {_difference(f)}" for test, f in pairs)


def _again(rows: dict[str, Row]) -> list[str]:
    """The same hypotheses on other seeds, p corrected over these rows'."""
    found = findings_of(rows)
    lines = [
        "Run again on other seeds, with nothing changed but p, which is corrected over these rows' hypotheses"
        " (`bench/reproduction/again/`):",
        "",
        "| row | seeds | tested | verdict | minutes of one thread |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = (
            name,
            f"{min(row.seeds)} to {max(row.seeds)}",
            _tested(row, found[name]),
            f"**{verdict(found[name])}**",
            f"{_elapsed(row) / 60:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _section(name: str, row: Row, found: list[Finding], verdict: str) -> list[str]:
    comparison = row.comparison
    lines = [
        f"## {name}",
        "",
        f"**{verdict}**. Claim: {comparison.claim}.",
        "",
        f"What it needs: {comparison.needs}.",
        "",
    ]
    if row.stale:
        lines += [
            f"**Stale**: these results were made with other flags than the row now has: {', '.join(row.stale)}.",
            "",
        ]
    if row.missing:
        lines += ["No result: " + ", ".join(f"{arm} (seed {seed})" for arm, seed in row.missing) + ".", ""]
    lines += [*_table(row), "", *_tests(row, found), ""]
    if comparison.lesson:
        lines += [comparison.lesson, ""]
    return lines + _commands(name, row)


def _table(row: Row) -> list[str]:
    """Mean over seeds and its standard error, a line an arm."""
    measures = tuple(dict.fromkeys((*row.comparison.measures, "tokens", "seconds")))
    lines = ["| arm | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
    first = row.arms[next(iter(row.comparison.arms))]
    start = list((row.warm_ups or first).values())
    if start:
        begun = [run["before"] | {"seconds": run["warm_up_seconds"]} for run in start]
        lines.append(f"| *warm-up* | {' | '.join(cell([x.get(m) for x in begun]) for m in measures)} |")
    for arm, runs in row.arms.items():
        some = [runs[seed] for seed in row.seeds if seed in runs]
        cells = [cell([measured(run, m) for run in some]) for m in measures]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _tests(row: Row, found: list[Finding]) -> list[str]:
    first = next(iter(row.comparison.arms))
    return [
        f"- {test.measure} {test.better} than of {test.against}"
        f"{'' if test.matters is None else f' by {test.matters:g} or more'}: {first} differs by {_difference(f)}"
        f"{'' if f.difference.pairs == f.seeds else f', on {f.difference.pairs} of {f.seeds} seeds'}; {_word(f)}"
        for test, f in zip(row.comparison.tests, found, strict=True)
    ]


def _word(f: Finding) -> str:
    return "holds" if f.holds else "fails" if f.fails else "not decided"


def _difference(f: Finding) -> str:
    """The mean, its interval and the corrected p."""
    x = f.difference
    size = max((abs(bound) for bound in (x.mean, x.low, x.high) if math.isfinite(bound)), default=0.0)
    mean, low, high = (number(bound, size, "+") for bound in x[:3])
    p = f"p < {_SMALLEST:.4f}" if f.corrected < _SMALLEST else f"p = {f.corrected:.4f}"
    return f"{mean} [{low}, {high}], {p}"


def _commands(name: str, row: Row) -> list[str]:
    """How to run the row again, and what each arm's own flags are."""
    made, about = row.about["flags"], row.about
    shared = _common(list(made.values()))
    machine, versions, seeds = about["machine"], about["versions"], ", ".join(map(str, row.seeds))
    return [
        f"Seeds {seeds}; {machine['cpu']}, torch {versions['torch']}, commit {about['commit']}, {about['date'][:10]};"
        f" {_elapsed(row) / 60:.0f} minutes of one thread.",
        "",
        "```",
        f'make reproduce ARGS="--only {name}"',
        f"trajkern train {shared} --seed {row.seeds[0]} ARM",
        *(f"#   {arm}: {flags.removeprefix(shared).strip() or '(nothing more)'}" for arm, flags in made.items()),
        "```",
        "",
    ]


def _common(texts: Sequence[str]) -> str:
    """The words that all begin with, up to where each has an option next or nothing more."""
    words = [text.split(" ") for text in texts]
    count = next((n for n, some in enumerate(zip(*words, strict=False)) if len(set(some)) > 1), min(map(len, words)))
    while count and any(some[count:] and not re.match("--?[a-z]", some[count]) for some in words):
        count -= 1
    return " ".join(words[0][:count])


def _elapsed(row: Row) -> float:
    """Seconds of the processor; of the clock where an older result has no others."""
    runs: list[dict[str, Any]] = [*row.warm_ups.values(), *(r for some in row.arms.values() for r in some.values())]
    return sum(run.get("processor", run["elapsed"]) for run in runs)


def cell(values: Sequence[float | None]) -> str:
    """Mean and standard error, and of how many of the values, where some are missing."""
    known = [x for x in values if x is not None]
    if not known:
        return "-"
    mean = statistics.fmean(known)
    error = f" ± {number(statistics.stdev(known) / math.sqrt(len(known)), mean)}" if len(known) > 1 else ""
    missing = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{number(mean, mean)}{error}{missing}"


def number(x: float, size: float, sign: str = "") -> str:
    """Three decimals where things are of a ``size`` below 10, fewer above, thousands and millions by a letter."""
    if math.isnan(x):
        return "-"
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    if abs(size) >= 1e4:
        letter, unit = ("M", 1e6) if abs(size) >= 1e6 else ("k", 1e3)
        return f"{x / unit:{sign}.{2 if letter == 'M' else 1}f}{letter}"
    return f"{x:{sign}.{3 if abs(size) < 10 else 1}f}"
