"""The results as one HTML page that needs nothing else: the machine, the pictures, every table."""

from __future__ import annotations

from html import escape
from typing import Any

from trajkern._bench import bare
from trajkern._bench.case import BARE, OURS
from trajkern._bench.plots import NARROW, PICTURES, WIDE, svg
from trajkern._bench.table import (
    ABOUT_BARE,
    absent_peers,
    contenders_of,
    failure_rows,
    growth_rows,
    heading,
    memory_text,
    peer_rows,
    peers_of,
    seconds,
    target_counts,
    target_rows,
)

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1f2328; --faint: #656d76; --line: #d0d7de; --band: #f6f8fa;
        --good: #1a7f37; --bad: #cf222e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0d1117; --ink: #e6edf3; --faint: #9198a1; --line: #30363d; --band: #161b22; --good: #3fb950;
          --bad: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.2rem; background: var(--ground); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .4rem 0; } .faint, figcaption { color: var(--faint); font-size: .87rem; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; font-variant-numeric: tabular-nums;
        border: 1px solid var(--line); }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { background: var(--band); position: sticky; top: 0; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; width: 30%; }
td small { display: block; color: var(--faint); font-size: .92em; }
.short { white-space: nowrap; } .short small { font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .87rem; margin: .6rem 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; } details > table { margin-top: .5rem; }
figure { margin: 1rem 0; } figure svg { display: block; width: 100%; height: auto; max-width: 52rem; }
.narrow { display: none !important; }
@media (max-width: 44rem) {
  body { padding: .7rem; }
  .narrow { display: block !important; } .broad { display: none !important; }
  table, tbody, tr, td { display: block; width: 100%; } tr:first-child { display: none; }
  tr { padding: .45rem .6rem; border-bottom: 1px solid var(--line); } tr:last-child { border-bottom: 0; }
  td { display: flex; gap: 1rem; justify-content: space-between; padding: .06rem 0; border: 0; }
  td:first-child { display: block; width: 100%; font-weight: 600; } td:first-child small { font-weight: 400; }
  td:not(:first-child)::before { content: attr(data-name); color: var(--faint); text-align: left; }
  td:empty { display: none; }
  dl { display: block; } dd { margin-bottom: .3rem; } }
