"""The plain formulas of docstrings as MathML, which browsers typeset without a script and without a network.

A formula reads as it is: ``A_i = (d_i - mean) / (sqrt(var) + eps)``. Nothing is rearranged but what its brackets say:
``sqrt(...)`` becomes a root, and ``(...) / (...)`` or ``(...) / x`` a fraction. Three or more spaces part formulas.
A line without a sign that relates or computes is prose, whose hyphens, slashes and bullets are no such sign.
"""

from __future__ import annotations

import re
from html import escape
from typing import NamedTuple

LETTERS = ("alpha", "beta", "gamma", "delta", "eta", "lambda", "lam", "sigma", "tau", "phi")
GREEK = dict(zip(LETTERS, "αβγδηλλστφ", strict=True))
OPERATORS = {"*": "⋅", "-": "−", ">=": "≥", "<=": "≤", "->": "→", "||": "∥"}
SHORT_WORDS = ("of", "or", "by", "at", "in", "is", "as", "no", "KL", "CE")  # which are no two variables
INDEXED = ("sum", "mean", "max", "min", "var", "std", "accuracy", *GREEK)  # words whose _ is no part of the name
TOKEN = re.compile(
    r"\s*(?:(?P<name>[A-Za-z][A-Za-z0-9]*(?:'s\b|'*)(?:_[A-Za-z0-9]+)*)|(?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)"
    r"|(?P<operator>>=|<=|->|\|\||[-+*/=<>,;:])|(?P<open>[(\[])|(?P<close>[)\]])|(?P<power>\^)|(?P<below>_\w+))"
)
SIGN = re.compile(r"\S\s*[=<>^*+|]|\S\s+[-/]\s")
NARROW, WIDE = '<mspace width="0.17em"/>', '<mspace width="0.28em"/>'


class Token(NamedTuple):
    kind: str
    text: str
    touches: bool  # no space stands before it


class Item(NamedTuple):
    """A piece of a formula."""

    markup: str
    kind: str  # "operand", "word", "operator", "group" in brackets, or "argument", the group that touches a name
    bare: str = ""  # of a group: without its brackets


def block(lines: list[str]) -> str:
    """HTML of the lines of one indented paragraph. Raises ValueError, naming the line, where one is no formula."""
    for line in lines:
        if not SIGN.search(line):
            raise ValueError(f"no formula: {line.strip()!r} relates and computes nothing; code stands behind '::'")
    rows = ("".join(math(part) for part in re.split(r"\s{3,}(?![\s=])", line.strip())) for line in lines)
    return f'<div class="formula">{"".join(f"<div>{row}</div>" for row in rows)}</div>'


def math(text: str) -> str:
    """A ``math`` element; what reads aloud has the plain text."""
    plain = " ".join(text.split())
    items, rest = _row(_tokens(plain), plain)
    if rest:
        raise ValueError(f"a bracket is closed that was not opened: {plain!r}")
    return f'<math display="block" alttext="{escape(plain)}"><mrow>{_joined(items)}</mrow></math>'


def _tokens(text: str) -> list[Token]:
    tokens, at = [], 0
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            raise ValueError(f"no formula: {text!r} at {text[at:]!r}; code stands behind '::'")
        tokens.append(Token(found.lastgroup, found[found.lastgroup], found.start(found.lastgroup) == at))
        at = found.end()
    return tokens


def _row(tokens: list[Token], text: str) -> tuple[list[Item], list[Token]]:
    """The items up to the bracket that closes this row, and what follows from it on."""
    items: list[Item] = []
    while tokens and tokens[0].kind != "close":
        token, *tokens = tokens
        if token.kind == "open":
            item, tokens = _group(token, tokens, text)
            if token.touches and items and items[-1].kind != "operator":
                item = item._replace(kind="argument")
            if item.kind == "argument" and items[-1].bare == "sqrt":
                items[-1] = Item(f"<msqrt>{item.bare}</msqrt>", "operand")
            else:
                items.append(item)
        elif token.kind in ("power", "below"):
            if not items:
                raise ValueError(f"{token.text!r} has nothing to stand at: {text!r}")
            script, tokens = _exponent(tokens, text) if token.kind == "power" else (_letters(token.text[1:]), tokens)
            items[-1] = _with_script("msup" if token.kind == "power" else "msub", items[-1], script)
        elif token.kind == "name":
            items.append(_name(token.text, is_word=bool(tokens) and tokens[0].text in ("of", "over")))
        else:
            number = token.kind == "number"
            items.append(
                Item(f"<mn>{token.text}</mn>", "operand") if number else Item(_operator(token.text), "operator")
            )
        _join_fraction(items)
    return items, tokens


