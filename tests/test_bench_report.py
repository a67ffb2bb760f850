"""The benchmark's peers, model shapes, growth, and what it shows: terminal, page, pictures, refusals."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from trajkern._bench import __main__ as program
from trajkern._bench import growth, head, hosts, peers, plots, policy_loss, recipes, shapes
from trajkern._bench.case import OURS, Problem, Target, TimedCase
from trajkern._bench.peers import PEERS, Cannot, Peer
from trajkern._bench.report import html
from trajkern._bench.run import gate
from trajkern._bench.table import markdown
from trajkern._bench.text import WIDTH, case_lines, size
from trajkern._bench.timing import WallClock

# these compile for half a minute
COMPILING = {("cce", "linear_logprobs"), ("cce", "linear_policy_loss"), ("liger", "linear_policy_loss")}


def tiny(rivals: dict[str, Any] | None = None) -> Problem:
    """linear_logprobs of three rows."""
    g = torch.Generator().manual_seed(0)
    inputs = {
        "hidden": torch.randn(3, 4, generator=g),
        "weight": torch.randn(7, 4, generator=g),
        "targets": torch.tensor([0, 6, 2]),
    }
    return Problem("linear_logprobs", inputs, rivals or {}, inputs["hidden"].sum, bytes=48, flops=2 * 3 * 4 * 7)


def install(patch: pytest.MonkeyPatch) -> None:
    """Peers of every condition: one that can, one that is wrong, one that refuses, one broken, one absent."""

    def cannot(problem: Problem, device: str) -> Any:
        raise Cannot("takes even rows")

    def torn(problem: Problem, device: str) -> Any:
        raise ImportError("no such\n name")

    for name in ("fine", "wrong", "odd", "torn"):
        patch.setitem(sys.modules, f"_peer_{name}", ModuleType(name))
    right = lambda problem, device: head.logprobs  # noqa: E731
    wrong = lambda problem, device: lambda **x: {"logprobs": head.logprobs(**x)["logprobs"] + 1}  # noqa: E731
    forms = {"fine": right, "wrong": wrong, "odd": cannot, "torn": torn, "broken": right, "absent": right}
    packages = {
        name: Peer("no-such-package" if name == "absent" else "pytest", f"_peer_{name}", {"linear_logprobs": form})
        for name, form in forms.items()
    }
    packages["gpu"] = Peer("pytest", "_peer_fine", {"linear_logprobs": right}, gpu_only=True)
    patch.setattr(peers, "PEERS", packages)
    peers._import_error.cache_clear()


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def test_every_peer_is_used_or_says_why_not(packages: None) -> None:
    able, unable = peers.contenders(tiny(), "cpu")
    assert able.keys() == {"fine", "wrong"}
    assert unable == {
        "odd": "takes even rows",
        "torn": "installed but broken: ImportError: no such name",
        "broken": "installed but broken: ModuleNotFoundError: No module named '_peer_broken'",
        "absent": "not installed",
        "gpu": "has no CPU kernel",
    }
    assert peers.versions()["absent"] == "not installed" and peers.versions()["fine"][0].isdigit()


def test_a_recipe_is_no_op_of_any_package() -> None:
    """Whatever is installed: no package is called broken for what it never offered."""
    for case in (*recipes.CASES[:1], *hosts.CASES):
        able, unable = peers.contenders(case.make("cpu"), "cpu")
        assert not able and unable == {name: peers.NO_SUCH_OP for name in PEERS}


def test_a_form_that_fails_blames_no_installation(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(problem: Problem, device: str) -> Any:
        raise AttributeError("no attribute 'x'")

    monkeypatch.setitem(peers.PEERS, "fine", Peer("pytest", "_peer_fine", {"linear_logprobs": fails}))
    _, unable = peers.contenders(tiny(), "cpu")
    assert unable["fine"] == "could not be prepared: AttributeError: no attribute 'x'"


def test_a_peer_without_the_loss_contends_by_its_log_probs(packages: None) -> None:
    loss = head.loss_problem(128, 4, 11, torch.float32)("cpu")
    loss.peers, _ = peers.contenders(loss, "cpu")
    assert gate(loss, "fine")["passed"] and not gate(loss, "wrong")["passed"]


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peers.trouble(peer) is None])
def test_installed_peers_pass_the_gate(name: str) -> None:
    problems = [
        head.forward_problem(16, 8, 32, torch.float32)("cpu"),
        head.loss_problem(128, 8, 32, torch.float32)("cpu"),
        policy_loss.problem(64, 4, backward=True)("cpu"),
        shapes.logprob.problem("token_stats", 4, 32, torch.float32, backward=True)("cpu"),
    ]
    for problem in problems:
        problem.peers, _ = peers.contenders(problem, "cpu")
        if name in problem.peers and (name, problem.op) not in COMPILING:
            assert gate(problem, name)["passed"], (problem.op, gate(problem, name))


@pytest.mark.parametrize("model", shapes.MODELS)
def test_shapes_are_their_models(model: str) -> None:
    width, vocabulary = shapes.MODELS[model]
    cases = shapes.cases(model, "cuda", 16)
    assert {case.op for case in cases} == {"token_logprobs", "token_stats", "linear_logprobs", "linear_policy_loss"}
    assert all(case.shape.startswith(f"{model}: 16 × ") and f"{vocabulary:,} bfloat16" in case.shape for case in cases)
    assert f"{width:,}" in cases[-1].shape


def test_exponent() -> None:
    assert growth.exponent([(2, 8.0), (4, 64.0), (8, 512.0)]) == pytest.approx(3)
    assert growth.exponent([(1, 5.0), (100, 5.0)]) == pytest.approx(0)


@pytest.mark.slow
def test_growth_measures_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = growth.Sweep("group_advantages", "N", {"cpu": (8, 32)}, lambda n: growth.advantage.groups(n, 4))
    monkeypatch.setattr(growth, "SWEEPS", (sweep,))
    said: list[str] = []
    (result,) = growth.measure("cpu", WallClock(), 0.0, {"group_advantages"}, said.append)
    assert [p["value"] for p in result["points"]] == [8, 32] and all(p["seconds"] > 0 for p in result["points"])
    assert growth.measure("cpu", WallClock(), 0.0, {"gae"}, said.append) == [] and len(said) == 1


# what is shown


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with peers and growth leaves."""
    path = tmp_path_factory.mktemp("bench") / "results.json"
    target = (Target("fast", 1e9, "eager"),)
    case = TimedCase("linear_logprobs", "forward", "3 × 4 × 7", lambda device: tiny({"eager": head.logprobs}), target)
    sweep = growth.Sweep("linear_logprobs", "T, rows", {"cpu": (8, 16)}, lambda n: lambda device: tiny())
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        patch.setattr(program, "FAMILIES", {"head": (case,)})
        patch.setattr(growth, "SWEEPS", (sweep,))
        # status 0: a wrong peer is its own affair
        assert program.main(["--quick", "--op", "head", "--peers", "--growth", "--json", str(path)]) == 0
    return path


