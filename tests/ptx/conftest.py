"""The table of what ran on compiled kernels, by family."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """From the reports' properties, which xdist hands on from its workers."""
    rows: dict[str, list[tuple[float, int]]] = {}
    for report in _reports(terminalreporter):
        found = dict(report.user_properties)
        if report.when == "call" and "family" in found:
            rows.setdefault(str(found["family"]), []).append((float(found["worst"]), int(found["launches"])))
    if rows:
        terminalreporter.section("compiled kernels, by family")
        terminalreporter.line(f"{'family':<14}{'cases':>6}{'worst share of its budget':>28}{'launches':>10}")
        for family, of in rows.items():
            worst, launches = max(w for w, _ in of), sum(n for _, n in of)
            terminalreporter.line(f"{family:<14}{len(of):>6}{worst:>28.2f}{launches:>10,}")


def _reports(terminalreporter: pytest.TerminalReporter) -> Iterator[pytest.TestReport]:
    for kind in ("passed", "failed", "xfailed"):
        yield from terminalreporter.stats.get(kind, [])
