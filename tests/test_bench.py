"""The benchmark's arithmetic, its gate and its tables. No test asserts a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trajkern._bench import __main__ as program
from trajkern._bench import advantage, ceilings, head, logprob, policy_loss, reflection, span, table
from trajkern._bench.case import BARE, COMPILED, OURS, Problem, Target, TimedCase
from trajkern._bench.memory import peak_bytes
from trajkern._bench.run import Settings, gate, run, shares, verdict
from trajkern._bench.timing import Summary, WallClock, race, ratio

ALL_CASES = (*logprob.CASES, *head.CASES, *advantage.CASES, *policy_loss.CASES, *reflection.CASES, *span.CASES)
SETTINGS = Settings("cpu", seconds=0.0, rounds=(3, 3), compiled=False)
CEILINGS = {"copy_bytes_per_second": 1e9, "gemm_8_float32_flop_per_second": 1e9}


def problem(rivals, **options) -> Problem:
    """token_logprobs on three rows, with a backward."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 11, generator=g)
    return Problem(
        op="token_logprobs",
        inputs={"logits": logits, "targets": torch.tensor([0, 10, 4])} | options,
        rivals=rivals,
        bare=logits.sum,
        bytes=logits.nbytes,
        grad=True,
        upstream={"logprobs": torch.randn(3, generator=g)},
    )


def right(logits, targets, **_):
    return {"logprobs": logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]}


def wrong_value(logits, targets, **_):
    return {"logprobs": right(logits, targets)["logprobs"] + 1e-4}


def wrong_gradient(logits, targets, **_):
    x = right(logits, targets)["logprobs"]
    return {"logprobs": (1 + 1e-4) * x - 1e-4 * x.detach()}


def broken(**_):
    raise RuntimeError("no such\n  kernel")


class CountingClock:
    """Every call takes one more second than the one before; remembers who was called."""

    sample_seconds = 0.0

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, call, repeats: int) -> float:
        call()
        self.seconds += 1
        return self.seconds


# timing


def test_summary() -> None:
    summary = Summary.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert summary == Summary(median=3.0, minimum=1.0, spread=1 / 3, rounds=5)
    assert Summary.of([2.0]) == Summary(2.0, 2.0, 0.0, 1)


def test_ratio_is_taken_within_each_round() -> None:
    """A machine that slows down by rounds leaves it alone; the ratio of the medians would be 0.2."""
    assert ratio([1.0, 2.0, 40.0], [2.0, 10.0, 80.0]) == 0.5


def test_race_takes_turns_and_starts_with_another_one_each_round() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    samples = race(calls, CountingClock(), seconds=1e9, rounds=(1, 4))
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab" + "abc"  # calibration, then four rounds
    assert [len(x) for x in samples.values()] == [4, 4, 4]
    assert samples["a"] == [4.0, 9.0, 11.0, 13.0]


def test_race_keeps_to_the_fewest_rounds() -> None:
    assert len(race({"a": lambda: None}, CountingClock(), seconds=0.0, rounds=(5, 9))["a"]) == 5


def test_short_calls_are_repeated_by_the_fastest_of_a_few() -> None:
    seen: list[int] = []

    class Clock:
        sample_seconds = 1.0

        def __init__(self) -> None:
            self.times = iter([8.0, 0.3, 0.2, 0.3, 0.3])

        def __call__(self, call, repeats: int) -> float:
            seen.append(repeats)
            return next(self.times, 0.5)

    race({"a": lambda: None}, Clock(), seconds=0.0, rounds=(2, 2))
    assert seen == [1, 1, 1, 1, 1, 5, 5]


