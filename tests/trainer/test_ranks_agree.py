"""Ranks of one head, of which each asks a task that does not say the same twice, go on with what the first was told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.test_ranks import TINY, launch, lines, path_with
from trajkern.trainer.returned import agreed, ask, sharing
from trajkern.trainer.tasks import Answer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="torchrun and gloo as on Linux")

FICKLE = """
import os, random, torch
from trajkern import credit
from trajkern.trainer.tasks import Answer, Question, Reply, Task

draw = random.Random(os.environ["RANK"])

class Fickle(Task):
    demonstrations = 50
    interactive = True
    def questions(self, split):
        for i in range(1000):
            yield Question(f"{split} {i}>", f"{split} {i}>", str(i % 10), {"a": i % 10})
    def read(self, question, text):
        return Answer(draw.random() < 0.3)
    def reply(self, question, text):
        return Reply("=" * draw.randint(1, 3), draw.random() < 0.5)

def rubric(questions, texts):
    return [draw.random() < 0.7 for _ in texts]

def style(rollouts):
    return torch.tensor([draw.random() for _ in rollouts.texts])

SPEC = credit.outcome() + 0.5 * credit.outcome(style)
"""
SIZES = (
    "--threads 1 --steps 3 --prompts 4 --rollouts 4 --eval.heldout 4 --eval.validation 4 --eval.samples 2 --max-new 4"
)
BAND = "--warmup.steps 30 --warmup.check-every 1 --warmup.batch 4 --warmup.pass-at-1 0.3 --warmup.pass-at-k 0.3"


@pytest.mark.parametrize("kept", ["--drop-equal", "--no-drop-equal"])
def test_one_answer_for_all_ranks_of_a_head(kept: str, tmp_path: Path) -> None:
    (tmp_path / "fickle.py").write_text(FICKLE)
    out, own = tmp_path / "run", "--task fickle:Fickle --compose.rubric fickle:rubric --credit fickle:SPEC"
    options = f"{own} {SIZES} {BAND} {TINY} {kept} --tensor-parallel 2".split()
    done = launch(2, out, *options, PYTHONPATH=path_with(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [x["step"] for x in lines(out) if x["phase"] == "main"] == [1, 2, 3]


def test_ranks_that_draw_other_questions_are_refused(tmp_path: Path) -> None:
    """As of a set of texts, whose order is each process's own."""
    changed = FICKLE.replace('(f"{split} {i}>",', '(f"{split} {draw.random()}>",')
    assert changed != FICKLE
    (tmp_path / "fickle.py").write_text(changed)
    done = launch(2, tmp_path / "run", *f"--task fickle:Fickle {SIZES} {TINY}".split(), PYTHONPATH=path_with(tmp_path))
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "task fickle:Fickle must draw the same questions on all ranks, in one order; they differ" in done.stderr


def test_what_is_shared_is_what_was_asked_first() -> None:
    def read(text: str) -> Answer:
        agreed("Task.inner", lambda: 3)
        return Answer(text == "right")

    seen: list[tuple[str, object]] = []

    def first(name: str, value: object) -> object:
        seen.append((name, value))
        return Answer(True)

    with sharing(first):
        assert agreed("Task.read", read, "wrong") == Answer(True)
        assert ask("Task.questions", list, [1]) == [1]
    assert seen == [("Task.read", Answer(False))], "and not what that asked in turn"
    assert agreed("Task.read", read, "wrong") == Answer(False)


def test_tensors_that_one_process_has_are_its_own() -> None:
    from trajkern.trainer.ranks import ALONE

    x = torch.ones(3)
    assert ALONE.head is None and ALONE.tensor_of_head(x) is x
