"""What ``trajkern train --help`` shows: the options that most runs need, a group of the others, or all."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shutil
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

from trajkern.trainer.optional import require
from trajkern.trainer.schema import hints_of

ALL = "--help-all"
FLAGS = ("-h", "--help", ALL)
# The options of the first page; the others without a table of their own are the group "run".
FIRST = (
    "task",
    "model",
    "recipe",
    "credit",
    "seed",
    "steps",
    "prompts",
    "rollouts",
    "lr",
    "max_new",
    "device",
    "time_limit",
    "out",
    "resume",
    "config",
)
REST = "run"
NARROWEST = 40  # columns


def show(argv: Sequence[str], base: Any, prog: str) -> None:
    """Print the help that ``argv`` asks for, with the defaults of ``base``, and exit; return where it asks for none.

    Raises:
        ValueError: ``--help`` names a group that there is not.
        SystemExit: with status 0, once it is printed.
    """
    at = next((n for n, word in enumerate(argv) if word in FLAGS), None)
    if at is None:
        return
    groups = fields_by_group(base)
    if argv[at] == ALL:
        parsed(type(base), prog=prog, args=["--help"], default=base)
    group = next((word for word in argv[at + 1 : at + 2] if not word.startswith("-")), None)
    if group is not None and group not in groups:
        raise ValueError(f"--help must be followed by nothing or one of {', '.join(groups)}; got {group!r}")
    try:
        parsed(part(base, groups[group] if group else FIRST), prog=prog, args=["--help"])
    except SystemExit:
        if group is None:
            print(listed(base, groups, prog))
        raise


def parsed(kind: type, **options: Any) -> Any:
    """What tyro makes of a command line. In a terminal of a few columns it would not end."""
    asked = shutil.get_terminal_size
    columns, lines = asked()
    shutil.get_terminal_size = lambda *_: os.terminal_size((max(columns, NARROWEST), lines))
    try:
        return require("tyro").cli(kind, **options)
    finally:
        shutil.get_terminal_size = asked


def fields_by_group(base: Any) -> dict[str, list[str]]:
    """The names of the fields that are not on the first page, by group: a table is one, what has no table another."""
    names = [f.name for f in dataclasses.fields(base)]
    tables = [name for name in names if dataclasses.is_dataclass(getattr(base, name))]
    rest = [name for name in names if name not in {*FIRST, *tables}]
    return {REST: rest} | {name: [name] for name in tables}


def part(base: Any, names: Sequence[str]) -> type:
    """A dataclass of these fields of ``base``, with its values as defaults and its documentation."""
    kind: Any = type(base)
    hints = hints_of(kind)
    made = ((name, dataclasses.field(default_factory=partial(getattr, base, name))) for name in names)
    fields = [(name, hints[name], field) for name, field in made]
    return dataclasses.make_dataclass("Part", fields, namespace={"__doc__": kind.__doc__})


def listed(base: Any, groups: dict[str, list[str]], prog: str) -> str:
    """The groups with what each is about, and how to see them."""
    about = {name: _first_sentence(type(getattr(base, name, None))) for name in groups}
    about[REST] = f"what else there is to a run: {', '.join(name.replace('_', '-') for name in groups[REST])}"
    width = min(shutil.get_terminal_size().columns, 120)
    lines = ["", f"`{prog} --help GROUP` lists the options of a further group,", f"`{prog} {ALL}` those of all:"]
    for name, text in about.items():
        wrapped = textwrap.wrap(text, max(width - 18, 20), break_on_hyphens=False) or [""]
        lines += [f"  {name:<16}{wrapped[0]}", *(f"  {'':<16}{line}" for line in wrapped[1:])]
    return "\n".join(lines)


def _first_sentence(kind: type) -> str:
    text = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
    return re.sub(r":\w+:`~?([\w.]+)`", r"\1", text).partition(". ")[0].rstrip(".")
