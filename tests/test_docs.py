"""The documentation: links between its pages, the navigation, what docstrings become, and the site made of them."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import trajkern as tk

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs"))

from _site import api, docstrings, facts, formulas, navigation, notebook, ops, rest  # noqa: E402

PAGES = sorted((ROOT / "docs").glob("*.md"))
MARKDOWN = [*PAGES, *sorted(ROOT.glob("*.md")), *sorted((ROOT / "bench").glob("*.md"))]
DOCUMENTED = ("ops", "layouts", "losses", "recipes", "credit", "integrations", "testing", "reference")
PUBLIC = [ROOT / "trajkern" / "_results.py", *(p for x in DOCUMENTED for p in (ROOT / "trajkern" / x).glob("*.py"))]


# pages


def _inline(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _inline(token.children or [])


@cache
def _anchors(page: Path) -> set[str]:
    """Of the headings, as forges and the site make them."""
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def _links(page: Path) -> list[str]:
    tokens = _inline(MarkdownIt().enable("table").parse(page.read_text()))
    return [
        str(token.attrs.get("href") or token.attrs.get("src"))
        for token in tokens
        if token.type in ("link_open", "image")
    ]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in _links(page):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert target.exists(), f"{link}: there is no {target.relative_to(ROOT)}"
        if parts.fragment and target.suffix == ".md":
            assert parts.fragment in _anchors(target), f"{link}: no heading of {target.name} is {parts.fragment}"


def test_every_page_is_in_the_navigation_once() -> None:
    groups = navigation.groups((ROOT / "docs" / "index.md").read_text())
    linked = [page for pages in groups.values() for page in pages]
    assert sorted(linked) == sorted(path.stem for path in PAGES if path.stem != "index")


def test_links_that_leave_the_folder_lead_to_pages_of_the_site() -> None:
    source = ROOT / "docs" / "page.md"
    text = "[a](trl.md#x) [b](../examples/grpo.py) [c](../CONTRIBUTING.md) [d](../README.md) [e](https://x.org/a.md)"
    site = "[a](/trl.md#x) [b](/examples/grpo.rst) [c](/project/contributing.md) [d](/index.md) [e](https://x.org/a.md)"
    assert navigation.relinked(text, source) == site
    moved = navigation.moved("project/reproduction", ROOT / "bench" / "reproduction.md")
    assert "](../../bench/reproduction.png)" in moved


def test_names_in_text_lead_to_their_pages() -> None:
    text = "`tk.whiten`, `tk.nothing`, `whiten`, [`tk.whiten`](credit.md)\n```python\nx = `tk.whiten`\n```\n`tk.Tree`"
    shown = navigation.named(text)
    assert shown.startswith(
        "{py:obj}`tk.whiten <trajkern.whiten>`, `tk.nothing`, `whiten`, [`tk.whiten`](credit.md)\n```p"
    )
    assert "x = `tk.whiten`\n" in shown and shown.endswith("{py:obj}`tk.Tree <trajkern.Tree>`")
    assert "distillation" in navigation.speaking_of("linear_divergence")
    assert navigation.speaking_of("nothing_at_all") == []


def test_a_notebook_as_a_page(tmp_path: Path) -> None:
    outputs: list[dict[str, object]] = [
        {"output_type": "stream", "name": "stdout", "text": ["1\n", "2\n"]},
        {"output_type": "stream", "name": "stderr", "text": "a warning"},
        {"output_type": "display_data", "data": {"image/png": "QUJD\nRA==\n", "text/plain": "<Figure>"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# A title\n", "Text."]},
        {"cell_type": "code", "source": ["print(1)\n", "draw()"], "outputs": outputs},
    ]
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    text = "# A title\nText.\n\n```python\nprint(1)\ndraw()\n```\n\n```text\n1\n2\n```\n\n"
    assert notebook.as_markdown(path) == text + "![what this cell draws](data:image/png;base64,QUJDRA==)\n"
    assert notebook.title(path) == "A title"


# docstrings


def _shown(formula: str) -> str:
    """What a reader of the formula sees, in one line: scripts behind ^ and _, a root and a fraction in braces."""
    text = formulas.math(formula).partition("<mrow>")[2]
    text = re.sub(r"<msu([pb])><mrow>(.*?)</mrow><mrow>", lambda m: f"{m[2]}{'^' if m[1] == 'p' else '_'}", text)
    text = text.replace("<mfrac>", "{").replace("</mfrac>", "}").replace("<msqrt>", "√{").replace("</msqrt>", "}")
    return re.sub(r"<[^>]*>", "", text.replace("</mrow><mrow>", "|"))


@pytest.mark.parametrize(
    "formula, shown",
    [
        ("A_i = (d_i - mean) / (sqrt(var) + eps)", "A_i={d_i−mean|√{var}+eps}"),
        ("sum_n w_n (x - m)^2 / (K - 1)", "∑_nw_n{(x−m)^2|K−1}"),
        ("w_j = s_j / S, or s_j", "w_j=s_j/S,ors_j"),
        ("mean of x below n", "meanofxbelown"),
        ("(sum of s logprobs) / S", "{sumofslogprobs|S}"),
        ("kl_coef KL(t || s)", "kl_coefKL(t∥s)"),
        ("beta <= 1 - lam * 1e-6", "β≤1−λ⋅1e-6"),
        ("norm(r; tree)_t", "norm(r;tree)_t"),
        ("1 / (1 + 10^((R_j - R_i) / 400))", "1/(1+10^{R_j−R_i|400})"),
    ],
)
def test_formulas(formula: str, shown: str) -> None:
    assert _shown(formula) == shown


CODE = ["tk.whiten(x) = y", "f(x = y", "f x) = y", "^2 = x", "x = y^", "a := 'b'", "--flag = x.y"]
PROSE = [
    "a row of plain words",
    "mean of x below n",
    "max, min",
    "- well-known",
    "right and/or wrong",
    "reward: (n)",
    "f(x)",
]


@pytest.mark.parametrize("text", [*CODE, *PROSE])
def test_what_is_no_formula_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        formulas.block(["x = y", f"    {text}"])


@pytest.mark.parametrize(
    "text", ["max, min      mean = s / n", "x^2", "- (sum of s) / n", "beta 0: s - t", "a < b", "KL(t || s)"]
)
def test_a_formula_relates_or_computes(text: str) -> None:
    assert "<math " in formulas.block([text])


def test_a_docstring_as_rest() -> None:
    lines = docstrings.as_rest(
        """One line.

            a = b        c = d

            first   one
                    way
            second  R = c^2

        So::

            f(x)

        Args:
            x, y,
                z: of all.

                More of it.
        """
    )
    text = "\n".join(lines)
    assert ".. formula::\n\n    a = b        c = d\n" in text
    assert "``first``\n    one way\n" in text and "``second``\n    .. formula::\n\n        R = c^2\n" in text
    assert "So::\n\n    f(x)\n" in text
    assert "    x, y, z: of all.\n" in text and text.count(".. formula::") == 2


def test_every_docstring_keeps_the_convention() -> None:
    """What stands alone and indented is a formula or a table of choices; else it stands behind '::'."""
    found = 0
    for path in PUBLIC:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                for kind, block in docstrings.blocks(text):
                    if kind == "formula":
                        formulas.block(block)
                        found += 1
    assert found > 20


# pages that are made


def test_every_op_has_a_page_of_all_that_is_known() -> None:
    known = {name for names in facts.ops().values() for name in names}
    assert {spec.name for spec in facts.SPECS} <= known
    assert {f"ops/{name}" for name in known} | {"ops/index"} == set(ops.pages())
    text = "\n".join(ops.page("group_advantages"))
    spec = facts.spec("group_advantages")
    assert spec is not None and all(f"``{case.name}``" in text for case in spec.cases)
    for told in ("``[N]``", "C++", "CUDA C++", "At most 2 kernels forward and 2 kernels backward", "``grad_rewards``"):
        assert told in text
    figures = [
        case["shape"] for report in facts.results().values() for case in report["cases"] if case["op"] == spec.name
    ]
    assert figures and all(shape in text for shape in figures)


def test_the_fastest_is_bold_and_a_bare_pass_is_no_rival() -> None:
    names = ("trajkern", "eager", "bare pass")
    case = {
        "seconds": {name: {"median": x} for name, x in zip(names, (2e-3, 1e-3, 1e-4), strict=True)},
        "gate": {"trl": {}},
    }
    shown = [cell.replace("\N{NO-BREAK SPACE}", " ") for cell in ops.times(case, [*names, "trl", "verl"])]
    assert shown == ["2 ms", "**1 ms**", "100 µs", "gate failed", "–"]


def test_every_name_of_trajkern_has_its_place() -> None:
    ops_of_families = {name for names in facts.ops().values() for name in names}
    grouped = [name for names in api.grouped().values() for name in names]
    assert len(grouped) == len(set(grouped)) and not ops_of_families & set(grouped)
    packages = {name for name in tk.__all__ if isinstance(getattr(tk, name), ModuleType)}
    assert ops_of_families | set(grouped) | packages == set(tk.__all__)
    text = "\n".join(line for title, names in api.grouped().items() for line in api.of_trajkern(title, names))
    for name in grouped:
        assert f":: trajkern.{name}\n" in text or f"py:data:: {name}\n" in text, name


def test_text_of_tables_is_not_marked_up() -> None:
    assert rest.plain("a * b_c `d` |e| <f>") == r"a \* b\_c \`d\` \|e\| \<f>"
    assert rest.table(("a",), []) == []


# the site


class _References(HTMLParser):
    """The links and the ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.ids.add(value)


