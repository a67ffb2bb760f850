"""Experiments: what a comparison runs, what it keeps, how its table is worked out; controls; the two heads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from trajkern._bench.experiments import controls, reproduce
from trajkern._bench.experiments.comparisons import Comparison, Panel, Test
from trajkern._bench.experiments.reproduce import measured, table
from trajkern._bench.experiments.rows import COMPARISONS
from trajkern.trainer.config import TrainConfig, parse
from trajkern.trainer.train import train

SMALL = (
    "--task chain_sum --steps 2 --prompts 8 --rollouts 4 --questions 100 --warmup.steps 20 --warmup.batch 16"
    " --warmup.demonstrations 64 --eval.heldout 8 --eval.validation 4 --eval.samples 4 --eval.every 1"
    " --tiny.layers 1 --tiny.width 32 --tiny.heads 2"
)


@pytest.mark.parametrize("row", COMPARISONS)
def test_every_arm_has_flags_that_the_trainer_knows(row: str) -> None:
    for flags in COMPARISONS[row].arms.values():
        config = parse(f"{reproduce.COMMON} {COMPARISONS[row].flags} {flags} --seed 3".split())
        assert config.seed == 3 and config.steps > 0


def test_a_row_names_its_own_arms() -> None:
    arms = {"one": "", "two": ""}
    for test, said in (
        (Test("pass@1", "one"), "against must be .* one of two; got 'one'"),
        (Test("pass@1", "two", matters=0.0), "matters must be above 0 or None, got 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            Comparison("c", "n", "", arms, (test,))
    with pytest.raises(ValueError, match="panel.arms must be arms, one, two; got three"):
        Comparison("c", "n", "", arms, (), panel=Panel(arms=("one", "three")))


def test_a_row_runs_once_and_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {"grpo": "--recipe grpo", "psr": "--recipe psr"}
    rows = {"small": Comparison("nothing", "nothing", SMALL, arms, (Test("pass@1", "psr"),), ("pass@1", "pass@4"))}
    monkeypatch.setattr(reproduce, "COMPARISONS", rows)
    monkeypatch.setattr(reproduce, "COMMON", "--time-limit 1e9 --threads 1")
    monkeypatch.setattr(reproduce, "OUT", tmp_path / "runs")
    report = tmp_path / "report.md"
    assert reproduce.main(["--seeds", "0", "1", "--jobs", "1", "--report", str(report)]) == 0
    text = report.read_text()
    assert "| grpo |" in text and "| psr |" in text and "- psr: pass@1 " in text
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    files = sorted((tmp_path / "runs").rglob("result.json"))
    assert len(files) == 4
    before = [path.stat().st_mtime_ns for path in files]
    first, second = reproduce.run("small", 0)
    assert first["before"] == second["before"], "the arms start from one warm-up"
    assert [path.stat().st_mtime_ns for path in files] == before


def test_the_table_is_worked_out_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Comparison("c", "n", "-f", {"one": "", "two": ""}, (), ("pass@1", "val_pass@1 >= 0.5"))
    monkeypatch.setattr(reproduce, "COMPARISONS", {"r": row})

    def result(arm: str, seed: int, value: float, curve: list[list[float]]) -> dict:
        figures = {"before": {"pass@1": 0.25}, "after": {"pass@1": value}}
        return {"arm": arm, "seed": seed, "curve": curve, "seconds": 30.0, **figures}

    results = [
        result("one", 0, 0.5, [[25, 0.4], [50, 0.6]]),
        result("two", 0, 0.25, [[25, 0.4], [50, 0.45]]),
        result("one", 1, 0.75, [[25, 0.5], [50, 0.6]]),
        result("two", 1, 0.25, [[25, 0.55], [50, 0.6]]),
    ]
    assert measured(results[0], "val_pass@1 >= 0.5") == 50 and measured(results[1], "val_pass@1 >= 0.5") is None
    lines = table("r", results)
    assert "| *warm-up* | 0.250 ± 0.000 | - | |" in lines
    assert "| one | 0.625 ± 0.125 | 37.500 ± 12.500 | 1.0 |" in lines
    assert "| two | 0.250 ± 0.000 | 25.000 (1 of 2) | 1.0 |" in lines
    assert "- two: pass@1 +0.375 ± 0.125, val_pass@1 >= 0.5 +0.000" in lines


def test_controls_start_from_one_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "controls"
    assert controls.main(["--seeds", "0", "1", "--out", str(out), "--", *SMALL.split(), "--threads", "1"]) == 0
    text = (out / "controls.md").read_text()
    assert "| seed | warm-up | grpo | random-rewards | supervised |" in text and text in capsys.readouterr().out
    results = json.loads((out / "controls.json").read_text())["results"]
    arms = ["grpo", "random-rewards", "supervised"]
    assert [(x["arm"], x["seed"]) for x in results] == [(arm, seed) for seed in (0, 1) for arm in arms]
    for plain, random, supervised in (results[:3], results[3:]):
        assert plain["before"] == random["before"] == supervised["before"]
        assert plain["steps"] == random["steps"] == supervised["steps"] == 2
        assert supervised["clock"]["trained"] >= random["clock"]["trained"] > 0 == supervised["clock"]["sampled"]


def test_an_eager_run_says_what_the_heads_cost(
    config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture
) -> None:
    train(config(head="eager"))
    said = capsys.readouterr().out
    for head in ("eager", "fused"):
        line = rf"^{head} head on the last batch, model included: \d+\.\d ms(, \d+ MiB at its peak)?$"
        assert re.search(line, said, re.M), head
