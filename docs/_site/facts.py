"""What the project holds as data about an op: its arguments' shapes, its owners, cases, launches and figures."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import trajkern as tk
from trajkern._bench.results import load
from trajkern.testing import SPECS
from trajkern.testing.registry import OpSpec

ROOT = Path(__file__).resolve().parents[2]


class Field(NamedTuple):
    """A parameter or a field, as its source has it."""

    name: str
    annotation: str
    default: str  # "" where there is none
    comment: str


def ops() -> dict[str, list[str]]:
    """The public functions of trajkern.ops, by family, in the registry's order."""
    found: dict[str, list[str]] = {spec.family: [] for spec in SPECS}
    for name in tk.__all__:
        value = getattr(tk, name)
        if inspect.isfunction(value) and value.__module__.startswith("trajkern.ops."):
            found.setdefault(family(name), []).append(name)
    return found


def family(op: str) -> str:
    known = spec(op)
    return known.family if known is not None else module(op).rpartition(".")[2]


def module(op: str) -> str:
    return getattr(tk, op).__module__


def spec(op: str) -> OpSpec | None:
    """None for an op that is torch's own arithmetic on every device."""
    return next((spec for spec in SPECS if spec.name == op), None)


def parameters(function: Callable[..., Any]) -> list[Field]:
    """Of a function, with the comments behind them."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    (defined,) = ast.parse(source).body
    assert isinstance(defined, ast.FunctionDef)
    comments, arguments = _comments(source), defined.args
    by_place = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(by_place) - len(arguments.defaults))
    given = zip(
        [*by_place, *arguments.kwonlyargs], [*defaults, *arguments.defaults, *arguments.kw_defaults], strict=True
    )
    return [
        Field(a.arg, _source(a.annotation), _source(default), comments.get(a.end_lineno or 0, ""))
        for a, default in given
    ]


def fields(kind: type) -> list[Field]:
    """Of a class whose body annotates them, with the comments behind them."""
    source = textwrap.dedent(inspect.getsource(kind))
    (defined,) = ast.parse(source).body
    assert isinstance(defined, ast.ClassDef)
    comments = _comments(source)
    return [
        Field(x.target.id, _source(x.annotation), _source(x.value), comments.get(x.end_lineno or 0, ""))
        for x in defined.body
        if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name) and not x.target.id.startswith("_")
    ]


def _source(node: ast.expr | None) -> str:
    return "" if node is None else ast.unparse(node)


def _comments(source: str) -> dict[int, str]:
    """Line -> the comment that stands behind its code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT and t.line[: t.start[1]].strip()
    }


def results() -> dict[str, dict[str, Any]]:
    """Folder -> the newest benchmark of a machine."""
    found = {}
    for folder in sorted((ROOT / "bench" / "results").iterdir()):
        if folder.is_dir() and (files := sorted(folder.glob("*.json"))):
            found[folder.name] = load("bench/results", files[-1])
    return found