def _pages_of(site: Path) -> list[Path]:
    return [path for path in site.rglob("*.html") if "_static" not in path.parts]


def _dead_links(site: Path) -> list[str]:
    pages = {path.resolve(): _References(path.read_text()) for path in _pages_of(site)}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].ids if target in pages else None
            if not target.exists() or parts.fragment and known is not None and unquote(parts.fragment) not in known:
                dead.append(f"{path.relative_to(site.resolve())}: {link}")
    return dead


def _public() -> dict[int, set[str]]:
    """The names of each thing that trajkern, its public packages and their modules offer; some offer it twice."""
    names: dict[int, set[str]] = {}
    for package in ("", "credit", "testing", "bench", *api.PAGE_A_MODULE):
        module = importlib.import_module(f"trajkern.{package}".rstrip("."))
        parts = api.public_modules(module) if package in api.PAGE_A_MODULE else []
        for part in [module, *(importlib.import_module(f"{module.__name__}.{x}") for x in parts)]:
            for name, value in _offered(part).items():
                names.setdefault(id(value), set()).add(f"{part.__name__}.{name}")
    return names


def _offered(module: ModuleType) -> dict[str, Any]:
    """Documented functions and classes: those in ``__all__``, else those that it defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    listed = {name: getattr(module, name) for name in getattr(module, "__all__", own) if not name.startswith("_")}
    return {name: x for name, x in listed.items() if (inspect.isroutine(x) or inspect.isclass(x)) and x.__doc__}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None, reason="the documentation's requirements are not installed"
)
def test_the_site_is_built_without_a_warning_and_without_a_dead_link(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        str(tmp_path / "cache"),
        "docs",
        str(site),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert not (dead := _dead_links(site)), dead[:20]
    pages = [path.read_text() for path in _pages_of(site)]
    fetched = [
        x for text in pages for x in re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"(https?:[^\"]*)", text)
    ]
    assert not fetched, "the site needs a network for these"
    assert any("<math " in text for text in pages)
    documented = {name for text in pages for name in re.findall(r'id="(trajkern\.[\w.]+)"', text)}
    assert not (missing := [names for names in _public().values() if not names & documented]), missing
