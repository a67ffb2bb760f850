"""A notebook as a page: its text, its code, and what it printed and drew when it was last run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def as_markdown(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join(part for cell in cells for part in _parts(cell)) + "\n"


def title(path: Path) -> str:
    """Its first heading."""
    return as_markdown(path).partition("\n")[0].lstrip("# ")


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
    elif cell["cell_type"] == "code":
        yield f"```python\n{source}\n```"
        yield from (shown for output in cell["outputs"] if (shown := _shown(output)))


def _shown(output: dict[str, Any]) -> str:
    """A picture, else the text; nothing of what was said aside, on stderr."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![what this cell draws](data:image/png;base64,{''.join(data['image/png'].split())})"
    printed = output.get("text", "") if output.get("name") == "stdout" else data.get("text/plain", "")
    text = "".join(printed).rstrip()
    return f"```text\n{text}\n```" if text else ""
