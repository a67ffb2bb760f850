"""``python -m trajkern._bench.reliability.page``: the table of docs/reliability.md, of the JSON files around it."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trajkern._bench.table import table

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- tried: begin (python -m trajkern._bench.reliability.page) -->", "<!-- tried: end -->"
COLUMNS = ("area", "tried", "fell short", "reason", "command", "processor", "date")


class Row(NamedTuple):
    """What a command did in one area: one object of its JSON file."""

    area: str
    tried: int
    fell_short: int
    reason: str  # of what fell short; else empty
    command: str
    processor: str
    date: str  # year-month-day


def row(area: str, tried: int, fell_short: int, command: str, reason: str = "") -> Row:
    """A row of this machine and day."""
    return Row(area, tried, fell_short, reason, command, processor(), time.strftime("%Y-%m-%d"))


def processor() -> str:
    """Its name and the number of its cores."""
    found = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else found}, {len(names) or '?'} cores"


def record(name: str, rows: Sequence[Row], folder: Path = FOLDER, page: Path = PAGE) -> None:
    """Put a command's rows into its file in the place of older ones of the same areas, and all files' onto the page."""
    path = folder / f"{name}.json"
    held = {x.area: x for x in read(path)} if path.exists() else {}
    held |= {x.area: x for x in rows}
    path.write_text(json.dumps([x._asdict() for x in held.values()], indent=2) + "\n")
    write(folder, page)


def read(path: Path) -> list[Row]:
    """Raises ValueError naming the file and what is wrong with its objects."""
    try:
        found = [Row(**x) for x in json.loads(path.read_text())]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold objects of {', '.join(Row._fields)}: {error}") from None
    for x in found:
        if not all(isinstance(n, int) for n in (x.tried, x.fell_short)) or not 0 <= x.fell_short <= x.tried:
            raise ValueError(f"{path}: fell_short must be a number from 0 to tried; {x.area!r} has {x.fell_short}")
        if x.fell_short and not x.reason:
            raise ValueError(f"{path}: {x.area!r} must have a reason, as {x.fell_short} fell short")
    return found


def write(folder: Path = FOLDER, page: Path = PAGE) -> None:
    """The table of all files, by the names of files and areas as the commands wrote them."""
    rows = [x for path in sorted(folder.glob("*.json")) for x in read(path)]
    cells = [(x.area, f"{x.tried:,}", str(x.fell_short), x.reason, f"`{x.command}`", *x[5:]) for x in rows]
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(COLUMNS, cells)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write()
