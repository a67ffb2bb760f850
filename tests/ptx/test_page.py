"""The example of docs/compiled.md, run as a reader would, says what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def _run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "scale.py").write_text(code)
    return subprocess.run([sys.executable, str(folder / "scale.py")], capture_output=True, text=True, cwd=ROOT)


def test_the_off_by_one_is_caught_with_the_message_shown(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "compiled.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.S)
    done = _run(code, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-len(shown.splitlines()) :] == shown.splitlines()
    assert _run(code.replace("at <= n", "at < n"), tmp_path).returncode == 0
