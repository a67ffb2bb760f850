"""``trajkern.bench.compare``, shapes of one's own, two files of results beside each other. No test asserts a time."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import trajkern as tk
from trajkern._bench import __main__ as program
from trajkern._bench import bare, ceilings, host_trees, session, shapes, sizes
from trajkern._bench.case import BARE, OURS
from trajkern._bench.difference import difference
from trajkern._bench.run import gate
from trajkern.bench import compare, shapes_of

CEILINGS = {
    "copy_bytes_per_second": 1e9,
    "gemm_8_float32_flop_per_second": 1e9,
    "launch_seconds": 1e-6,
    "empty_call_seconds": 1e-8,
}
FAST = dict(seconds=0.0, progress=False)


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda *_: dict(CEILINGS))
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # half a second with torch loaded, several times a case


def mine(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def wrong(logits: Tensor, targets: Tensor) -> Tensor:
    return mine(logits, targets) + 1e-3


def test_own_functions_are_timed_beside_the_op() -> None:
    found = compare({"mine": mine, "wrong": wrong}, like="token_logprobs", shapes=[(3, 11), (2, 5)], **FAST)
    assert [case["shape"] for case in found.cases] == ["3 × 11 float32", "2 × 5 float32"]
    assert [case["work"] for case in found.cases] == ["forward + backward"] * 2
    for case in found.cases:
        assert case["seconds"].keys() == {OURS, "mine", "eager", BARE}
    assert not found.passed and found.times("wrong") == [None, None] and found.times(OURS) == [1.0, 1.0]
    assert all(isinstance(x, float) for x in found.times("mine", "eager"))
    with pytest.raises(ValueError, match="contender must be one of .*'mine'.*; got 'yours'"):
        found.times("yours")


def test_what_is_printed_fits_a_terminal_and_says_why_there_is_no_time() -> None:
    shown = str(compare({"mine": mine, "wrong": wrong}, like="token_logprobs", shapes=[(3, 11)], **FAST))
    assert max(map(len, shown.splitlines())) <= 80
    assert "wrong      not timed: logprobs is off by" in shown
    assert "bare pass: torch's sum of the logits, then a product into fresh memory" in shown


def test_the_forward_alone_and_a_dict_of_outputs() -> None:
    entropy = lambda logits, targets: {"entropy": tk.token_stats(logits, targets).entropy.detach()}  # noqa: E731
    found = compare({"mine": entropy}, like="token_stats", shapes=[(3, 11)], backward=False, **FAST)
    assert found.passed and found.cases[0]["work"] == "forward"
    lacking = compare({"mine": entropy}, like="token_stats", shapes=[(3, 11)], **FAST)
    assert "mine returned no logprobs, whose gradient is timed here" in lacking.cases[0]["gate"]["mine"]["why"]


def test_what_writes_into_its_arguments_spoils_nobody_elses() -> None:
    def scaled(logits, targets):
        logits.mul_(2)
        return mine(logits, targets)

    found = compare({"scaled": scaled}, like="token_logprobs", shapes=[(3, 11)], backward=False, **FAST)
    gates = found.cases[0]["gate"]
    assert "scaled writes into its argument logits" in gates["scaled"]["why"]
    assert gates[OURS]["passed"] and gates["eager"]["passed"]


def test_an_argument_that_is_not_taken_is_told() -> None:
    loss = lambda logprobs, old_logprobs, advantages, cu_seqlens, config: logprobs.sum()  # noqa: E731
    found = compare({"mine": loss}, like="policy_loss", shapes=[(40, 4)], **FAST)
    assert "mine does not take mask, ref_logprobs, which policy_loss is given" in " ".join(str(found).split())
    assert found.cases[0]["gate"][OURS]["passed"]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(like="nonsense"), ValueError, "like must be one of 'token_logprobs'"),
        (dict(like="token_logprobs", shapes=[(3, 4, 5)]), ValueError, r"shapes must be .* T,V; got \(3, 4, 5\)"),
        (dict(like="token_logprobs", shapes=[(3, 0)]), ValueError, "shapes: V must be at least 1, got 0"),
        (dict(like="gae", shapes=[(3, 8)]), ValueError, "shapes: T must be at least N, 8; got 3"),
        (dict(like="token_logprobs", device="tpu"), ValueError, "device must be one of 'cpu', 'cuda'"),
        (dict(like="linear_logprobs"), TypeError, "must take the arguments of linear_logprobs by name"),
    ],
)
def test_refusals_come_before_the_run(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        compare({"mine": mine if arguments["like"] != "gae" else lambda **_: None}, **{"progress": False, **arguments})


@pytest.mark.parametrize("functions, error", [({OURS: mine}, ValueError), ({"trl": mine}, ValueError), ({}, TypeError)])
def test_names_of_others_are_refused(functions, error) -> None:
    with pytest.raises(error, match="functions"):
        compare(functions, like="token_logprobs", progress=False)


def test_letters_of_an_op() -> None:
    assert shapes_of("linear_policy_loss") == ("T", "H", "V")
    with pytest.raises(ValueError, match="like must be one of"):
        shapes_of("nonsense")


UNEVEN = {
    ("T", "V"): (3, 5),
    ("T", "H", "V"): (11, 4, 7),
    ("N", "G"): (14, 3),
    ("T", "N"): (50, 7),
    ("N", "L"): (16, 3),
}


@pytest.mark.parametrize("op", sizes.SIZES)
def test_every_size_passes_its_gate(op: str) -> None:
    """Odd ones, at which no trajectory is like the other."""
    letters = shapes_of(op)
    for case in sizes.cases(op, UNEVEN.get(letters, (1000,)), torch.float32, "cpu"):
        problem = case.make("cpu")
        assert all(gate(problem, name)["passed"] for name in (OURS, "eager")), case.name


def test_a_head_of_more_rows_than_the_gate_takes() -> None:
    (case,) = sizes.cases("linear_policy_loss", (133, 4, 7), torch.float32, "cpu")
    problem = case.make("cpu")
    assert problem.small is not None and all(gate(problem, name)["passed"] for name in (OURS, "eager"))


def test_every_case_has_a_bare_pass_that_is_named() -> None:
    for case in (case for cases in program.FAMILIES.values() for case in cases):
        assert case.op in (*bare.LOGITS, *bare.HEADS, *bare.PASSES), case.name


@pytest.mark.parametrize(
    "op, work, why",
    [
        ("linear_policy_loss", "forward + backward, 30% scored", bare.SKIPS),
        ("linear_logprobs", "forward", bare.STORES),
        ("token_stats", "forward", bare.MOVES),
    ],
)
def test_less_than_the_bare_pass_is_explained(op: str, work: str, why: str) -> None:
    times = {OURS: {"median": 1.0, "spread": 0.1}, BARE: {"median": 2.0, "spread": 0.1}}
    case = {"op": op, "work": work, "seconds": times}
    assert bare.why_less(case) == why
    times[BARE]["median"] = 1.19
    assert bare.why_less(case) == (bare.SKIPS if why == bare.SKIPS else bare.NOISE)
    case["seconds"][BARE]["median"] = 0.5
    assert bare.why_less(case) == "" == bare.why_less({"op": op, "work": work, "seconds": {}})


# on the command line


def _chosen(*argv: str) -> list[str]:
    return [case.name for case in program.chosen(program._parser().parse_args(argv))]


@pytest.mark.parametrize("argv", [["--quick"], [], ["--op", "hosts"], ["--quick", "--op", "hosts"]], ids=" ".join)
@pytest.mark.parametrize("on", ["cpu", "cuda"])
def test_cases_are_the_devices_own(argv: list[str], on: str) -> None:
    chosen = program.chosen(program._parser().parse_args([*argv, "--device", on]))
    assert all(on in case.devices for case in chosen) and (chosen or on == "cuda")


def test_a_shape_of_ones_own() -> None:
    names = _chosen("--shape", "24,8,33", "--dtype", "bfloat16")
    assert len(names) == 5 and "linear_policy_loss, forward + backward, 24 × 8 × 33 bfloat16" in names
    assert "token_logprobs, forward, 24 × 33 bfloat16" in names
    assert _chosen("--shape", "24,3", "--op", "gae") == ["gae, forward, 24 tokens, 3 trajectories"]
    assert len(_chosen("--shape", "24,33", "--shape", "8,9", "--op", "logprob")) == 8


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--shape", "24,8"], "--shape must be the whole numbers T,H,V; got (24, 8)"),
        (["--shape", "24", "--op", "gae"], "--shape of gae must be the whole numbers T,N; got (24,)"),
        (["--shape", "24,8", "--op", "hosts"], "--shape goes with no --op hosts"),
        (["--shape", "1,2,3", "--shapes", "qwen3-8b"], "give one of them"),
    ],
)
def test_shapes_that_an_op_has_not(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(argv) == 2
    assert says in capsys.readouterr().err


def test_quick_is_a_small_case_of_every_op() -> None:
    names = _chosen("--quick")
    ops = {name.split(",")[0] for name in names}
    every = [case for cases in program.FAMILIES.values() for case in cases]
    large = {"sequence_group", *(case.op for case in host_trees.CASES)}  # start processes, and run whole models
    assert {case.op for case in every} - large == ops
    assert _chosen("--quick", "--op", "gae") == _chosen("--op", "gae")
    assert len(names) < len(_chosen()) / 2


def test_progress_tells_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 100.0, 130.0])
    told = session.Progress(49, lambda: next(times))
    for name in ("a", "b", "c"):
        told.begin(name)
        told.end({"seconds": {OURS: {"median": 0.5}}})
    assert capsys.readouterr().err.splitlines() == [
        "[ 1/49]  a: 500 ms",
        "[ 2/49] about 80 min left  b: 500 ms",
        "[ 3/49] about 51 min left  c: 500 ms",
    ]
    assert [session.duration(x) for x in (0.2, 44, 114, 116, 200)] == ["10 s", "40 s", "110 s", "2 min", "3 min"]


def _saved(path: Path, median: float, **machine: str) -> Path:
    found = compare({"mine": mine}, like="token_logprobs", shapes=[(3, 11)], **FAST)
    for x in found.cases[0]["seconds"].values():
        x |= {"median": median, "spread": 0.02}
    found.report["machine"] |= machine
    found.save(path)
    return path


def test_two_files_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = _saved(tmp_path / "a.json", 1e-3), _saved(tmp_path / "b.json", 2e-3)
    assert program.main(["--compare", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert "1 ms ± 2% -> 2 ms ± 2%: 2.00 ×, slower (eager 2.00 ×)" in shown and "0 faster, 1 slower, 0 within" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert program.main(["--load", str(a)]) == 0  # the same format as the command's own
    assert program.main(["--compare", str(a), str(tmp_path / "none.json")]) == 2
    assert "--compare" in capsys.readouterr().err


def test_another_machine_and_cases_of_one_file_are_said(tmp_path: Path) -> None:
    a = json.loads(_saved(tmp_path / "a.json", 1e-3).read_text())
    b = json.loads(_saved(tmp_path / "b.json", 1.03e-3, cpu="another").read_text())
    b["cases"][0]["shape"], a["cases"][0]["gate"] = "other", {}
    shown = difference(a, b)
    assert "different machines" in shown and "only in A: token_logprobs" in shown and "only in B" in shown
    b["cases"][0]["shape"] = a["cases"][0]["shape"]
    assert "1.03 ×" in difference(a, b) and "0 slower, 1 within" in difference(a, b)


def test_models_are_shapes_with_a_name() -> None:
    width, vocabulary = shapes.MODELS["qwen3-8b"]
    named = shapes.cases("qwen3-8b", "cpu", 16)
    plain = shapes.sized("", 16, width, vocabulary, "cpu", torch.float32)
    assert [case.shape for case in named] == [f"qwen3-8b: {case.shape}" for case in plain]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_what_stands_around_the_call_is_not_what_is_timed(around: Any) -> None:
    with around():
        found = compare({"mine": mine}, like="token_logprobs", shapes=[(4, 7)], seconds=0.0, progress=False)
    assert found.passed and not torch.is_inference_mode_enabled()