def test_terminal_shows_every_contender_in_80_columns(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--load", str(results)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    for part in (
        "linear_logprobs forward: 3 × 4 × 7",
        "fine ",
        "wrong: gate failed",
        "odd – takes even rows",
        "target ≥ 1e+09 × as fast as eager",
        "NOT MET",
        "Not compared:",
        "growth",
        "empty call",
    ):
        assert part in " ".join(out.split())


def test_who_is_faster_is_said() -> None:
    report = {"device": "cpu", "peers": {"fine": "1.0"}}
    case = {
        "op": "gae",
        "work": "forward",
        "shape": "1",
        "host": True,
        "gate": {},
        "unable": {},
        "targets": [],
        "peak_bytes": {},
        "seconds": {n: {"median": t, "spread": 0.0} for n, t in ((OURS, 2.0), ("fine", 1.0))},
    }
    assert "    ! slower than fine" in list(case_lines(case, list(report["peers"])))


@pytest.mark.parametrize("count, expected", [(0, "0 B"), (2048, "2 KiB"), (2**20 * 1.5, "1.5 MiB"), (2**34, "16 GiB")])
def test_size(count: float, expected: str) -> None:
    assert size(count) == expected


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.outside += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("#")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [v or "" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("#")]


def test_page_is_whole_and_needs_nothing_else(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.html"
    assert program.main(["--load", str(results), "--html", str(path)]) == 0
    page = _Page()
    page.feed(path.read_text())
    assert not page.open and not page.outside
    report = json.loads(results.read_text())
    drawn = sum(draw(report, plots.WIDE) is not None for draw, _ in plots.PICTURES.values())
    assert page.count["svg"] == 2 * drawn >= 6  # for a page and for a phone
    assert path.read_text().index("<h2>Times") < path.read_text().index("<details><summary>Targets")
    assert page.count["table"] >= 4
    assert "@import" not in path.read_text() and plots.INK not in path.read_text()


def test_page_escapes_what_it_is_given(results: Path) -> None:
    pytest.importorskip("matplotlib")
    report = json.loads(results.read_text())
    report["machine"]["cpu"] = "<script>"
    report["cases"][0]["shape"] = "a<b>"
    page = html(report)
    assert "<script>" not in page and "a<b>" not in page and "a&lt;b&gt;" in page


def test_pictures(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert program.main(["--load", str(results), "--png", str(tmp_path)]) == 0
    for name in ("ratios", "roofline", "time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_tables_name_the_peers(results: Path) -> None:
    text = markdown(json.loads(results.read_text()))
    assert "| fine " in text and "absent (not installed)" in text and "grows by the power" in text


# refusals


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--json", "/no/such/folder/a.json"], "--json /no/such/folder/a.json: cannot be written"),
        (["--html", "."], "--html .: cannot be written"),
        (["--rows", "0"], "--rows must be in [1, 2^31); got 0"),
        (["--load", "/no/such.json"], "--load /no/such.json: "),
    ],
)
def test_refusals_come_before_the_run(argv: list[str], says: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(program, "measure", lambda *_: pytest.fail("measured"))
    assert program.main(argv) == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--device", "cuda"]) == 2
    assert "sees no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("content, says", [('{"format": 1}', "format 1"), ("[]", "format none"), ("{", "Expecting")])
def test_results_of_another_version_are_refused(content: str, says: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    assert program.main(["--load", str(path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--op", "nonsense"], ["--shapes", "nonsense"], ["--device", "tpu"]])
def test_what_is_unknown_is_refused_with_the_list(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(argv)
    known = {"--op": "gae", "--shapes": "qwen3-8b", "--device": "cuda"}[argv[0]]
    assert stop.value.code == 2 and known in capsys.readouterr().err
