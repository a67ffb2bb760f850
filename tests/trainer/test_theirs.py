"""Errors and results of code that flags name: a line that says whose they are."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trajkern import credit
from trajkern.trainer import cli_main
from trajkern.trainer.compose import flags_of
from trajkern.trainer.config import TrainConfig
from trajkern.trainer.folder import ResultsError
from trajkern.trainer.tasks import Answer, Question, Reply, Task
from trajkern.trainer.tasks.checked import checked
from trajkern.trainer.train import train

Make = Callable[..., TrainConfig]
QUESTION = Question("1+1=", "1+1", "2", {})
CREDITS = """
import torch
from trajkern import credit


class Wordless(Exception):
    def __str__(self):
        raise RuntimeError


def key(rollouts):
    return rollouts.rewards["no such reward"]


def flag(rollouts):
    return [True] * len(rollouts)


def wordless(rollouts):
    raise Wordless


def leaves(rollouts):
    raise SystemExit(3)


def ends(rollouts):
    return next(iter(()))


def file(rollouts):
    return open("nowhere/at/all")


def none(rollouts):
    return None


of = {f.__name__: credit.outcome(f) for f in (key, wordless, leaves, ends, file, none)}
globals().update({f"of_{name}": spec for name, spec in of.items()})
gated = credit.outcome().gate(key)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of one's own, and one that cannot be imported."""
    (tmp_path / "own_credits.py").write_text(CREDITS)
    (tmp_path / "own_broken.py").write_text("raise KeyError('at import')\n")
    (tmp_path / "own_leaving.py").write_text("raise SystemExit(4)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_credits", "own_broken", "own_leaving"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("of_key", "KeyError: 'no such reward'"),
        ("gated", "KeyError: 'no such reward'"),
        ("of_wordless", "Wordless"),
        ("of_leaves", "SystemExit: 3"),
        ("of_ends", "StopIteration"),
        ("of_file", "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere/at/all'"),
    ],
)
def test_an_error_of_a_credits_function_names_the_credit(own: Path, config: Make, name: str, said: str) -> None:
    with pytest.raises(ResultsError) as error:
        train(config(credit=f"own_credits:{name}", steps=1))
    file = re.escape(str(own / "own_credits.py"))
    place = rf"\({file}:\d+, in \w+; python -X dev -m trajkern train shows the traceback\)"
    assert re.match(rf"credit own_credits:{name} raised {re.escape(said)} {place}; ", str(error.value))
    assert str(error.value).endswith(f"continue with --resume {own / 'run' / 'warmup.safetensors'}")
    assert error.value.__cause__ is not None


