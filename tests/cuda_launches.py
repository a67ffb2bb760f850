"""How many kernels a call of csrc/cuda can launch at most, read from its source, which needs no GPU."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
_FUNCTION = r"\b{}\([^;{{}}]*\)\s*(?:const\s*)?{{"  # a definition's head, up to its opening brace
_LAMBDA = r"\bauto (\w+) = \[[^\]]*\]\([^)]*\)\s*{"

Counts = dict[str, int]  # a name that is called -> kernels that a call launches


def most_launches(name: str) -> int:
    """By the definition of ``Kernels<T>::name``, its helpers with it; an ``if`` counts as if all of it ran."""
    heads = re.findall(rf"\w+Kernels<T>::{_FUNCTION.format(name)}", _source())
    if len(heads) != 1:
        raise LookupError(f"csrc/cuda must define {name} once, it does {len(heads)} times")
    return _of_body(_body(heads[0]), _helpers())


@cache
def _source() -> str:
    text = "\n".join(path.read_text() for path in sorted(FOLDER.iterdir()) if path.suffix in (".cu", ".cuh"))
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)


@cache
def _helpers() -> Counts:
    """Functions that launch for others; each may call those that stand before it."""
    counts: Counts = {"launch": 1}
    for head in re.findall(rf"\bvoid ({_FUNCTION.format(r'[a-z_]+')})", _source()):
        name = head.partition("(")[0]
        if name != "launch" and (launched := _of_body(_body(head), counts)):
            counts[name] = launched
    return counts


def _body(head: str) -> str:
    at = _source().index(head) + len(head)
    return _source()[at : _closing(_source(), at)]


def _closing(text: str, at: int) -> int:
    """Where what is open at ``at`` closes."""
    depth = 0
    for end in range(at, len(text)):
        depth += (text[end] in "({[") - (text[end] in ")}]")
        if depth < 0:
            return end
    raise ValueError("a bracket is never closed")


def _of_body(code: str, counts: Counts) -> int:
    while found := re.search(_LAMBDA, code):  # it launches where it is called, not where it is written
        end = _closing(code, found.end())
        counts = counts | {found[1]: _of_statements(code[found.end() : end], counts)}
        code = code[: found.start()] + code[end + 1 :]
    return _of_statements(code, counts)


def _of_statements(code: str, counts: Counts) -> int:
    control = re.search(r"\b(switch|for|while)\s*\(", code)
    if control is None:
        return sum(n * len(re.findall(rf"(?<![\w:.]){name}\(", code)) for name, n in counts.items())
    end = _closing(code, control.end())
    head, rest = code[control.end() : end], code[end + 1 :].lstrip()
    stop = _closing(rest, 1) + 1 if rest.startswith("{") else _end_of_statement(rest)
    repeated = _repeated(control[1], head, rest[:stop], counts)
    return _of_statements(code[: control.start()], counts) + repeated + _of_statements(rest[stop:], counts)


def _end_of_statement(code: str) -> int:
    depth = 0
    for at, character in enumerate(code):
        depth += (character in "({[") - (character in ")}]")
        if character == ";" and not depth:
            return at + 1
    raise ValueError("a statement never ends")


def _repeated(kind: str, head: str, inner: str, counts: Counts) -> int:
    if kind == "switch":
        return max(_of_statements(case, counts) for case in re.split(r"\b(?:case\b|default:)", inner))
    once = _of_statements(inner, counts)
    values = re.search(r":\s*{([^}]*)}", head)
    if once and not values:
        raise ValueError(f"{kind} ({head}): nobody can say how often this loop launches")
    return once * (values[1].count(",") + 1) if values else 0
