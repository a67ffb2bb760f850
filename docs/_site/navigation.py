"""The site's navigation, and what it takes from elsewhere: examples, and files beside docs/.

``docs/index.md`` is the navigation: its headings are the groups, its links the pages. The generated pages follow it.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

import trajkern as tk
from _site import notebook
from _site.facts import ROOT
from _site.rest import heading, plain, table, toctree

TAKEN = ("CONTRIBUTING.md", "CHANGELOG.md", "bench/reproduction.md", "bench/NOTES.md")  # which are pages of the site
REFERENCE = {
    "ops/index": ("Ops", "a page each: maths, shapes, backends, budgets, bits, launches, figures"),
    "api/index": ("API", "every public name, from its docstring"),
    "examples/index": ("Examples", "files that run as they stand"),
}
NAMES = {name for name in tk.__all__ if not inspect.ismodule(getattr(tk, name))}
LINK = re.compile(r"\]\((?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def taken() -> dict[str, Path]:
    """Page -> the file outside docs/ that it shows."""
    return {f"project/{Path(file).stem.lower()}": ROOT / file for file in TAKEN if (ROOT / file).exists()}


def examples() -> dict[str, Path]:
    return {f"examples/{path.stem}": path for path in sorted((ROOT / "examples").glob("*.py"))}


def notebooks() -> dict[str, Path]:
    return {f"examples/{path.stem}": path for path in sorted((ROOT / "examples").glob("*.ipynb"))}


def pages() -> dict[str, list[str]]:
    """Page -> its lines."""
    rows = []
    for path in examples().values():
        documented = ast.get_docstring(ast.parse(path.read_text())) or ""
        rows.append((f":doc:`{path.name} <{path.stem}>`", plain(" ".join(documented.split("\n\n")[0].split()))))
    rows += [(f":doc:`{path.name} <{path.stem}>`", plain(notebook.title(path))) for path in notebooks().values()]
    shown = table(("file", "what it shows"), rows)
    lines = [*heading("Examples"), "Each is one file that runs as it stands.", "", *shown]
    names = [path.stem for path in (*notebooks().values(), *examples().values())]
    return {"examples/index": lines + toctree(names)} | {page: _example(path) for page, path in examples().items()}


def _example(path: Path) -> list[str]:
    return [*heading(path.name), f".. literalinclude:: ../../examples/{path.name}", "   :language: python", ""]


def groups(index: str) -> dict[str, list[str]]:
    """Heading -> the pages that the front page links below it."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", index, flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        targets = [link["target"] for link in LINK.finditer(body)]
        found[title.strip()] = [x.removesuffix(".md") for x in targets if x.endswith(".md") and "/" not in x]
    return found


def with_navigation(index: str) -> str:
    """The front page with links to what is generated, and a hidden toctree for each of its groups."""
    made = "\n".join(f"- {{doc}}`{title} </{page}>`: {what}" for page, (title, what) in REFERENCE.items())
    trees = {**groups(index), "Reference": [*REFERENCE], "Project": [*taken()]}
    shown = "\n".join(_toctree(title, names) for title, names in trees.items() if names)
    return f"{index}\n## Reference\n{made}\n\n{shown}"


def _toctree(title: str, names: list[str]) -> str:
    listed = "\n".join(names)
    return f"```{{toctree}}\n:hidden:\n:caption: {title}\n\n{listed}\n```\n"


def moved(page: str, source: Path) -> str:
    """A file that is a page of another folder of the site: what it names beside itself is named from there."""
    folder = (ROOT / "docs" / page).parent
    return relinked(source.read_text(), source, lambda target: os.path.relpath(target, folder))


def named(text: str) -> str:
    """A page whose inline ``tk.name`` leads to where that name is documented; code blocks and links stay."""
    pieces = re.split(r"(^```.*?^```$|\[[^\]]*\]\([^)]*\))", text, flags=re.M | re.S)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(
            r"(?<!`)`(?:tk|trajkern)\.(\w+)`(?!`)",
            lambda found: f"{{py:obj}}`tk.{found[1]} <trajkern.{found[1]}>`" if found[1] in NAMES else found[0],
            pieces[i],
        )
    return "".join(pieces)


def speaking_of(name: str) -> list[str]:
    """The pages that name something of trajkern's, the front page aside."""
    said = re.compile(rf"\b(?:tk|trajkern)\.{name}\b|`{name}`")
    shown = {path.stem: path for path in (ROOT / "docs").glob("*.md") if path.stem != "index"} | examples()
    return sorted(page for page, path in shown.items() if said.search(path.read_text()))


def relinked(text: str, source: Path, elsewhere: Callable[[Path], str] | None = None) -> str:
    """A page's links to files that are pages of the site lead to these; of all others ``elsewhere`` says the path."""
    known = {path: f"{page}.md" for page, path in taken().items()}
    known |= {path: f"{page}.rst" for page, path in examples().items()}
    known |= {path: f"{page}.md" for page, path in notebooks().items()}
    known |= {path: path.name for path in (ROOT / "docs").glob("*.md")}
    known[ROOT / "README.md"] = "index.md"

    def of_site(link: re.Match[str]) -> str:
        target = (source.parent / link["target"]).resolve()
        if target in known:
            return f"](/{known[target]}{link['anchor'] or ''})"
        return f"]({elsewhere(target)})" if elsewhere is not None and target.exists() else link.group()

    return LINK.sub(of_site, text)