def test_an_error_of_our_own_is_no_credits(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("trajkern.trainer.train.update", broken)
    with pytest.raises(KeyError, match="ours"):
        train(config(steps=1))


@pytest.mark.parametrize("mode", [[], ["-X", "dev"]])
def test_the_command_says_it_in_a_line_and_in_development_mode_shows_the_traceback(own: Path, mode: list[str]) -> None:
    flags = "--steps 1 --prompts 4 --rollouts 2 --questions 100 --warmup.steps 0 --eval.heldout 2 --eval.validation 2"
    small = "--tiny.layers 1 --tiny.width 32 --tiny.heads 2 --tiny.ffn 64 --threads 1 --out run"
    command = [sys.executable, *mode, "-m", "trajkern", "train", *flags.split(), *small.split()]
    command += ["--credit", "own_credits:of_key"]
    done = subprocess.run(command, cwd=own, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert done.returncode == 1 and lines[-1].startswith("trajkern train: credit own_credits:of_key raised KeyError")
    assert (len(lines) > 5 and "Traceback (most recent call last):" in lines) == bool(mode)


def test_what_a_credits_function_returns_is_refused_in_a_line(
    own: Path, monkeypatch: pytest.MonkeyPatch, config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(credit="own_credits:of_none", steps=1)
    monkeypatch.setattr("trajkern.trainer.config.parse", lambda argv: made)
    assert cli_main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    words = "trajkern train: the result of own_credits:none must be a tensor, got None (NoneType)"
    stands = f"the last checkpoint stands: continue with --resume {own / 'run' / 'warmup.safetensors'}"
    assert line == f"{words}; {stands}"


@pytest.mark.parametrize(
    ("name", "raised"), [("own_broken:spec", "KeyError: 'at import'"), ("own_leaving:spec", "SystemExit: 4")]
)
def test_a_module_that_fails_is_none(own: Path, name: str, raised: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}': to import it raised {re.escape(raised)}$"):
        credit.load(name)


class Sums(Task):
    """Returns what it is told to."""

    def __init__(self, **returned: Any) -> None:
        super().__init__("sums")
        self.returned = {"questions": iter([QUESTION]), "read": Answer(True)} | returned

    def questions(self, split: int) -> Any:
        return self.returned["questions"]

    def read(self, question: Question, text: str) -> Any:
        return self.returned["read"]

    def reward(self, question: Question, text: str) -> Any:
        return self.returned.get("reward", super().reward(question, text))

    def reply(self, question: Question, text: str) -> Any:
        return self.returned.get("reply")

    def pieces(self, question: Question) -> Any:
        return self.returned.get("pieces", super().pieces(question))

    def statistics(self, questions: Any, texts: Any) -> Any:
        return self.returned.get("statistics", {})

    def identity(self, question: Question) -> Any:
        return self.returned.get("identity", "1+1")


def asked(task: Task) -> dict[str, Any]:
    return {
        "questions": list(task.questions(0)),
        "read": task.read(QUESTION, "2"),
        "reward": task.reward(QUESTION, "2"),
        "reply": task.reply(QUESTION, "2"),
        "pieces": task.pieces(QUESTION),
        "statistics": task.statistics([QUESTION], ["2"]),
        "identity": task.identity(QUESTION),
    }


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("reward", 0.5),
        ("reward", np.float32(0.5)),
        ("reward", torch.tensor(0.5)),
        ("reward", True),
        ("read", Answer(np.bool_(True), np.float64(0.5), False)),
        ("read", Answer(0.5)),
        ("reply", Reply("yes", True)),
        ("pieces", [("a", True), ("b", False)]),
        ("statistics", {"of none": float("nan"), "one": np.int64(1)}),
    ],
)
def test_what_a_task_may_return_is_as_it_was(method: str, value: Any) -> None:
    plain, found = asked(Sums(**{method: value})), asked(checked(Sums(**{method: value})))
    assert str(found.pop("statistics")) == str({k: float(x) for k, x in plain.pop("statistics").items()})
    assert found == plain


@pytest.mark.parametrize(
    ("method", "value", "kind"),
    [
        ("questions", None, TypeError),
        ("questions", [("1+1=", "2")], TypeError),
        ("questions", [Question(1, "1+1", "2", {})], TypeError),  # type: ignore[arg-type]
        ("questions", [Question("1+1=", "1+1", "2", [])], TypeError),  # type: ignore[arg-type]
        ("read", None, TypeError),
        ("read", True, TypeError),
        ("read", Answer("no"), TypeError),  # type: ignore[arg-type]
        ("read", Answer(float("nan")), ValueError),  # type: ignore[arg-type]
        ("read", Answer(True, 1.5), ValueError),
        ("read", Answer(True, float("nan")), ValueError),
        ("reward", None, TypeError),
        ("reward", "1.0", TypeError),
        ("reward", torch.ones(2), TypeError),
        ("reward", float("nan"), ValueError),
        ("reward", 1e300, ValueError),
        ("reward", 10**400, ValueError),
        ("reply", "yes", TypeError),
        ("pieces", None, TypeError),
        ("pieces", ["2"], TypeError),
        ("pieces", [(2, True)], TypeError),
        ("statistics", None, TypeError),
        ("statistics", {"x": torch.ones(2)}, TypeError),
        ("identity", [1], TypeError),
    ],
)
def test_what_a_task_must_not_return_is_refused_by_the_methods_name(method: str, value: Any, kind: type) -> None:
    with pytest.raises(kind, match=rf"^Sums\.{method}"):
        asked(checked(Sums(**{method: value})))


@pytest.mark.parametrize("flags", [[True, False], (1, 0), torch.tensor([True, False]), np.array([1.0, 0.0])])
def test_a_rubrics_flags(flags: Any) -> None:
    assert flags_of("own:rubric", flags, 2) == [True, False]
    assert flags_of("own:rubric", (x for x in flags), 2) == [True, False]


@pytest.mark.parametrize("flags", [None, [True], ["no", "no"], [float("nan")] * 2, torch.ones(2, 2), [None, True]])
def test_what_is_no_flag_of_a_rubric(flags: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="^compose.rubric own:rubric"):
        flags_of("own:rubric", flags, 2)
