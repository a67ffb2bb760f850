"""What a reader can count on in every C++ and CUDA file: functions of one screen with few arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("tree_sitter_cuda")
import tree_sitter_cuda
from tree_sitter import Language, Node, Parser

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*.*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"})
PARSER = Parser(Language(tree_sitter_cuda.language()))
FUNCTIONS = {"function_definition", "lambda_expression"}
MACROS = r"\bTK_(?:HD|INLINE|INLINE_LAMBDA)\b"  # attributes, which the grammar takes for types
# what else the grammar cannot read: attributes with arguments, where none is expected
ATTRIBUTES = r"__attribute__\(\((?:[^()]|\([^()]*\))*\)\)|__align__\(\d+\)"

MAX_LINES = 60
MAX_PARAMETERS = 12
STATEMENT = r"^[^#]*\b(?:return|for|while|if|switch)\b"
WITHOUT_FUNCTIONS = {"csrc/common/hostdevice.h", "csrc/common/kernels.h"}  # macros; declarations


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _readable(text: str) -> str:
    """The text without what the grammar cannot read, every other character in its place."""
    text = re.sub(r"^[ \t]*#define(?:.*\\\n)*.*", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.M)
    return re.sub(f"{MACROS}|{ATTRIBUTES}", lambda found: " " * len(found[0]), text)


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _walk(child)


def _parameters(function: Node) -> int:
    node: Node | None = function
    while node is not None and node.child_by_field_name("parameters") is None:
        node = node.child_by_field_name("declarator") or next(
            (child for child in node.named_children if "declarator" in child.type), None
        )
    listed = node.child_by_field_name("parameters") if node else None
    return sum("parameter" in child.type for child in listed.named_children) if listed else 0


@cache
def _nodes(text: str) -> list[Node]:
    return list(_walk(PARSER.parse(_readable(text).encode()).root_node))


def _functions(text: str) -> list[Node]:
    return [node for node in _nodes(text) if node.type in FUNCTIONS]


def _line(node: Node) -> int:
    return node.start_point[0] + 1


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_every_statement_is_measured(path: Path) -> None:
    """Each lies in a function that the grammar has found, and there is nothing that it cannot read."""
    text = path.read_text()
    unread = [_line(node) for node in _nodes(text) if node.type == "ERROR"]
    assert not unread, f"{_name(path)}: lines {unread} are not read"
    functions = _functions(text)
    assert bool(functions) != (_name(path) in WITHOUT_FUNCTIONS)
    inside = {line for f in functions for line in range(f.start_point[0], f.end_point[0] + 1)}
    lines = [line.partition("//")[0] for line in _readable(text).splitlines()]
    outside = [n + 1 for n, line in enumerate(lines) if re.search(STATEMENT, line) and n not in inside]
    assert not outside, f"{_name(path)}: lines {outside} are in no function"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_functions(path: Path) -> None:
    functions = _functions(path.read_text())
    long = {_line(f): lines for f in functions if (lines := f.end_point[0] - f.start_point[0] + 1) > MAX_LINES}
    assert not long, f"{_name(path)}: line -> more than {MAX_LINES} lines: {long}"
    wide = {_line(f): count for f in functions if (count := _parameters(f)) > MAX_PARAMETERS}
    assert not wide, f"{_name(path)}: line -> more than {MAX_PARAMETERS} parameters: {wide}"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_switches_name_every_member(path: Path) -> None:
    """A default would take a new member for the last one; the build refuses a switch that forgets one."""
    assert not re.search(r"\bdefault:", path.read_text())


def test_measures() -> None:
    text = """
template <class T>
TK_INLINE Vec<T> member(const T (&x)[4], int b = 0, std::array<int, 3> c = {}) const {
  const auto f = [&](int a, auto... rest) TK_INLINE_LAMBDA {
    return a;
  };
  return f(b);
}
template <class T>
bool Kernels<T>::outside(const T*, int) {}
__attribute__((target("avx2,fma"), noinline)) void *pointer(int* x) { return x; }
"""
    measured = [(f.type, _line(f), f.end_point[0] + 1, _parameters(f)) for f in _functions(text)]
    assert measured == [
        ("function_definition", 3, 8, 3),
        ("lambda_expression", 4, 6, 2),
        ("function_definition", 10, 10, 2),
        ("function_definition", 11, 11, 1),
    ]
