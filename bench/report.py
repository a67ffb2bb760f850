"""The results as one HTML page that needs nothing else: the machine, the pictures, every table."""

from __future__ import annotations

from html import escape
from typing import Any

from trajkern._bench.case import OURS
from trajkern._bench.plots import PICTURES, svg
from trajkern._bench.table import (
    CONTENDERS,
    absent_peers,
    failure_rows,
    growth_rows,
    heading,
    memory_text,
    peer_rows,
    peers_of,
    seconds,
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
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--band); } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 13rem; }
td small { display: block; color: var(--faint); font-size: .92em; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .87rem; margin: .6rem 0; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; height: auto; min-width: 34rem; max-width: 52rem; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
"""


LONG = ("op", "work", "input")  # what names a case, in one cell here
TIME_COLUMNS = (*LONG, *CONTENDERS, "of copy", "of products", "peak memory")


def html(report: dict[str, Any]) -> str:
    """The page; ``report`` is what ``trajkern bench --json`` writes."""
    body = [
        "<h1>trajkern bench</h1>",
        f"<p>{escape(heading(report))}</p>",
        _machine(report),
        _figure(report, "overview"),
        _section("Targets", (*LONG, "measured", "target", ""), target_rows(report)),
        _section("Times", TIME_COLUMNS, _times(report)),
        _figure(report, "ratios"),
        _section("Other packages, as a multiple of trajkern's time", (*LONG, *peers_of(report)), peer_rows(report)),
        f'<p class="faint">{escape(absent_peers(report))}</p>',
        _figure(report, "roofline"),
        _section(
            "Growth", ("op", "over", "from", "to", "time grows by the power"), growth_rows(report.get("growth", []))
        ),
        _figure(report, "time"),
        _figure(report, "memory"),
        _figure(report, "errors"),
        _section("Gate failed, so not timed", ("case", "contender", "why"), failure_rows(report)),
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
    draw, caption = PICTURES[name]
    picture = svg(draw, report)
    return picture and f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _times(report: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            case["op"],
            case["work"],
            case["shape"],
            *(_time(case, name) for name in CONTENDERS),
            f"{case['share_of_copy']:.0%}" if "share_of_copy" in case else "",
            f"{case['share_of_gemm']:.0%}" if "share_of_gemm" in case else "",
            memory_text(case),
        )
        for case in report["cases"]
    ]


def _time(case: dict[str, Any], name: str) -> str:
    measured = case["seconds"].get(name)
    if measured is None:
        return "gate failed" if name in case["gate"] else "–"
    text = f"{seconds(measured['median'])} ± {measured['spread']:.0%}"
    if name == OURS or OURS not in case["seconds"]:
        return text
    return f"{text} ({measured['median'] / case['seconds'][OURS]['median']:.2f} ×)"


def _section(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    named = len(columns) - len(LONG) if columns[: len(LONG)] == LONG else 0
    head = "".join(f"<th>{escape(column)}</th>" for column in (("case", *columns[len(LONG) :]) if named else columns))
    body = "".join(f"<tr>{_case(*row[:3]) if named else ''}{''.join(map(_cell, row[-named:]))}</tr>" for row in rows)
    return f'<h2>{escape(title)}</h2>\n<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _case(op: str, work: str, shape: str) -> str:
    return f"<td>{escape(op.strip('`'))}<small>{escape(work)}; {escape(shape)}</small></td>"


def _cell(text: str) -> str:
    """Markdown's marks become the page's."""
    kind = ' class="bad"' if text.startswith("**") else ' class="good"' if text == "met" else ""
    return f"<td{kind}>{escape(text.strip('*`'))}</td>"
