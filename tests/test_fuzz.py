"""A sample of ``make fuzz``, and that it finds, shrinks and shows what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trajkern as tk
from tests.fuzz import __main__ as command
from tests.fuzz.chunk import draw
from tests.fuzz.examine import TARGETS, complete, faults, is_refused
from trajkern.testing import SPECS

SAMPLE = 3  # cases of each target


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_op_is_a_target() -> None:
    assert {name.partition(" on ")[0] for name in TARGETS} == {spec.name for spec in SPECS} | {"topk_divergence"}


@pytest.mark.parametrize("target", TARGETS)
def test_the_plainest_options_are_legal(target: str) -> None:
    assert not is_refused(target, complete(target, {}))


@pytest.mark.parametrize("target", TARGETS)
def test_a_sample(target: str) -> None:
    done = draw(target, 11, SAMPLE, lambda options, seed: None)
    assert done.failure is None, command.snippet(target, *done.failure[:2])
    assert done.cases


CANCELLED = (
    ("sibling_advantages", 63600, {"tree": "comb", "ddof": 0}),
    ("group_advantages", 561, {"rows": 60, "groups": 400, "baseline": "leave_one_out"}),
    ("whiten", 1544, {"rows": 2, "ddof": 0, "eps": 1e-8, "offset": 1e4}),
)


@pytest.mark.parametrize(("target", "seed", "options"), CANCELLED, ids=[x[0] for x in CANCELLED])
def test_a_gradient_of_zero_between_large_values_is_their_rounding(
    target: str, seed: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at 1e4 a little apart: whatever the other's rounding is; and no more than that passes."""
    options = {"dtype": "float64", "values": "large", "eps": 0.0} | options
    options = {name: x for name, x in options.items() if name in TARGETS[target].factors}
    assert faults(target, seed, **options) == {}
    right = getattr(tk, target)
    monkeypatch.setattr(tk, target, lambda *x, **given: right(*x, **given) * (1 + 1e-5))
    assert "against the reference" in faults(target, seed, **options)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """``whiten`` errs where there is a mask."""
    right = tk.whiten

    def wrong(x: torch.Tensor, **options: Any) -> torch.Tensor:
        return right(x, **options) * (1.001 if options.get("mask") is not None else 1)

    monkeypatch.setattr(tk, "whiten", wrong)


@pytest.mark.usefixtures("broken")
def test_a_failure_is_shrunk_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--only", "whiten", "--cases", "12", "--seed", "1", "--report", "report.json"]
    assert command.main(arguments) == 1
    shown = capsys.readouterr().out
    (call,) = {line.strip() for line in shown.splitlines() if "print(faults(" in line}
    assert "mask=" in call and not any(name in call for name in ("ddof", "eps", "layout", "integers"))
    found = eval(call.removeprefix("print(").removesuffix(")"), {"faults": faults})  # what it says can be pasted
    assert found.keys() == {"against the reference"}
    tried = {
        record["area"]: (record["tried"], record["fell_short"])
        for record in json.loads(Path("report.json").read_text())
    }
    assert tried["fuzz: against the reference"][1] == 1 and tried["fuzz: twice"][1] == 0

    def never(*_: Any) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(command, "draw", never)
    assert command.main(arguments) == 1  # from what is kept


@pytest.mark.parametrize(("roundings", "status"), [(0, 0), (2, 1)])
def test_an_error_of_every_case_shows_though_each_passes(
    roundings: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As luck could have been in one."""
    monkeypatch.chdir(tmp_path)
    right = tk.linear_logprobs

    def wrong(*given: Any, **options: Any) -> torch.Tensor:
        x = right(*given, **options)
        return x * (1 + roundings * torch.finfo(x.dtype).eps)

    monkeypatch.setattr(tk, "linear_logprobs", wrong)
    assert command.main(["--only", "linear_logprobs", "--cases", "30", "--seed", "5"]) == status
    shown = capsys.readouterr().out
    assert "print(faults(" not in shown
    assert ("linear_logprobs: half of the cases take more than" in shown) == bool(status)


def test_what_killed_the_last_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("runs/fuzz/seed-2-cases-3.json")
    command.Progress(path, fresh=False).announce("spread #0, 3 cases", "spread", complete("spread", {"of": "batch"}), 7)
    assert command.main(["--only", "spread", "--cases", "3", "--seed", "2"]) == 1
    shown = capsys.readouterr().out
    assert "the process died" in shown and "print(faults('spread', seed=7, of='batch'))" in shown


def test_an_option_that_is_none() -> None:
    with pytest.raises(ValueError, match="gae must have options dtype, lengths,.*; got mask='all'"):
        faults("gae", mask="all")


def test_the_cases_add_up() -> None:
    plan = list(command.planned([*TARGETS], 1001))
    assert sum(count for *_, count in plan) == 1001 and len(set(plan)) == len(plan)