def test_wall_clock_repeats_and_waits() -> None:
    seen: list[str] = []
    WallClock(lambda: seen.append("wait"))(lambda: seen.append("call"), 3)
    assert seen == ["wait", "call", "call", "call", "wait"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_sees_an_allocation_that_is_gone_again() -> None:
    size = 256 * 2**20
    assert peak_bytes(lambda: torch.ones(size, dtype=torch.uint8).sum(), "cpu") > 0.9 * size
    assert peak_bytes(lambda: torch.ones(10).sum(), "cpu") < 0.1 * size


def test_kept_memory_hides_no_peak() -> None:
    """In a process of its own: what the C library was told stays."""
    code = """
import torch
from trajkern._bench.memory import hold, peak_bytes
hold()
blocks = lambda: [torch.ones(2**22, dtype=torch.uint8) for _ in range(40)]
blocks()
print(peak_bytes(blocks, "cpu"))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(process.stdout) > 0.9 * 40 * 2**22


def test_the_better_ceiling_counts() -> None:
    before = {"copy_bytes_per_second": 4.0, "launch_seconds": 2.0}
    after = {"copy_bytes_per_second": 8.0, "launch_seconds": 3.0}
    most = ceilings.best(before, after) | {"gemm_8_float32_flop_per_second": 2.0}
    assert most["launch_seconds"] == 2.0
    case = {"seconds": {OURS: {"median": 2.0}}, "host": False, "bytes": 4, "flops": 1}
    assert shares(case, most) == {"share_of_copy": 0.25, "share_of_gemm": 0.25}
    assert shares(case | {"flops": 0}, most) == {"share_of_copy": 0.25}
    assert shares(case | {"host": True}, most) == shares(case | {"seconds": {}}, most) == {}


# the gate


def test_gate_passes_what_is_right() -> None:
    sound = problem({"eager": right})
    for name in (OURS, "eager"):
        outcome = gate(sound, name)
        assert outcome["passed"], outcome
        assert outcome["shares"].keys() == {"logprobs", "grad_logits"}


@pytest.mark.parametrize(
    "form, says",
    [
        (wrong_value, "logprobs is off"),
        (wrong_gradient, "grad_logits is off"),
        (broken, "RuntimeError: no such kernel"),
    ],
)
def test_gate_is_red(form, says: str) -> None:
    outcome = gate(problem({"eager": form}), "eager")
    assert not outcome["passed"]
    assert says in outcome["why"]


def test_gate_is_red_on_nan() -> None:
    form = lambda logits, targets, **_: {"logprobs": right(logits, targets)["logprobs"] * torch.nan}  # noqa: E731
    assert not gate(problem({"eager": form}), "eager")["passed"]


def test_trajkern_gets_no_more_than_the_budget() -> None:
    """An error that a rival may have is too much for trajkern."""

    def near(logits, targets, **_):
        return {"logprobs": right(logits, targets)["logprobs"] * (1 + 1e-6)}

    inexact = problem({"eager": near})
    inexact._ours = near  # type: ignore[method-assign]
    assert gate(inexact, "eager")["passed"] and not gate(inexact, OURS)["passed"]


def test_in_place_backward_leaves_the_other_contenders_inputs() -> None:
    inplace = problem({"eager": right}, inplace_backward=True)
    before = inplace.inputs["logits"].clone()
    step = inplace.step(OURS)
    step(), step()
    assert torch.equal(inplace.inputs["logits"], before)
    assert gate(inplace, OURS)["passed"]


def test_whoever_fails_the_gate_gets_no_time() -> None:
    targets = (Target("fast", 0.0, "eager"), Target("times", 1e9, BARE))
    case = TimedCase(
        "token_logprobs", "forward + backward", "3 × 11", lambda d: problem({"eager": wrong_value}), targets
    )
    result = run(case, SETTINGS, WallClock(), CEILINGS)
    assert result["seconds"].keys() == {OURS, BARE}
    assert [t["met"] for t in result["targets"]] == [None, True]
    json.dumps(result, allow_nan=False)


def test_inputs_that_cannot_be_made_are_a_red_gate() -> None:
    result = run(TimedCase("gae", "forward", "", lambda device: broken()), SETTINGS, WallClock(), CEILINGS)
    assert not result["gate"][OURS]["passed"] and not result["seconds"]


@pytest.mark.parametrize("case", [c for c in ALL_CASES if c.host], ids=lambda c: c.name)
def test_tiny_cases_pass_their_gate(case: TimedCase) -> None:
    tiny = case.make("cpu")
    assert [name for name in (OURS, "eager") if not gate(tiny, name)["passed"]] == []


def test_every_target_names_a_contender() -> None:
    rivals = {target.rival for case in ALL_CASES for target in case.targets}
    assert rivals <= {"", BARE, "eager", COMPILED}
    assert {target.unit for case in ALL_CASES for target in case.targets} == {"times", "fast", "seconds", "memory"}


@pytest.mark.parametrize(
    "target, value, met",
    [
        (Target("times", 1.6, BARE), 2.0, False),
        (Target("fast", 4, "eager"), 5.0, True),
        (Target("fast", 6, "eager"), 5.0, False),
        (Target("fast", 6, COMPILED), None, None),
        (Target("seconds", 40e-6), 2.0, False),
        (Target("memory", 1.0), 0.5, True),
    ],
)
def test_verdict(target: Target, value: float | None, met: bool | None) -> None:
    samples = {OURS: [2.0, 2.0], "eager": [10.0, 10.0], BARE: [1.0, 1.0]}
    result = {"seconds": {OURS: {"median": 2.0}}, "peak_bytes": {OURS: 50}, "memory_of": {"bytes": 100}}
    judged = verdict(target, result, samples)
    assert (judged["value"], judged["met"]) == (value, met)


# the report


@pytest.mark.parametrize(
    "value, text",
    [(2.0, "2 s"), (0.0312, "31.2 ms"), (0.9999, "1000 ms"), (40e-6, "40 µs"), (1.5e-7, "150 ns"), (123.0, "123 s")],
)
def test_seconds(value: float, text: str) -> None:
    assert table.seconds(value) == text


def test_table_is_aligned() -> None:
    lines = table.table(("a", "bb"), [("long", "x"), ("y", "longer")]).splitlines()
    assert lines == ["| a    | bb     |", "| ---- | ------ |", "| long | x      |", "| y    | longer |"]
    assert table.table(("a",), []) == ""


@pytest.fixture
def tiny_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``trajkern bench`` on one case, whose only rival is given; returns (status, report, tables)."""

    def call(form) -> tuple[int, dict, str]:
        targets = (Target("fast", 1e9, "eager"),)
        case = TimedCase("token_logprobs", "forward + backward", "3 × 11", lambda d: problem({"eager": form}), targets)
        monkeypatch.setattr(program, "FAMILIES", {"logprob": (case,)})
        files = [tmp_path / "a.json", tmp_path / "a.md"]
        status = program.main(["--quick", "--op", "logprob", "--json", str(files[0]), "--markdown", str(files[1])])
        return status, json.loads(files[0].read_text()), files[1].read_text()

    return call


def test_report(tiny_program) -> None:
    status, report, tables = tiny_program(right)
    assert status == 0 and report["complete"]
    assert report["machine"]["cpu"] in tables and report["versions"]["torch"] == torch.__version__
    assert report["ceilings"].keys() == {
        "copy_bytes_per_second",
        "gemm_1024_float32_flop_per_second",
        "launch_seconds",
        "empty_call_seconds",
    }
    assert "≥ 1e+09 × as fast as eager" in tables and "**not met**" in tables
    assert "Gate failed" not in tables


def test_red_gate_is_told_and_makes_the_status_1(tiny_program) -> None:
    status, report, tables = tiny_program(wrong_gradient)
    assert status == 1 and report["complete"]
    assert "eager" not in report["cases"][0]["seconds"]
    assert "Gate failed" in tables and "grad_logits is off by" in tables and "not measured" in tables


def test_interruption_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ceilings, "measure", interrupted)
    assert program.main(["--json", str(tmp_path / "a.json")]) == 1
    assert json.loads((tmp_path / "a.json").read_text())["complete"] is False
