"""Docstrings as reST: what help() shows as it stands, with formulas for browsers.

Outside of the sections ``Args:`` and so on, what stands alone, indented by four spaces, is a formula; or a table of
choices, whose lines are ``name  meaning`` with two or more spaces between. Code stands behind ``::``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any

SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields):$")
CHOICE = re.compile(r"(?P<name>\S+)  +(?P<meaning>\S.*)$")
FORMULA = re.compile(r"\S+ = ")
Block = tuple[str, list[str]]  # "text", "formula", "choices" or "code", and its lines


def as_rest(docstring: str) -> list[str]:
    """The lines of a docstring as Sphinx and napoleon read them."""
    lines: list[str] = []
    for kind, block in blocks(docstring):
        if kind == "formula":
            lines += [".. formula::", "", *block]
        elif kind == "choices":
            lines += _definitions(block)
        else:
            lines += block
        lines.append("")
    return lines


def summary(docstring: str) -> str:
    """The first sentence or line, without what leads over to code."""
    first = inspect.cleandoc(docstring).split("\n\n")[0].replace("\n", " ")
    return re.sub(r"::?$", ".", first)


def blocks(docstring: str) -> list[Block]:
    """The paragraphs, each with its kind."""
    found: list[Block] = []
    in_section, code = False, False
    for paragraph in _paragraphs(inspect.cleandoc(docstring).splitlines()):
        indented = paragraph[0].startswith("    ")
        code = indented and (code or _leads_to_code(found))
        if not indented:
            in_section = SECTION.match(paragraph[0]) is not None
        if code:
            found.append(("code", paragraph))
        elif not indented or in_section:
            found.append(("text", _whole_names(paragraph) if in_section else paragraph))
        else:
            choices = all(CHOICE.match(line[4:]) for line in paragraph if not line.startswith("     "))
            found.append(("choices" if choices else "formula", paragraph))
    return found


def _paragraphs(lines: Sequence[str]) -> list[list[str]]:
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return [paragraph for paragraph in paragraphs if paragraph]


def _leads_to_code(before: list[Block]) -> bool:
    return bool(before) and before[-1][0] == "text" and before[-1][1][-1].endswith("::")


def _whole_names(paragraph: list[str]) -> list[str]:
    """With the names of several arguments, which may take more than one line, in one: napoleon reads no more."""
    lines: list[str] = []
    for line in paragraph:
        if lines and re.match(r"    \w[\w, ]*,$", lines[-1]):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return lines


def _definitions(block: list[str]) -> list[str]:
    entries: list[list[str]] = []
    for line in block:
        found = None if line.startswith("     ") else CHOICE.match(line[4:])
        if found is None:
            entries[-1][1] += f" {line.strip()}"
        else:
            entries.append([found["name"], found["meaning"]])
    lines: list[str] = []
    for name, meaning in entries:
        formula = [".. formula::", "", f"    {meaning}"]
        lines += [
            f"``{name}``",
            *(f"    {line}".rstrip() for line in (formula if FORMULA.match(meaning) else [meaning])),
            "",
        ]
    return lines


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """autodoc's event, before napoleon's."""
    lines[:] = as_rest("\n".join(lines))


def is_left_out(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a named tuple, which stand in its signature, have no docstring of their own. None: autodoc says."""
    return True if type(obj).__name__ == "_tuplegetter" else None
