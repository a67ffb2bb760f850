"""Experiments: what a comparison runs, what it keeps, how its page is worked out; controls; the two heads."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from trajkern._bench.experiments import arms, controls, page, reproduce, stored
from trajkern._bench.experiments.comparisons import Comparison, Panel, Test
from trajkern._bench.experiments.measures import compared, measured
from trajkern._bench.experiments.rows import COMPARISONS
from trajkern._bench.experiments.statistics import Finding, Paired, holm, paired, t_quantile, t_within, verdict
from trajkern.trainer.config import TrainConfig, parse
from trajkern.trainer.train import train

SMALL = (
    "--task chain_sum --steps 2 --prompts 8 --rollouts 4 --questions 100 --warmup.steps 20 --warmup.batch 16"
    " --warmup.demonstrations 64 --eval.heldout 8 --eval.validation 4 --eval.samples 4 --eval.every 1"
    " --tiny.layers 1 --tiny.width 32 --tiny.heads 2"
)


@pytest.mark.parametrize("row", COMPARISONS)
def test_a_row_has_flags_that_the_trainer_knows(row: str) -> None:
    comparison = COMPARISONS[row]
    configs = {arm: parse(f"{flags} --seed 3".split()) for arm, flags in stored.flags_of(comparison).items()}
    assert all(config.seed == 3 and config.steps > 0 for config in configs.values())
    if comparison.shares_warm_up:
        arms.check_shared(configs)
    assert comparison.tests and comparison.claim and comparison.needs


def test_a_row_names_its_own_arms() -> None:
    two = {"one": "", "two": ""}
    for test, said in (
        (Test("pass@1", "one"), "against must be .* one of two; got 'one'"),
        (Test("pass@1", "two", matters=0.0), "matters must be above 0 or None, got 0.0"),
    ):
        with pytest.raises(ValueError, match=said):
            Comparison("c", "n", "", two, (test,))
    with pytest.raises(ValueError, match="panel.arms must be arms, one, two; got three"):
        Comparison("c", "n", "", two, (), panel=Panel(arms=("one", "three")))


def test_student_t_is_that_of_the_tables() -> None:
    table = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 5: (2.571, 4.032)}
    table |= {6: (2.447, 3.707), 11: (2.201, 3.106), 30: (2.042, 2.750)}
    for freedom, quantiles in table.items():
        for within, t in zip((0.95, 0.99), quantiles, strict=True):
            assert t_quantile(within, freedom) == pytest.approx(t, abs=5e-4)
            assert t_within(t, freedom) == pytest.approx(within, abs=4e-5)
    assert t_within(0.0, 5) == 0.0


def test_paired_differences_by_hand() -> None:
    found = paired([1.0, 2.0, 3.0])  # mean 2, standard error 1 / sqrt 3, t = 2 sqrt 3 on 2 degrees: p = 1 - sqrt(6 / 7)
    assert found.mean == 2.0 and found.pairs == 3
    assert found.p == pytest.approx(1 - math.sqrt(6 / 7), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-3)
    assert paired([0.5]) == Paired(0.5, -math.inf, math.inf, 1.0, 1)
    assert paired([0.0, 0.0]) == Paired(0.0, 0.0, 0.0, 1.0, 2) and paired([0.5, 0.5]).p == 0.0
    assert math.isnan(paired([]).mean) and paired([]).p == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "p", "sign", "matters", "count", "expected"),
    [
        (0.1, 0.3, 0.01, 1, None, 6, "reproduces"),
        (-0.3, -0.1, 0.01, -1, None, 6, "reproduces"),
        (0.1, 0.3, 0.01, 1, None, 5, "cannot be told"),
        (0.1, 0.3, 0.06, 1, None, 6, "cannot be told"),
        (-0.3, -0.1, 0.01, 1, None, 6, "does not"),
        (0.1, 0.3, 0.01, -1, None, 6, "does not"),
        (-0.02, 0.04, 0.6, 1, None, 6, "cannot be told"),
        (-0.02, 0.04, 0.6, 1, 0.05, 6, "does not"),
        (-0.04, 0.02, 0.6, -1, 0.05, 6, "does not"),
        (-0.02, 0.06, 0.6, 1, 0.05, 6, "cannot be told"),
    ],
)
def test_a_verdict_is_by_the_stated_rule(
    low: float, high: float, p: float, sign: int, matters: float | None, count: int, expected: str
) -> None:
    finding = Finding(Paired((low + high) / 2, low, high, 0.0, count), p, sign, matters, 6)
    holds = Finding(Paired(0.2, 0.1, 0.3, 0.0, 6), 0.01, 1, None, 6)
    assert verdict([finding]) == verdict([holds, finding]) == expected


def result(arm: str, seed: int, value: float, curve: list[tuple[float, float, float]], **more: Any) -> dict[str, Any]:
    """Of a run whose validations had these tokens, pass@1 and pass@2."""
    points = [
        {"steps": 10 * n, "tokens": t, "seconds": t / 100, "pass@1": x, "pass@2": y}
        for n, (t, x, y) in enumerate(curve)
    ]
    figures = {"before": {"pass@1": 0.25}, "after": {"pass@1": value, "turns": None}, "curve": points, "elapsed": 60.0}
    spent = {"steps": 20, "tokens": 400, "seconds": 5.0, "warm_up_seconds": 0.0}
    return {"arm": arm, "seed": seed, "pass_at": [value, 1.0], "reliability": [], **spent, **figures, **more}


def test_measures_by_hand() -> None:
    run = result("one", 0, 0.625, [(0, 0.2, 0.4), (100, 0.4, 0.8), (400, 0.6, 0.7)])
    expected = {
        "pass@1": 0.625,
        "turns": None,
        "tokens": 400,
        "tokens to pass@1 >= 0.2": 0.0,
        "tokens to pass@1 >= 0.3": 50.0,
        "steps to pass@1 >= 0.5": 15.0,
        "seconds to pass@1 >= 0.5": 2.5,
        "tokens to pass@1 >= 0.7": 400,
        "pass@2 at pass@1 = 0.5": 0.75,
        "pass@2 at pass@1 = 0.7": None,
        "mean pass@1": (100 * 0.3 + 300 * 0.5) / 400,
    }
    for measure, value in expected.items():
        assert measured(run, measure) == (None if value is None else pytest.approx(value)), measure
    with pytest.raises(ValueError, match="measure of the curve must be one of steps, .*pass@2, .*; got 'greedy'"):
        measured(run, "mean greedy")


def test_a_measure_at_what_both_runs_reach_is_worked_out_by_hand() -> None:
    slow = result("one", 0, 0.625, [(0, 0.2, 0.4), (100, 0.4, 0.8), (400, 0.6, 0.7)])
    fast = result("two", 0, 0.9, [(0, 0.2, 0.4), (100, 0.5, 0.9), (200, 0.7, 0.5), (300, 0.3, 0.3)])
    slow_at, fast_at = 0.7, 0.9 + (0.5 - 0.9) * (0.6 - 0.5) / (0.7 - 0.5)
    assert compared(slow, fast, "pass@2 at equal pass@1") == pytest.approx((slow_at, fast_at))
    assert compared(fast, slow, "pass@2 at equal pass@1") == pytest.approx((fast_at, slow_at))
    assert compared(slow, fast, "pass@1") == (0.625, 0.9)
    never = result("two", 0, 0.1, [(0, 0.1, 0.2)])
    assert compared(never, slow, "pass@2 at equal pass@1") == (0.2, 0.4), "both are past it as they begin"
    with pytest.raises(ValueError, match="measure of the curve must be one of .*; got 'greedy'"):
        compared(slow, fast, "greedy at equal pass@1")


def test_the_page_is_worked_out_by_hand(tmp_path: Path) -> None:
    test, other = Test("pass@1", "two"), Test("pass@1", "two", "lower")
    kinds = {"a": Panel(), "b": Panel("pass@k"), "c": Panel("bars"), "d": Panel("calibration")}
    rows = {
        k: Comparison("c", "n", "-f", {"one": "-x", "two": ""}, (test,), ("pass@1",), panel)
        for k, panel in kinds.items()
    }
    rows["e"] = Comparison(
        "c", "n", "-f", {"one": "", "two": ""}, (other,), panel=Panel(over="pass@1", measures=("pass@2",))
    )
    bins = [[4, 0.05, 0.25], *[[0, 0.0, 0.0]] * 8, [4, 0.95, 0.75]]
    for row, comparison in rows.items():
        results = [result("warm-up", seed, 0.25, [], warm_up_seconds=7.0) for seed in (1, 2, 3)]
        for seed, ahead in ((1, 0.1), (2, 0.2), (3, 0.3)):
            line = [(0, 0.25, 0.5), (400, 0.5, 0.75)]
            results.append(result("one", seed, 0.5 + ahead, line, reliability=bins))
            if (row, seed) != ("c", 3):
                results.append(result("two", seed, 0.5, line, reliability=bins))
        stored.save(tmp_path, row, comparison, [1, 2, 3], reversed(results))
    kept = stored.load(tmp_path, {"b": rows["b"], **rows, "unrun": rows["a"]})
    assert list(kept) == ["b", "a", "c", "d", "e"]
    found = page.findings_of(kept)
    p = 1 - math.sqrt(6 / 7)  # of .1, .2, .3, in four rows of five
    assert [f.corrected for f in found["a"]] == [pytest.approx(5 * p)]
    assert found["c"][0].difference.pairs == 2
    report = tmp_path / "page.md"
    page.write(report, kept)
    text = report.read_text()
    difference = r"+0.200 [-0.048, +0.448], p = 0.3709"
    assert f"| [a](#a) | c | pass@1 against two: {difference} | **cannot be told** |" in text
    assert f"- pass@1 higher than of two: one differs by {difference}; not decided" in text
    assert "| *warm-up* | 0.250 ± 0.000 | - | 7.000 ± 0.000 |" in text
    assert "| one | 0.700 ± 0.058 | 400.0 ± 0.0 | 5.000 ± 0.000 |" in text
    assert "No result: two (seed 3)." in text and ", on 2 of 3 seeds; not decided" in text and "Stale" not in text
    assert f"trajkern train {stored.COMMON} -f --seed 1 ARM" in text and "#   one: -x" in text
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and "Run again" not in text
    page.write(report, kept, again={"a": kept["a"]})
    alone = r"+0.200 [-0.048, +0.448], p = 0.0742"
    assert f"| a | 1 to 3 | pass@1 against two: {alone} | **cannot be told** | 9 |" in report.read_text()
    page.draw_some(tmp_path / "some.png", kept, ["d"])
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
    changed = Comparison("c", "n", "-f", {"one": "-y", "two": ""}, (test,))
    page.write(report, stored.load(tmp_path, {"a": changed}))
    assert "**Stale**: these results were made with other flags than the row now has: one." in report.read_text()


@pytest.mark.parametrize(
    ("flags", "common"),
    [
        (("--a 1 --credit x:A", "--a 1 --credit x:B"), "--a 1"),
        (("--a 1", "--a 1 --b"), "--a 1"),
        (("--a 1", "--b 1"), ""),
        (("--a 1 -2", "--a 1 -3"), ""),
    ],
)
def test_common_flags_end_in_front_of_an_option(flags: tuple[str, ...], common: str) -> None:
    assert page._common(flags) == common


def test_a_row_that_breaks_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(row: str, seed: int) -> tuple[list[dict[str, Any]], list[str]]:
        if row == "bad":
            raise RuntimeError("no")
        return [result("one", seed, 0.5, [(0, 0.25, 0.5)])], []

    row = Comparison("c", "n", "-f", {"one": ""}, ())
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(reproduce, "COMPARISONS", {"bad": row, "good": row})
    monkeypatch.setattr(reproduce, "run", run)
    assert reproduce.run_rows({"bad": [1, 2], "good": [1, 2]}, 2, tmp_path) == ["bad: RuntimeError: no"] * 2
    kept = stored.load(tmp_path, {"bad": row, "good": row})
    assert list(kept) == ["good"] and sorted(kept["good"].arms["one"]) == [1, 2]


def test_workers_end_with_who_started_them() -> None:
    code = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from trajkern._bench.experiments.reproduce import end_with_parent
pool = ProcessPoolExecutor(2, initializer=end_with_parent)
found = [pool.submit(function, 0.2) for function in (time.sleep,) * 2]
[x.result() for x in found]
print(*pool._processes, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        workers = [int(x) for x in starter.stdout.readline().split()]
        starter.kill()
    assert workers
    end = time.monotonic() + 60
    while left := [pid for pid in workers if _runs(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"  # ended, and nobody has asked how


@pytest.mark.slow
def test_a_row_runs_once_and_what_fails_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = {"grpo": "--recipe grpo", "psr": "--recipe psr", "srl": "--recipe srl"}  # chain_sum shows no work
    row = Comparison("nothing", "nothing", SMALL, flags, (Test("pass@1", "psr"),), ("pass@1", "pass@4"))
    monkeypatch.setattr(reproduce, "COMPARISONS", {"small": row})
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    options = ["--seeds", "0", "--results", str(tmp_path), "--only", "small", "--jobs", "1"]
    with pytest.raises(SystemExit):
        reproduce.main(options[:2])
    assert reproduce.main(options) == 1
    assert "FAILED small, srl, seed 0: ValueError: task must be one with `reference`" in capsys.readouterr().out
    text = (tmp_path / "reproduction.md").read_text()
    assert "No result: srl (seed 0)." in text and "[-∞, ∞], p = 1.0000" in text
    kept = stored.load(tmp_path, {"small": row})["small"]
    warm_up, one, other = kept.warm_ups[0], kept.arms["grpo"][0], kept.arms["psr"][0]
    assert warm_up["after"] == warm_up["before"] == one["before"] == other["before"]
    assert warm_up["tokens"] == warm_up["steps"] == 0 < warm_up["warm_up_seconds"]
    assert one["steps"] == 2 and [p["steps"] for p in one["curve"]] == [0, 1, 2] and one["warm_up_seconds"] == 0
    assert one["curve"][0] == other["curve"][0] and one["curve"][-1]["tokens"] == one["tokens"] == one["sampled"]
    assert one["pass_at"][0] == pytest.approx(one["after"]["pass@1"]) and len(one["pass_at"]) == 4
    files = sorted((tmp_path / "runs").rglob("result.json"))
    before = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 3 and reproduce.main(options) == 1
    assert [path.stat().st_mtime_ns for path in files] == before
    files[0].unlink()
    reproduce.run("small", 0)
    assert [path.stat().st_mtime_ns == x for path, x in zip(files, before, strict=True)] == [False, True, True]
    monkeypatch.setattr(stored, "version", lambda comparison: "another")
    reproduce.run("small", 0)
    assert [path.stat().st_mtime_ns == x for path, x in zip(files, before, strict=True)] == [False, False, False]


def test_what_has_run_is_read_while_flags_and_sources_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, bool]] = []

    def run_arm(out: Path, config: TrainConfig, only_warm_up: bool, start: Path | None, show: bool) -> dict[str, Any]:
        out.mkdir(parents=True, exist_ok=True)
        ran.append((out.name, start is not None))
        if config.recipe == "nsr":
            raise RuntimeError("no")
        return {"after": {}}

    parsed = functools.cache(lambda flags: parse(flags.split()))
    monkeypatch.setattr(arms, "parse", lambda argv: parsed(" ".join(argv)))
    monkeypatch.setattr(arms, "run_arm", run_arm)
    failures: list[str] = []

    def run(flags: dict[str, str], **options: Any) -> list[str]:
        ran.clear()
        some = arms.run_arms(
            tmp_path, flags, 3, failed=lambda arm, error: failures.append(f"{arm}: {error}"), **options
        )
        return [result["arm"] for result in some]

    flags = {"a": "--recipe psr", "b": "--recipe nsr", "c": "--recipe grpo"}
    assert run(flags) == ["warm-up", "a", "c"] and failures == ["b: no"]
    assert ran == [("warm-up-seed3", False), ("a-seed3", True), ("b-seed3", True), ("c-seed3", True)]
    assert run(flags) == ["warm-up", "a", "c"] and ran == [("b-seed3", True)]
    assert run(flags | {"c": "--recipe grpo --steps 2"}) == ["warm-up", "a", "c"] and len(ran) == 2
    run(flags | {"a": "--recipe psr --steps 2"})
    assert len(ran) == 4, "the warm-up has the first arm's flags, and all start from it"
    assert run(flags, version="later") == ["warm-up", "a", "c"] and len(ran) == 4
    assert run(flags, share_warm_up=False) == ["a", "c"] and [start for _, start in ran] == [False] * 3
    with pytest.raises(RuntimeError, match="no"):
        arms.run_arms(tmp_path, flags, 4)


def test_arms_of_one_warm_up_agree_on_it(tmp_path: Path) -> None:
    flags = {"one": SMALL, "two": f"{SMALL} --warmup.lr 1e-3"}
    with pytest.raises(ValueError, match="warmup must be one's, .* for an arm of the same warm-up; two has"):
        arms.run_arms(tmp_path, flags, 0)


def test_a_version_is_of_code_and_not_of_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Comparison("c", "n", "", {"one": ""}, ())
    monkeypatch.setattr(stored, "_PACKAGE", tmp_path)
    (tmp_path / "credit").mkdir()
    versions = []
    for code in ('"""Says."""\nx = 1\n', '"""Says more."""\n# why\nx = 1\nROW = "said"\n', "x = 2\n"):
        (tmp_path / "credit" / "a.py").write_text(code)
        versions.append(stored.version(row))
    assert versions[0] == versions[1] != versions[2]


@pytest.mark.slow
def test_controls_start_from_one_warm_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "controls"
    assert controls.main(["--seeds", "0", "1", "--out", str(out), "--", *SMALL.split(), "--threads", "1"]) == 0
    text = (out / "controls.md").read_text()
    assert "| seed | warm-up | grpo | random-rewards | supervised |" in text and text in capsys.readouterr().out
    results = json.loads((out / "controls.json").read_text())["results"]
    names = ["grpo", "random-rewards", "supervised"]
    assert [(x["arm"], x["seed"]) for x in results] == [(arm, seed) for seed in (0, 1) for arm in names]
    for plain, random, supervised in (results[:3], results[3:]):
        assert plain["before"] == random["before"] == supervised["before"]
        assert plain["steps"] == random["steps"] == supervised["steps"] == 2
        assert supervised["trained"] >= random["trained"] > 0 == supervised["sampled"]


@pytest.mark.slow
def test_an_eager_run_says_what_the_heads_cost(
    config: Callable[..., TrainConfig], capsys: pytest.CaptureFixture
) -> None:
    train(config(head="eager"))
    said = capsys.readouterr().out
    for head in ("eager", "fused"):
        line = rf"^{head} head on the last batch, model included: \d+\.\d ms(, \d+ MiB at its peak)?$"
        assert re.search(line, said, re.M), head
