"""The command line: every flag of every subcommand, every key of a TOML file, and files that are none."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args, get_origin

import torch

from tests.attack.case import Case
from trajkern import cli

TEXTS = ("x", "", "1.5", "nan", "1e400", "-1", "9" * 400, "é", "[1]", "{}", "true")
VALUES = ('"x"', "1", "-1", "1.5", "nan", "inf", "1e400", "true", "[]", "[1]", "{}", "{a = 1}", "1979-05-27", '""')


class Misbehaved(Exception):
    pass


def cases() -> Iterator[Case]:
    for part in (_of_names, _of_validate, _of_bench, _of_train, _of_settings):
        yield from part()
    from tests.attack import corrupted, flags, process

    for module in (process, corrupted, flags):
        yield from module.cases()


def run(argv: list[str], *, boxed: bool = False) -> str:
    """What a command prints; a ValueError with its words where it refuses in one line, or in the box of its flags."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(), no_work():
        status: Any = None  # of a run that is cut short where its work begins
        try:
            status = cli.main(argv)
        except SystemExit as left:
            status = left.code
    words = err.getvalue()
    if status in (0, None):
        return out.getvalue()
    if status not in (1, 2) or "Traceback" in words:
        raise Misbehaved(f"exit status {status}: {words[-200:]}")
    if not boxed and len(words.strip().splitlines()) != 1:
        raise Misbehaved(f"{len(words.strip().splitlines())} lines: {words[:200]}")
    raise ValueError(words)


class _Reached(Exception):
    pass


@contextlib.contextmanager
def no_work() -> Iterator[None]:
    """Nothing is drawn, trained or timed: a run that gets as far was accepted."""
    import pytest

    from trajkern.trainer import setup

    def reached(*_: Any) -> None:
        raise _Reached

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(_Reached):
        patch.setattr(setup, "draw_splits", reached)
        patch.setattr("trajkern._bench.__main__.measure", lambda *_: None)
        yield


@cache
def files() -> dict[str, str]:
    """What may stand where a file is expected, by what is wrong with it."""
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    texts = {"text": "hello", "empty": "", "json": "[1, 2]", "toml": "[[[", "header": "\xff" * 40}
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    (folder / "pickle").write_bytes(pickle.dumps({"x": 1}))
    torch.save({"x": torch.ones(2)}, folder / "torch")
    (folder / "long").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    (folder / "folder").mkdir()
    found = {name: str(folder / name) for name in (*texts, "pickle", "torch", "long", "folder")}
    return found | {"missing": str(folder / "no" / "file"), "behind a file": str(folder / "text" / "file")}


def _of_names() -> Iterator[Case]:
    yield Case("trajkern info", "as it should be", partial(run, ["info"]), (), may_pass=True, heavy=True)
    for argv in ([], ["nothing"], [""], ["--nothing"], ["info2"], ["-1"]):
        yield Case("trajkern", f"{argv}", partial(run, argv), ("command", "trajkern"))
    for command in ("info", "validate", "bench", "train"):
        for word in ("--nothing", "nothing", "--nothing=1", "-z"):
            call = partial(run, [command, word], boxed=command == "train")
            yield Case(f"trajkern {command}", word, call, ("nothing", "-z", "z"))


def _of_parser(command: str, parser: argparse.ArgumentParser, legal: dict[str, tuple[str, ...]]) -> Iterator[Case]:
    """Of each flag hostile texts, and for a file what is none; ``legal``: texts that a flag takes."""
    for action in parser._actions:
        flag = action.option_strings[-1] if action.option_strings else action.dest
        if action.dest in ("help", "static", "memory"):
            continue
        texts: tuple[str, ...] = ("yes", "no", "1") if action.nargs == 0 else TEXTS
        if action.type is Path:
            continue  # of which each has rules of its own
        for text in texts:
            if text not in legal.get(action.dest, ()):
                call = partial(run, [*command.split(), f"{flag}={text}"])
                yield Case(f"trajkern {command}", f"{flag}={text[:20]}", call, (flag, action.dest))
        if action.nargs != 0:
            yield Case(
                f"trajkern {command}", f"{flag} without a value", partial(run, [*command.split(), flag]), (flag,)
            )


def _of_validate() -> Iterator[Case]:
    from trajkern.validate import _parser

    quick = ["validate", "--op", "spread", "--dtype", "float32", "--intensity", "0"]
    yield Case("trajkern validate", "as it should be", partial(run, quick), (), may_pass=True)
    yield from _of_parser("validate", _parser(), {})
    for name, path in files().items():
        call = partial(run, ["validate", "--op", "whiten", "--inputs", path])
        yield Case("trajkern validate", f"--inputs: {name}", call, ("--inputs",))
        if name in ("missing", "folder", "behind a file"):
            yield Case("trajkern validate", f"--json: {name}", partial(run, [*quick, "--json", path]), ("--json",))
    for name, arguments in _inputs().items():
        call = partial(run, ["validate", "--op", "whiten", "--inputs", arguments])
        yield Case("trajkern validate", f"--inputs: {name}", call, ("--inputs",))


