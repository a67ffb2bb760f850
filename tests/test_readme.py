"""The Python blocks of the README and of docs/ run, one after the other, as a reader would type them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *(f"docs/{page}.md" for page in ("art", "credit", "distillation", "index", "own-kernels", "recipes", "tour")),
        "docs/transformers.md",
    ],
)
def test_python_blocks_run(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks
    exec(compile("\n".join(blocks), page, "exec"), {})


def test_first_blocks_are_the_two_commands() -> None:
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert [b.strip() for b in blocks[:2]] == ["make train", "make test"]


def test_the_readme_is_read_in_one_sitting() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / target).exists(), target
