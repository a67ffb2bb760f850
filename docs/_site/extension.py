"""The documentation site's own extension of Sphinx: generated pages, typeset formulas, links that leave docs/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

from _site import api, docstrings, formulas, navigation, notebook, ops
from _site.facts import ROOT

FOLDERS = ("api", "examples", "ops", "project")  # of docs/, made anew by every build


class Formula(Directive):
    """``.. formula::``: the plain formulas of its lines, typeset."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        try:
            html = formulas.block([line for line in self.content if line.strip()])
        except ValueError as error:
            raise self.error(str(error)) from error
        return [nodes.raw("", html, format="html")]


def generate(app: Any) -> None:
    """Writes the pages that are made of data. What has not changed keeps its time, so that it is not read again."""
    made = {f"{page}.rst": "\n".join(lines) for part in (ops, api, navigation) for page, lines in part.pages().items()}
    made |= {f"{page}.md": navigation.moved(page, source) for page, source in navigation.taken().items()}
    made |= {f"{page}.md": notebook.as_markdown(source) for page, source in navigation.notebooks().items()}
    here = Path(app.srcdir)
    for name, text in made.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    for folder in FOLDERS:
        for path in (here / folder).rglob("*.*"):
            if str(path.relative_to(here)) not in made:
                path.unlink()


def read(app: Any, page: str, source: list[str]) -> None:
    """The pages of docs/ as the site has them."""
    path = ROOT / "docs" / f"{page}.md"
    if path.exists() and page.split("/")[0] not in FOLDERS:
        text = navigation.with_navigation(source[0]) if page == "index" else source[0]
        source[0] = navigation.named(navigation.relinked(text, path))


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("formula", Formula)
    app.connect("builder-inited", generate)
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", docstrings.process, priority=400)  # before napoleon's 500
    app.connect("autodoc-skip-member", docstrings.is_left_out)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
