"""What the generated pages are made of: reST headings, tables and escaped text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def heading(text: str, level: int = 0) -> list[str]:
    return [text, "=-~"[level] * max(len(text), 4), ""]


def plain(text: str) -> str:
    """Text in which nothing is marked up."""
    return re.sub(r"([\\*`|_<])", r"\\\1", text)


def code(text: str) -> str:
    return f"``{text}``" if text else ""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of cells of one paragraph each, or nothing where there are no rows."""
    laid = [line for row in (columns, *rows) for line in _row(row)]
    if len(laid) == len(columns):
        return []
    return [".. list-table::", "   :header-rows: 1", "", *laid, ""]


def _row(cells: Sequence[str]) -> list[str]:
    return [f"   {'* -' if i == 0 else '  -'} {cell}".rstrip() for i, cell in enumerate(cells)]


def toctree(pages: Iterable[str], caption: str = "", hidden: bool = True) -> list[str]:
    options = [f"   :caption: {caption}"] * bool(caption) + ["   :hidden:"] * hidden
    return [".. toctree::", *options, "", *(f"   {page}" for page in pages), ""]


def folded(title: str, lines: list[str]) -> list[str]:
    """What opens when its title is chosen."""
    return [*_raw(f"<details><summary>{title}</summary>"), *lines, *_raw("</details>")]


def _raw(html: str) -> list[str]:
    return [".. raw:: html", "", f"   {html}", ""]