def _group(opened: Token, tokens: list[Token], text: str) -> tuple[Item, list[Token]]:
    items, rest = _row(tokens, text)
    if not rest:
        raise ValueError(f"a bracket is not closed: {text!r}")
    bare = _joined(items)
    return Item(f"<mrow><mo>{opened.text}</mo>{bare}<mo>{rest[0].text}</mo></mrow>", "group", bare), rest[1:]


def _exponent(tokens: list[Token], text: str) -> tuple[str, list[Token]]:
    if not tokens or tokens[0].kind not in ("open", "name", "number"):
        raise ValueError(f"a power lacks its exponent: {text!r}")
    token, *rest = tokens
    if token.kind == "open":
        item, rest = _group(token, rest, text)
        return item.bare, rest
    return (f"<mn>{token.text}</mn>" if token.kind == "number" else _name(token.text).markup), rest


def _with_script(tag: str, base: Item, script: str) -> Item:
    markup = f"<{tag}><mrow>{base.markup}</mrow><mrow>{script}</mrow></{tag}>"
    return Item(markup, base.kind, markup if base.kind == "group" else "")  # as a numerator it keeps its brackets


def _join_fraction(items: list[Item]) -> None:
    """Makes one of a numerator in brackets, a slash and what follows, where these are the last three."""
    if len(items) >= 3 and items[-3].kind == "group" and items[-2].markup == _operator("/"):
        numerator, _, below = items[-3:]
        denominator = below.bare if below.kind == "group" else below.markup
        fraction = f"<mfrac><mrow>{numerator.bare}</mrow><mrow>{denominator}</mrow></mfrac>"
        items[-3:] = [Item(fraction, "operand")]


def _operator(text: str) -> str:
    return f"<mo>{escape(OPERATORS.get(text, text))}</mo>"


def _name(name: str, is_word: bool = False) -> Item:
    base, *below = name.split("_")
    if below and not _is_indexed(base.rstrip("'"), below):
        return Item(f'<mtext class="argument">{name}</mtext>', "word")
    if base == "sum" and not is_word:
        symbol, kind = "<mo>∑</mo>", "operand"
    else:
        symbol = _letters(base.rstrip("'"))
        kind = "word" if "<mtext>" in symbol else "operand"
    if base.endswith("'"):
        symbol = f"<msup><mrow>{symbol}</mrow><mo>{'′' * (len(base) - len(base.rstrip(chr(39))))}</mo></msup>"
    if below:
        symbol = f"<msub><mrow>{symbol}</mrow><mrow>{_letters(below[0])}</mrow></msub>"
    return Item(symbol, kind, "sqrt" if name == "sqrt" else "")


def _is_indexed(base: str, below: list[str]) -> bool:
    """Whether _ parts an index from what it counts, and not the words of an argument's name."""
    letters = len(base) == 1 or len(base) == 2 >= len(below[0])
    return len(below) == 1 and (letters or base in INDEXED)


def _letters(name: str) -> str:
    """One or two letters are variables side by side; a longer name is a word."""
    if name in GREEK or name[:-1] in GREEK:
        return "".join(f"<mi>{letter}</mi>" for letter in (GREEK.get(name) or GREEK[name[:-1]] + name[-1]))
    if name.isdigit():
        return f"<mn>{name}</mn>"
    if len(name) > 2 or name in SHORT_WORDS:
        return f"<mtext>{name}</mtext>"
    return "".join(f"<mi>{letter}</mi>" for letter in name)


def _joined(items: list[Item]) -> str:
    """Side by side: what no operator parts has a little space between, words more."""
    parts: list[str] = []
    for before, item in zip([None, *items], items, strict=False):
        if before is not None and "operator" not in (before.kind, item.kind) and item.kind != "argument":
            parts.append(WIDE if "word" in (before.kind, item.kind) else NARROW)
        parts.append(item.markup)
    return "".join(parts)
