"""The page of what ran where: a run's line replaces an older one of the same part and versions, and no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from trajkern._bench import support

PAGE = f"above\n{support.BEGIN}\n{support.END}\nbelow\n"


def line(part: str, hosts: str, passed: str) -> tuple[str, ...]:
    return part, hosts, passed, "0", "1", "here"


def test_a_newer_run_replaces_its_own_line_only() -> None:
    page = support.replaced(PAGE, [line("ops", "torch 2.10.0", "3"), line("ops", "torch 2.15.0", "4")])
    page = support.replaced(page, [line("models", "torch 2.10.0, peft 1", "7")])
    page = support.replaced(page, [line("ops", "torch 2.15.0", "5")])
    cells = [[x.strip() for x in row.strip("|").split("|")] for row in page.splitlines() if row.startswith("| ")][2:]
    assert [x[:3] for x in cells] == [
        ["models", "torch 2.10.0, peft 1", "7"],
        ["ops", "torch 2.10.0", "3"],
        ["ops", "torch 2.15.0", "5"],
    ]
    assert page.startswith("above\n") and page.endswith("\nbelow\n") and support.replaced(page, []) == page


def test_a_part_of_which_nothing_passed_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        returncode, stdout, stderr = 1, "2 failed, 3 skipped in 1s", ""

    monkeypatch.setattr(support.subprocess, "run", lambda *_, **__: Done)
    with pytest.raises(SystemExit, match="no test of ops passed"):
        support.row("ops", slow=False)


def test_what_was_written_during_a_run_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two environments' runs may overlap."""
    page = tmp_path / "support.md"
    page.write_text(PAGE)

    def run(name: str, slow: bool) -> tuple[str, ...]:
        page.write_text(support.replaced(page.read_text(), [line("trl", "trl 1", "9")]))
        return line(name, "torch 2", "8")

    monkeypatch.setattr(support, "PAGE", page)
    monkeypatch.setattr(support, "row", run)
    monkeypatch.setattr(support.sys, "argv", ["support", "ops"])
    support.main()
    assert "| trl " in page.read_text() and "| ops " in page.read_text()


@pytest.mark.parametrize("name", support.PARTS)
def test_every_part_has_its_tests(name: str) -> None:
    assert all((support.ROOT / "tests" / x).exists() for x in support.PARTS[name].tests)


def test_nothing_on_the_page_failed() -> None:
    text = support.PAGE.read_text()
    rows = text.split(support.BEGIN)[1].split(support.END)[0].strip().splitlines()[2:]
    assert rows and all([x.strip() for x in row.strip("|").split("|")][3] == "0" for row in rows)
