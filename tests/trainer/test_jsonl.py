"""Tasks of one's own: a file of lines, a class by name; what is read, how it is split, and what is refused."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trajkern.trainer import cli_main
from trajkern.trainer import train as training
from trajkern.trainer.checkpoint import load
from trajkern.trainer.compose import Compose
from trajkern.trainer.config import Evaluation, TrainConfig, WarmUp
from trajkern.trainer.folder import Folder
from trajkern.trainer.models.tokenizer import ALPHABET
from trajkern.trainer.tasks import (
    Action,
    ActionTask,
    Answer,
    FamilyTask,
    HintTask,
    JsonlTask,
    Question,
    ReferenceTask,
    Task,
    load_task,
)
from trajkern.trainer.tasks.verifiers import load_verifier, problem

BRIEF = WarmUp(steps=2, batch=4)
EVAL = Evaluation(heldout=4, validation=4, samples=2, every=1)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes these rows, or lines as they are, and returns the file's name."""

    def make(rows: list, name: str = "rows.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return make


def sums(count: int = 120, **columns) -> list[dict]:
    return [{"prompt": f"{n}+1=", "answer": str(n + 1)} | columns for n in range(count)]


@pytest.mark.parametrize(
    ("verifier", "answer", "right", "wrong"),
    [
        ("exact", " 4 2", ["4 2", "\n4 2 "], ["42", "4 2.", ""]),
        ("number", "1234.5", ["so 1,234.50.", "1 + 2 = 1234.5"], ["1234", "1234.5 or 7", "", "12345", "-1234.5"]),
        ("number", "-5", ["x = -5", "\N{MINUS SIGN}5", "0 -5.0"], ["10-5", "5", "-5%3"]),
        ("number", "2345", ["1,2345", "2,345"], ["12,345"]),
        ("regex", "a+b|c", ["aab", " c\n"], ["ab c", "", "abc"]),
        ("last_line", "7", ["3+4\n7", "7 \n\n", "7"], ["7\n3", "= 7", ""]),
    ],
)
def test_verifiers(verifier: str, answer: str, right: list[str], wrong: list[str]) -> None:
    check = load_verifier(verifier)
    assert all(check({"answer": answer}, text).correct for text in right)
    assert not any(check({"answer": answer}, text).correct for text in wrong)
    assert problem(verifier, answer) is None


def shorter(row: dict, text: str) -> bool:
    return len(text) < row["data"]["most"]


def lukewarm(row: dict, text: str) -> float:
    return 0.5


def unsure(row: dict, text: str) -> Answer:
    return Answer(True, 0.5)


def test_a_verifier_of_one_s_own(write: Callable[..., str]) -> None:
    rows = [{"prompt": "say a little:", "verifier": f"{__name__}:shorter", "data": {"most": 3}}]
    task = load_task(write([*rows, {"prompt": "hm", "verifier": f"{__name__}:unsure"}]))
    short, other = sorted((q for split in range(3) for q in task.questions(split)), key=lambda q: -len(q.prompt))
    assert (task.reward(short, "ab"), task.reward(short, "abc")) == (1.0, 0.0)
    assert task.read(other, "") == Answer(True, 0.5) and short.answer == ""
    with pytest.raises(ValueError, match=r"verifier .*:lukewarm must return a bool or an Answer, got 0.5"):
        load_verifier(f"{__name__}:lukewarm")({}, "text")


def test_splits_are_by_the_prompt_s_hash(write: Callable[..., str]) -> None:
    name, rows = write(sums(1000)), sums(1000)
    first, other = load_task(name), load_task(name, seed=1)
    sizes = [len(list(first.questions(split))) for split in range(4)]
    assert sum(sizes[:3]) == 1000 and sizes[2] == sizes[3]
    assert all(abs(size - share) < 40 for size, share in zip(sizes[:3], (100, 100, 800), strict=True))
    for split in (0, 1):
        assert list(first.questions(split)) == list(other.questions(split))
    assert list(first.questions(2)) != list(other.questions(2))
    assert {q.prompt for q in first.questions(2)} == {q.prompt for q in other.questions(2)}
    held = {q.prompt for q in first.questions(0)}
    fewer = load_task(write(list(reversed(rows[:500])), "fewer.jsonl"))
    assert {q.prompt for q in fewer.questions(0)} == held & {row["prompt"] for row in rows[:500]}
    splits = first.splits(heldout=20, validation=10, demonstrations=30, train=50)
    assert [len(part) for part in (splits.heldout, splits.validation, splits.demonstrations, splits.train)] == [
        20,
        10,
        30,
        50,
    ]
    assert not {q.prompt for q in splits.train + splits.demonstrations} & (held | {q.prompt for q in splits.validation})
    assert len(first.splits(heldout=0, validation=0, demonstrations=None, train=10**6).demonstrations) == sizes[2]


def test_a_file_too_small_for_a_split_is_refused_with_the_numbers(write: Callable[..., str]) -> None:
    task = load_task(write(sums(100)))
    held, validating, training = (len(list(task.questions(split))) for split in range(3))
    expected = (
        f"eval.heldout must be at most {held}, got 512; warmup.demonstrations must be at most {training}, got 99: the "
        f"prompts of {task.name} are 100: {held} held out, {validating} for validation, {training} for training"
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        task.splits(heldout=512, validation=validating, demonstrations=99, train=1)


def test_capabilities_are_columns(write: Callable[..., str]) -> None:
    rows = sums(6, family="sum", reference="add\n{}", verifier="last_line")
    for row in rows:
        row["reference"] = f"add\n{row['answer']}"
    rows[0] |= {"hint": "one more", "actions": ["inc", "dec"], "answer": "1"}
    rows[1]["hint"] = None  # as none
    task = load_task(write(rows))
    questions = {q.prompt: q for split in range(3) for q in task.questions(split)}
    one, two = questions["0+1="], questions["1+1="]
    assert isinstance(task, HintTask) and (task.hint(one, ""), task.hint(two, "")) == ("one more", None)
    assert isinstance(task, FamilyTask) and task.family(one) == "sum"
    assert isinstance(task, ReferenceTask) and task.reference(one) == one.answer == "add\n1"
    text = "<tool>dec</tool>,<tool>dec</tool> <tool>x</tool>"
    spans = [Action(0, 16, True), Action(17, 33, False), Action(34, 48, False)]
    assert isinstance(task, ActionTask) and task.action_spans(one, text) == spans
    assert [action.right for action in task.action_spans(two, text)] == [False] * 3
    plain = load_task(write(sums(6), "plain.jsonl"))
    assert not isinstance(plain, (HintTask, FamilyTask, ReferenceTask, ActionTask))


GOOD = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'prompt': 'a'}", r"expected a JSON object in UTF-8; got b\"\{'prompt': 'a'\}\" \(Expecting property name"),
        (b'{"prompt": "a\xff"}', r"expected a JSON object in UTF-8; got .*can't decode byte 0xff"),
        (b'{"prompt": "\\ud800"}', r"expected a JSON object in UTF-8; got .*surrogates not allowed"),
        (b'{"prompt": "x", "prompt": "y"}', r"expected a JSON object in UTF-8; got .*a name occurs twice"),
        (["a"], r"expected a JSON object; got \['a'\]"),
        ({}, "expected a prompt; got only an empty object"),
        ({"answer": "b"}, "expected a prompt; got only answer"),
        ({"prompt": " "}, "expected prompt to be a string that is not blank; got ' '"),
        ({"prompt": "x", "answer": 42}, "expected answer to be a string that is not blank; got 42"),
        ({"prompt": "x", "answer": "y", "hints": "z"}, "expected the columns prompt, answer, .*; got 'hints'"),
        ({"prompt": "x", "answer": "y", "actions": "z"}, "expected actions to be a list of strings that .*; got 'z'"),
        ({"prompt": "x", "answer": "y", "actions": [""]}, r"expected actions to be a list of strings .*; got \[''\]"),
        (GOOD, "expected a new prompt; got that of line 1"),
        ({"prompt": "x"}, "expected an answer for the verifier 'exact', got none"),
        (
            {"prompt": "x", "answer": "y", "verifier": "fuzzy"},
            "verifier must be one of exact, number, regex, last_line",
        ),
        ({"prompt": "x", "answer": "y", "verifier": "json:at_all"}, "verifier must be one of exact.*'json:at_all'"),
        ({"prompt": "x", "answer": "y", "verifier": "json:codecs"}, "verifier must be one of exact.*is <module"),
        ({"prompt": "x", "answer": "$4", "verifier": "number"}, "expected an answer that is a number, got '\\$4'"),
        ({"prompt": "x", "answer": "(", "verifier": "regex"}, r"expected an answer that is a regular .*, got '\('"),
        (
            {"prompt": "x", "answer": "a{1,99999999999}", "verifier": "regex"},
            r"expected an answer that is a regular .*, got 'a\{1,9+\}': the repetition number is too large",
        ),
        (
            {"prompt": "x", "answer": "(" * 5000 + ")" * 5000, "verifier": "regex"},
            r"expected an answer that is a regular .*, got '\(+\)+': maximum recursion depth",
        ),
        ({"prompt": "x", "answer": "1\n2", "verifier": "last_line"}, "expected an answer of one line"),
        (GOOD | {"prompt": "x", "reference": "c"}, "expected a reference that the verifier 'exact' accepts; got 'c'"),
        (GOOD | {"prompt": "x", "family": "f"}, "rows.jsonl:1: expected family, which other lines have; got none"),
    ],
    ids=str,
)
def test_a_broken_line_is_named_and_nothing_is_trained(
    write: Callable[..., str], config: Callable[..., TrainConfig], line: object, message: str
) -> None:
    name = write([GOOD, b"", line])
    place = "" if message.startswith("rows.jsonl") else re.escape(f"{name}:3: ")
    settings = config(task=name)
    with pytest.raises(ValueError, match=place + message):
        training.train(settings)
    assert not settings.out.exists()


