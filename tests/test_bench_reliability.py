"""The page of what was tried: whose lines it shows, and that what fell short has a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trajkern._bench.reliability import page

PAGE = f"above\n{page.BEGIN}\n{page.END}\nbelow\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


def cells(text: str) -> list[list[str]]:
    lines = text.split(page.BEGIN)[1].split(page.END)[0].strip().splitlines()[2:]
    return [[x.strip() for x in line.strip("| ").split(" | ")] for line in lines]


def test_a_newer_line_replaces_that_of_its_area(folder: Path) -> None:
    def record(name: str, *rows: page.Row) -> list[list[str]]:
        page.record(name, rows, folder, folder / "page.md")
        return cells((folder / "page.md").read_text())

    record("soak", page.row("kills", 1000, 0, "make soak"), page.row("steps", 5, 5, "make soak", "it grew"))
    found = record("attack", page.row("calls", 7, 0, "make attack"))
    assert [x[:4] for x in found] == [
        ["calls", "7", "0", ""],
        ["kills", "1,000", "0", ""],
        ["steps", "5", "5", "it grew"],
    ]
    found = record("soak", page.row("steps", 9, 0, "make soak"))
    assert [x[:3] for x in found] == [["calls", "7", "0"], ["kills", "1,000", "0"], ["steps", "9", "0"]]
    assert all(x[4] == f"`make {'attack' if x[0] == 'calls' else 'soak'}`" for x in found)
    assert all("cores" in x[5] and re.fullmatch(r"\d{4}-\d\d-\d\d", x[6]) for x in found)
    text = (folder / "page.md").read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n")
    page.write(folder, folder / "page.md")
    assert (folder / "page.md").read_text() == text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reason": ""}, "'a' must have a reason, as 2 fell short"),
        ({"fell_short": 4}, "fell_short must be a number from 0 to tried; 'a' has 4"),
        ({"fell_short": "2"}, "fell_short must be a number from 0 to tried; 'a' has 2"),
        ({"machine": "here"}, "must hold objects of area, tried, fell_short, reason, command, processor, date"),
    ],
)
def test_a_file_that_says_nothing_is_refused(folder: Path, changed: dict[str, object], message: str) -> None:
    row = page.Row("a", 3, 2, "why", "make soak", "a processor", "2026-01-01")._asdict() | changed
    (folder / "soak.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=f"soak.json.*{message}"):
        page.write(folder, folder / "page.md")


def test_the_page_is_what_the_files_say(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(page.PAGE.read_text())
    page.write(page=copy)
    assert copy.read_text() == page.PAGE.read_text()
    makefile = (page.ROOT / "Makefile").read_text()
    commands = {x.command for path in page.FOLDER.glob("*.json") for x in page.read(path)}
    assert all(re.search(rf"^{x.split()[1]}:", makefile, re.M) for x in commands if x.startswith("make "))
