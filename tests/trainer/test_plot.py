"""The curve is drawn whatever the run is called and whatever the user's matplotlib is set to; or it costs a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trajkern.trainer import train as training
from trajkern.trainer.plot import drawing, plot

METRICS = '{"phase": "warmup", "step": 1, "val_pass@1": 0.5}\n{"phase": "main", "step": 1, "reward": 0.25}\n'
TITLES = [
    "a$b_{$.jsonl",
    "x$\\frac$",
    "$",
    "$$",
    "\\",
    "^_{}%&#~",
    "two\nlines\t\0",
    "\udcff",
    "\U0001f600 漢",
    "x" * 5000,
    "",
]
SETTINGS = {
    "as they are": "",
    "text by a program that is not there": "text.usetex: True",
    "another backend": "backend: nothing",
    "another font": "font.family: none such",
    "another size": "figure.dpi: 1\nsavefig.dpi: 100000\nfigure.figsize: 1000, 1000",
    "another format": "savefig.format: svg\nsavefig.bbox: tight\nsavefig.pad_inches: 1000",
    "a sketch": "path.sketch: 1, 100, 2",
    "no settings": "\x01 nothing: [",
}
DRAW = """
import sys
from pathlib import Path
from trajkern.trainer.plot import plot
sys.exit(plot(Path(sys.argv[1]), Path(sys.argv[2]), "a$b_{$") or 0)
"""


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    (path := tmp_path / "metrics.jsonl").write_text(METRICS)
    return path


@pytest.mark.parametrize("title", TITLES, ids=ascii)
def test_a_title_is_text(metrics: Path, title: str) -> None:
    assert drawing(metrics, title).startswith(b"\x89PNG")


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_users_settings_are_not_asked(metrics: Path, settings: str, tmp_path: Path) -> None:
    """Neither those of the current folder nor the environment's."""
    (tmp_path / "matplotlibrc").write_text(SETTINGS[settings])
    expected, curve = drawing(metrics, "a$b_{$"), tmp_path / "curve.png"
    paths = os.pathsep.join([str(Path(training.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "MPLBACKEND": "svg"}
    command = [sys.executable, "-c", DRAW, str(metrics), str(curve)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert curve.read_bytes() == expected and "Traceback" not in done.stderr


def test_a_curve_that_cannot_be_drawn_costs_a_line(
    config, metrics: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def failing(*_: object) -> bytes:
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr("trajkern.trainer.plot.drawing", failing)
    assert plot(metrics, metrics.with_name("curve.png"), "") == "RuntimeError: no fonts"
    result = training.train(config(steps=0))
    told = capsys.readouterr().out
    assert result.curve is None and not (result.metrics.with_name("curve.png")).exists()
    assert (
        told.endswith("the curve could not be drawn: RuntimeError: no fonts\n")
        and f"metrics     {result.metrics}" in told
    )