@pytest.mark.parametrize("content", [None, b"", b"\n \n"])
def test_no_file_or_no_lines(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    expected = "a readable .jsonl file; .*No such file" if content is None else ".* a JSON object a line; .* has none"
    with pytest.raises(ValueError, match=f"task must be {expected}"):
        load_task(str(path))


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            sums(prompt="Zoë"),
            {},
            r"rows.jsonl:1: expected characters that the model can spell in prompt; got 'ë' \(U\+00EB",
        ),
        (sums(hint="½"), {}, r"rows.jsonl:1: expected characters that the model can spell in hint; got '½'"),
        (sums(), {"recipe": "dro"}, "task must be one with `reference`.*, for the recipe dro; got '.*rows.jsonl'"),
        (sums(), {"recipe": "delta_belief"}, "task must be one with `belief_target`.*, for the recipe delta_belief"),
        (
            sums(),
            {"recipe": "toolpo"},
            "task must be one with `action_spans` .*column actions.*, for the recipe toolpo",
        ),
        (sums(), {"compose": Compose(hint_weight=0.1)}, "task must be one with `hint`, for compose.hint_weight"),
        (
            sums(),
            {"prompts": 200, "questions": 200},
            r"prompts must be at most \d\d, the questions of '.*rows.jsonl' to train on; got 200",
        ),
        (sums(verifier="regex"), {}, "task must have answers or references to imitate in the warm-up"),
        (sums(verifier="regex"), {"warmup": WarmUp(steps=0)}, "max_new must be given for '.*rows.jsonl'"),
        (sums(verifier="regex"), {"warmup": WarmUp(steps=0), "model": "here"}, "shots must be at most 0.*; got 2"),
    ],
    ids=str,
)
def test_what_a_file_cannot_serve_is_refused(
    write: Callable[..., str],
    config: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rows: list[dict],
    settings: dict,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text("{}")  # of a model that is not read
    rows = rows[:1] if rows[0]["prompt"] == rows[1]["prompt"] else rows
    settings = config(**{"task": write(rows), "eval": EVAL, "warmup": BRIEF, **settings})
    with pytest.raises(ValueError, match=message):
        training.train(settings)
    assert not settings.out.exists()


def test_a_pattern_need_not_be_spelt() -> None:
    task = JsonlTask.__new__(JsonlTask)
    task.name = "here"
    task.rows = [{"prompt": "a", "answer": "[é]", "verifier": "regex", "line": 4}]
    task.check_characters(ALPHABET)
    task.rows[0]["verifier"] = "exact"
    with pytest.raises(ValueError, match="here:4: expected characters that the model can spell in answer; got 'é'"):
        task.check_characters(ALPHABET)


@pytest.mark.parametrize("recipe", ["tree_grpo", "feedback", "dro", "srl", "skillrl"])
def test_a_file_with_every_column_trains(
    write: Callable[..., str], config: Callable[..., TrainConfig], recipe: str
) -> None:
    rows = sums(hint="more", family="sum", actions=["inc"], verifier="last_line")
    rows = [row | {"reference": f"<tool>inc</tool>\n{row['answer']}", "family": row["prompt"][0]} for row in rows]
    settings = {"task": write(rows), "recipe": recipe, "prompts": 4, "steps": 2, "eval": EVAL, "warmup": BRIEF}
    place = load(training.train(config(**settings)).checkpoint).place
    assert place["step"] == 2
    if recipe == "skillrl":
        assert {skill["family"] for skill in place["system"]["skills"]} == set("0123456789")


def test_a_pretrained_model_reads_any_language(
    write: Callable[..., str], config: Callable[..., TrainConfig], make_llama: Callable[..., Path]
) -> None:
    task = write([{"prompt": f"Wieviel ist {n}½?", "answer": f"{n},5 €", "hint": "schätze"} for n in range(60)])
    settings = {"model": str(make_llama()), "prompts": 2, "rollouts": 2, "steps": 1, "eval": EVAL, "max_new": 4}
    warmup = WarmUp(steps=1, batch=2)
    run = training.train(config(task=task, warmup=warmup, compose=Compose(hint_weight=0.1), **settings))
    assert run.steps == 1


def test_a_run_is_not_resumed_on_another_file(write: Callable[..., str], config: Callable[..., TrainConfig]) -> None:
    settings = {"task": write(sums()), "eval": EVAL, "prompts": 4, "warmup": BRIEF}
    checkpoint = training.train(config(steps=1, **settings)).checkpoint
    assert training.train(config("more", steps=2, resume=checkpoint, **settings)).steps == 2
    write(sums(121))
    with pytest.raises(ValueError, match=r"task must be as it was to resume .*; .*rows.jsonl has changed since"):
        training.train(config("other", steps=2, resume=checkpoint, **settings))


class Evens(Task):
    """What a stranger writes, in a language that the built-in model cannot spell."""

    alphabet = None

    def questions(self, split: int):
        for n in range(40):
            yield Question(f"né {split} {n}", f"né {split} {n}", str(2 * n), {})

    def read(self, question, text) -> Answer:
        return Answer(text == question.answer)


class Ascii(Evens):
    alphabet = Task.alphabet


class Unfinished(Task):
    def questions(self, split: int):
        yield from ()


def test_a_class_by_name() -> None:
    task = load_task(f"{__name__}:Evens", seed=4)
    assert isinstance(task, Evens) and (task.name, task.seed) == (f"{__name__}:Evens", 4)
    assert len(task.splits(heldout=3, validation=3, demonstrations=5, train=5).train) == 5
    with pytest.raises(ValueError, match=r"heldout must be at most 0 .*, got 3 \(40 draws have characters outside"):
        load_task(f"{__name__}:Ascii").splits(heldout=3, validation=3, demonstrations=5, train=5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chess", r"task must be one of .*, a .jsonl file or package.module:Class; got 'chess'"),
        ("nowhere:Task", "task must be a class of tasks: .*, got 'nowhere:Task': No module named 'nowhere'"),
        ("json:Task", "task must be a class of tasks: .*, got 'json:Task': module 'json' has no attribute 'Task'"),
        (":Task", "task must be a class of tasks: .*, got ':Task': Empty module name"),
        ("json:dumps", "task must be a subclass of trajkern.trainer.tasks.Task; 'json:dumps' is <function"),
        (f"{__name__}:Unfinished", "task must define read; '.*:Unfinished' does not"),
    ],
)
def test_a_class_that_is_none(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(name)


def test_a_module_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "my_own_tasks.py").write_text(f"from {__name__} import Evens as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
    assert cli_main(["--task", "my_own_tasks:Mine", "--recipe", "dro"]) == 2
    assert "for the recipe dro; got 'my_own_tasks:Mine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "folder"),
    [("data/sums.jsonl", "sums-grpo-seed0"), ("a.b:Mine", "Mine-grpo-seed0"), ("tools", "tools-grpo-seed0")],
)
def test_the_folder_of_results(task: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(Folder.of(TrainConfig(task=task))) as made:
        assert made.path == Path("runs") / folder
