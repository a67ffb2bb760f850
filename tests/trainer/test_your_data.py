"""The page on data of one's own: its files are written and its commands run, in the order and folder of a reader."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trajkern.trainer import cli_main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-data.md"
# the same commands with fewer steps and questions: a flag that is given twice counts as given last
FEWER = "--steps 2 --prompts 4 --warmup.steps 2 --eval.heldout 4 --eval.validation 4 --eval.samples 2 --threads 1"


def blocks() -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


def test_every_command_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_llama: Callable[..., Path],
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my-model").symlink_to(make_llama())
    commands = 0
    for language, text in blocks():
        if language in ("python", "toml"):
            name = re.match(r"# (\w+\.(?:py|toml))\n", text)
            assert name, f"a file of the page has no name: {text[:60]}"
            (tmp_path / name[1]).write_text(text)
        elif language == "json":
            assert json.loads(text) == json.loads((tmp_path / "digits.jsonl").read_text().splitlines()[0])
        elif not language:
            for line in text.strip().splitlines():
                program, *arguments = shlex.split(line, comments=True)
                commands += 1
                if program == "python":
                    runpy.run_path(arguments[0])
                else:
                    assert [program, arguments[0]] == ["trajkern", "train"]
                    assert cli_main([*arguments[1:], *FEWER.split()]) == 0, capsys.readouterr().err
    for name in ("guess", "mine"):
        monkeypatch.delitem(sys.modules, name)
    assert commands >= 5


def test_the_page_names_every_column_verifier_and_capability() -> None:
    from trajkern.trainer.tasks import capabilities
    from trajkern.trainer.tasks.jsonl import COLUMNS
    from trajkern.trainer.tasks.verifiers import VERIFIERS

    methods = {
        name
        for protocol in vars(capabilities).values()
        if getattr(protocol, "_is_protocol", False)
        for name in vars(protocol)
        if not name.startswith("_")
    }
    assert {"hint", "belief_target"} <= methods
    rows = set(re.findall(r"^\| `(\w+)[`(]", PAGE.read_text(), re.M))
    assert {*COLUMNS, *VERIFIERS, *methods} <= rows