@cache
def _inputs() -> dict[str, str]:
    """Files of safetensors that hold no arguments of the op."""
    from safetensors.torch import save_file

    folder, x = Path(tempfile.mkdtemp(prefix="attack-")), {"x": torch.ones(3)}
    made: dict[str, tuple[dict[str, torch.Tensor], dict[str, str] | None]] = {
        "nothing": ({}, None),
        "an argument too many": (x | {"y": torch.ones(3)}, None),
        "another op's": ({"logits": torch.ones(2, 3)}, None),
        "of another shape": ({"x": torch.ones(3, 3)}, None),
        "of another dtype": ({"x": torch.ones(3, dtype=torch.int8)}, None),
        "metadata that is no JSON": (x, {"ddof": "{"}),
        "an option of another kind": (x, {"ddof": '"x"'}),
        "a config of another op": (x, {"config": '{"kind": "nothing"}'}),
        "a config that is a number": (x, {"config": "3"}),
        "a tree without a parent": (x | {"tree.nothing": torch.ones(2)}, None),
    }
    for name, (tensors, metadata) in made.items():
        save_file(tensors, folder / name, metadata)
    return {name: str(folder / name) for name in made}


def _of_bench() -> Iterator[Case]:
    from trajkern._bench.__main__ import _parser

    yield from _of_parser("bench", _parser(), {})
    for name, path in files().items():
        yield Case("trajkern bench", f"--load: {name}", partial(run, ["bench", "--load", path]), ("--load",))
        if name in ("missing", "folder", "behind a file"):
            for flag in ("--json", "--markdown", "--html"):
                yield Case("trajkern bench", f"{flag}: {name}", partial(run, ["bench", flag, path]), (flag,))
        if name != "folder":
            yield Case("trajkern bench", f"--png: {name}", partial(run, ["bench", "--png", path]), ("--png", "--html"))
    for form in ("--static", "--memory"):
        for word in ("--nothing", "--nothing=1", "nothing"):
            yield Case(f"trajkern bench {form}", word, partial(run, ["bench", form, word]), ("nothing",))


def _of_train() -> Iterator[Case]:
    """Names and files; numbers are the settings'."""
    for name, path in files().items():
        call = partial(run, ["train", "--config", path])
        passes = name == "empty"  # as if there were none
        yield Case("trajkern train", f"--config: {name}", call, ("config",), may_pass=passes, heavy=passes)
        yield Case("trajkern train", f"--resume: {name}", partial(run, ["train", "--resume", path]), ("checkpoint",))
        yield Case(
            "trajkern train", f"--model: {name}", partial(run, ["train", "--model", path]), ("model",), heavy=True
        )
        call = partial(run, ["train", "--task", f"{path}.jsonl"])
        yield Case("trajkern train", f"--task: {name}.jsonl", call, ("task",), heavy=True)
        if name in ("text", "behind a file"):
            yield Case("trajkern train", f"--out: {name}", partial(run, ["train", "--out", path]), ("out",), heavy=True)
    for flag in ("task", "model", "recipe", "credit", "device", "then.recipe", "compose.gate"):
        for text in ("nothing", "", "no.such:thing", "os:path"):
            argv = ["train", f"--{flag}={text}", *(["--then.steps", "1"] if flag == "then.recipe" else [])]
            yield Case("trajkern train", f"--{flag}={text}", partial(run, argv, boxed=True), (flag,), heavy=True)


def _of_settings() -> Iterator[Case]:
    """Every key of a TOML file with values of other kinds and out of range, and a number's flag with no number."""
    from trajkern.trainer.config import _TABLES, TrainConfig
    from trajkern.trainer.schema import hints_of

    tables: dict[str, type] = {"": TrainConfig} | {name: make for name, make in _TABLES.items()}
    for table, kind in tables.items():
        for key, hint in hints_of(kind).items():
            if key in _TABLES:
                continue
            name = f"{table}.{key}" if table else key
            for value in VALUES:
                if not _takes(hint, value):
                    yield Case(
                        "trajkern train --config", f"{name} = {value}", partial(_toml, table, key, value), (name,)
                    )
            if _number(hint):
                call = partial(run, ["train", f"--{name.replace('_', '-')}=x"], boxed=True)
                yield Case("trajkern train", f"--{name}=x", call, (f"--{name.replace('_', '-')}",), heavy=True)
    for text in ("nothing = 1", "[nothing]\nx = 1", "[loss]\nnothing = 1", "steps = 1\nsteps = 2", "= 1"):
        yield Case("trajkern train --config", repr(text), partial(_written, text), ("config",))


def _toml(table: str, key: str, value: str) -> str:
    return _written(f"[{table}]\n{key} = {value}" if table else f"{key} = {value}")


def _written(text: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(text)
        file.flush()
        return run(["train", "--config", file.name])


def _number(hint: Any) -> bool:
    plain = get_args(hint)[0] if get_origin(hint) is not None and get_args(hint) else hint
    plain = get_args(plain)[0] if get_args(plain) else plain
    return plain in (int, float)


def _takes(hint: Any, value: str) -> bool:
    """Whether a setting may have the value, or is refused by what comes after the file."""
    from trajkern.trainer.schema import conform

    known = {"nan": float("nan"), "inf": float("inf"), "1e400": float("inf"), "true": True, "{a = 1}": {"a": 1}}
    if value == "1979-05-27":
        return False
    parsed = known[value] if value in known else json.loads(value)
    try:
        conform("x", parsed, hint)
    except (TypeError, ValueError):
        return False
    return True