"""


MARKS = "*`"  # Markdown's
SHORT = 32  # letters of a cell that does not break
NOTES = {
    bare.MOVES: "¹",
    bare.STORES: "²",
    bare.SKIPS: "³",
    bare.NOISE: "⁴",
}  # why it is beaten
LONG = ("op", "work", "input")  # what names a case, in one cell here


def html(report: dict[str, Any]) -> str:
    """The page; ``report`` is what ``trajkern bench --json`` writes."""
    times = (*LONG, *contenders_of(report), "of copy", "of products", "peak memory")
    body = [
        "<h1>trajkern bench</h1>",
        f"<p>{escape(heading(report))}</p>",
        _machine(report),
        _figure(report, "overview"),
        _section("Times", times, _times(report)),
        f'<p class="faint">{escape(ABOUT_BARE)}{escape(_notes(report))}</p>',
        _section("Other packages, as a multiple of trajkern's time", (*LONG, *peers_of(report)), peer_rows(report)),
        f'<p class="faint">{escape(absent_peers(report))}</p>',
        _figure(report, "ratios"),
        _figure(report, "roofline"),
        _section(
            "Growth", ("op", "over", "from", "to", "time grows by the power"), growth_rows(report.get("growth", []))
        ),
        _figure(report, "time"),
        _figure(report, "memory"),
        _figure(report, "errors"),
        _section("Gate failed, so not timed", ("case", "contender", "why"), failure_rows(report)),
        _targets(report),
    ]
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>trajkern bench, {escape(report['date'][:10])}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(part for part in body if part) + "\n</body>\n</html>\n"


def _machine(report: dict[str, Any]) -> str:
    facts = {**report["machine"], **{f"{k} (version)": v for k, v in report["versions"].items()}}
    facts |= {f"{k} (peer)": v for k, v in report.get("peers", {}).items()}
    rows = "".join(f"<dt>{escape(k.replace('_', ' '))}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    state = "" if report["complete"] else '<p class="bad">The run was interrupted: cases are missing.</p>'
    return f"{state}<details><summary>Machine and versions</summary><dl>{rows}</dl></details>"


def _figure(report: dict[str, Any], name: str) -> str:
    """The picture twice: as wide as a page, and as narrow as a phone, of which one is shown."""
    draw, caption = PICTURES[name]
    shown = [(kind, svg(draw, report, width)) for kind, width in (("broad", WIDE), ("narrow", NARROW))]
    pictures = "".join(f'<div class="{kind}">{picture}</div>' for kind, picture in shown if picture)
    return pictures and f"<figure>{pictures}<figcaption>{escape(caption)}</figcaption></figure>"


def _times(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            case["op"],
            case["work"],
            case["shape"],
            *(_time(case, name) for name in contenders_of(report)),
            f"{case['share_of_copy']:.0%}" if "share_of_copy" in case else "",
            f"{case['share_of_gemm']:.0%}" if "share_of_gemm" in case else "",
            memory_text(case).replace(", ", "\n"),
        )
        for case in report["cases"]
    ]


def _time(case: dict[str, Any], name: str) -> str:
    """The median, its spread, how many times trajkern's it is; a line each."""
    measured = case["seconds"].get(name)
    if measured is None:
        return "gate failed" if name in case["gate"] else "–"
    lines = [f"{seconds(measured['median'])} ± {measured['spread']:.0%}"]
    if name != OURS and OURS in case["seconds"]:
        note = NOTES.get(bare.why_less(case), "") if name == BARE else ""
        lines.append(f"{measured['median'] / case['seconds'][OURS]['median']:.2f} × {note}".rstrip())
    return "\n".join(lines)


def _notes(report: dict[str, Any]) -> str:
    """Of the marks in the table."""
    shown = {bare.why_less(case) for case in report["cases"]}
    notes = [f"{mark} {why}" for why, mark in NOTES.items() if why in shown]
    return f" Where trajkern takes less: {'; '.join(notes)}." if notes else ""


def _targets(report: dict[str, Any]) -> str:
    """Folded: what was hoped for is not what was measured."""
    rows = target_rows(report)
    if not rows:
        return ""
    columns = (*LONG, "measured", "target", "verdict")
    return f"<details><summary>{escape(target_counts(report))}</summary>{_table(columns, rows)}</details>"


def _section(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return f"<h2>{escape(title)}</h2>\n{_table(columns, rows)}" if rows else ""


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """On a phone a block a row, in which every number bears its column's name."""
    named = columns[: len(LONG)] == LONG
    first, others = ("case", columns[len(LONG) :]) if named else (columns[0], columns[1:])
    head = "".join(f"<th>{escape(column)}</th>" for column in (first, *others))
    body = "".join(
        f"<tr>{_case(*row[:3]) if named else f'<td>{escape(row[0].strip(MARKS))}</td>'}"
        f"{''.join(map(_cell, others, row[-len(others) :]))}</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _case(op: str, work: str, shape: str) -> str:
    return f"<td>{escape(op.strip(MARKS))}<small>{escape(work)}; {escape(shape)}</small></td>"


def _cell(column: str, text: str) -> str:
    """Markdown's marks become the page's; a short line does not break, and a long one may."""
    kind = ' class="bad"' if text.startswith("**") else ' class="good"' if text == "met" else ""
    first, *rest = text.strip(MARKS).split("\n")
    small = "".join(f"<small>{escape(line)}</small>" for line in rest)
    short = ' class="short"' if len(first) <= SHORT else ""
    shown = f"<span{short}>{escape(first)}{small}</span>" if first else ""
    return f'<td{kind} data-name="{escape(column)}">{shown}</td>'
