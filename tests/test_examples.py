"""The examples do what their first lines say, in fewer steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_grpo_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """Five seeds went from 0.26 to 0.41 after the warm-up; a standard error of pass@1 is 0.02."""
    with torch.random.fork_rng():
        before, after = example("grpo").main(steps=15)
    assert 0.1 < before < 0.6 and after > before + 0.15
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" pass@1 ")[0].strip() for line in printed] == ["after warm-up", "step 15"]


def test_grpo_is_short_and_needs_nothing_else() -> None:
    lines = (EXAMPLES / "grpo.py").read_text().splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert len(lines) <= 200
    assert imported == {"__future__", "random", "time", "typing", "torch", "trajkern"}
