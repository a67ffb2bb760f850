"""What surrounds a command line: its terminal, its outputs, its folder, and what stands where a file is named."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.attack.case import Case
from tests.attack.command import Misbehaved, no_work
from trajkern import cli

SECONDS = 60  # after which a command hangs
QUICK = ("validate", "--op", "spread", "--dtype", "float32", "--intensity", "0")
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def cases() -> Iterator[Case]:
    for part in (_of_terminals, _of_outputs, _of_places, _of_readers, _of_writers, _of_toml, _of_results):
        yield from part()


def run(argv: tuple[str, ...], around: Callable[[], Any] | None = None, lines: int | None = 1) -> str:
    """What a command prints in a process of its own, in which ``around`` is called first; ValueError with its words
    where it refuses, in as many lines (None: any)."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        if not (child := os.fork()):
            status: Any = 70
            try:
                status = _in_child(argv, around, out.fileno(), err.fileno())
            finally:
                os._exit(status if isinstance(status, int) else 71)
        status = _waited(child)
        out.seek(0), err.seek(0)
        words = err.read().decode(errors="backslashreplace")
        if status not in (0, 1, 2, 141) or "Traceback" in words:
            raise Misbehaved(f"exit status {status}: {words[-300:]}")
        if status in (1, 2) and words and lines is not None and len(words.splitlines()) != lines:
            raise Misbehaved(f"{len(words.splitlines())} lines: {words[:300]}")
        if status:
            raise ValueError(words)
        return out.read().decode(errors="backslashreplace")


def _in_child(argv: tuple[str, ...], around: Callable[[], Any] | None, out: int, err: int) -> Any:
    signal.alarm(0)
    os.chdir(_elsewhere())
    os.dup2(out, 1), os.dup2(err, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)
    status: Any = 0  # of a run that is cut short where its work begins
    try:
        with no_work():
            if around:
                around()
            status = cli.main(list(argv))
    except SystemExit as left:
        status = left.code or 0
    except BaseException:
        os.write(err, traceback.format_exc().encode(errors="backslashreplace"))
        raise
    for file in (sys.stdout, sys.stderr):
        if file is not None:
            try:
                file.flush()  # as the interpreter does at its end
            except OSError:
                return 120
    return status


@cache
def _elsewhere() -> str:
    """Where names without a folder are looked for, and made."""
    return tempfile.mkdtemp(prefix="attack-")


def _waited(child: int) -> int:
    until = time.monotonic() + SECONDS
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise Misbehaved(f"no end after {SECONDS} s")
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def _of_terminals() -> Iterator[Case]:
    asked = [("--help",), ("info",), ("train", "--help"), ("train", "--help", "loss"), ("train", "--help-all")]
    asked += [("bench", "--help"), ("validate", "--help")]
    for columns in ("0", "1", "2", "3", "5", "39", "80", "1000", "-1", "x", "", "9" * 30):
        around = partial(os.environ.__setitem__, "COLUMNS", columns)
        for argv in asked:
            call = partial(run, argv, around)
            yield Case(_name(argv), f"{' '.join(argv)} in COLUMNS={columns}", call, (), may_pass=True, heavy=True)
        for argv in (("train", "--steps=x"), ("train", "--nothing")):
            call = partial(run, argv, around, None)
            yield Case(_name(argv), f"{' '.join(argv)} in COLUMNS={columns}", call, (argv[1][2:].split("=")[0],))


def _closed(*numbers: int) -> None:
    """As the interpreter begins without these."""
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def _full(number: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def _ascii(*_: Any) -> None:
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="ascii", errors="strict")
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), encoding="ascii", errors="backslashreplace")


def _of_outputs() -> Iterator[Case]:
    around: dict[str, Callable[[], Any]] = {
        "a closed stdin": partial(_closed, 0),
        "a closed stdout": partial(_closed, 1),
        "a closed stderr": partial(_closed, 2),
        "nothing open": partial(_closed, 0, 1, 2),
        "a full stdout": partial(_full, 1),
        "a full stderr": partial(_full, 2),
        "an output of ASCII": _ascii,
    }
    report = next(iter(sorted(RESULTS.glob("*/*.json"))))
    asked = [("--help",), ("info",), ("train", "--help"), ("bench", "--help"), QUICK, ("bench", "--load", str(report))]
    wrong = [("nothing",), ("train", "--steps=x"), ("train", "--recipe", "é\udcff"), ("bench", "--load", "é\udcff")]
    for (name, how), argv in itertools.product(around.items(), asked):
        named = ("No space left",) if name == "a full stdout" else ()
        yield Case(
            _name(argv), f"{argv[-1][-20:]} with {name}", partial(run, argv, how), named, may_pass=True, heavy=True
        )
    for (name, how), argv in itertools.product(around.items(), wrong):
        quiet = name in ("a closed stderr", "nothing open", "a full stderr")
        named = ("",) if quiet else ("nothing", "steps", "recipe", "--load")
        yield Case(_name(argv), f"{argv[-1]!a} with {name}", partial(run, argv, how, None), named, heavy=True)


def _gone() -> None:
    os.chdir(folder := tempfile.mkdtemp(prefix="attack-"))
    os.rmdir(folder)


def _of_places() -> Iterator[Case]:
    around: dict[str, Callable[[], Any]] = {
        "a current folder that is gone": _gone,
        "no HOME": partial(os.environ.pop, "HOME", None),
        "a HOME that is not there": partial(os.environ.__setitem__, "HOME", "/no/such"),
        "a TMPDIR that is not there": partial(os.environ.__setitem__, "TMPDIR", "/no/such"),
        "TERM=dumb": partial(os.environ.__setitem__, "TERM", "dumb"),
        "an empty environment": os.environ.clear,
    }
    report = next(iter(sorted(RESULTS.glob("*/*.json"))))
    asked = [("info",), ("train", "--help"), ("train",), QUICK, ("bench", "--load", str(report)), ("bench",)]
    for (name, how), argv in itertools.product(around.items(), asked):
        yield Case(_name(argv), f"{argv[-1][-20:]} with {name}", partial(run, argv, how), (), may_pass=True, heavy=True)
    for flag in ("--json", "--html", "--markdown"):
        yield Case(
            "trajkern bench", f"{flag} in a folder that is gone", partial(run, ("bench", flag, "x"), _gone), (flag,)
        )
    yield Case(
        "trajkern validate",
        "--json in a folder that is gone",
        partial(run, (*QUICK, "--json", "x"), _gone),
        ("--json",),
    )


@cache
def odd() -> dict[str, str]:
    """What may be named where a file is expected, and is none that can be read whole."""
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    os.mkfifo(folder / "pipe")
    os.symlink(folder / "loop", folder / "loop")
    os.symlink(folder / "nothing", folder / "dangling")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        bound.bind(str(folder / "socket"))
    (folder / "folder").mkdir()
    made = {name: str(folder / name) for name in ("pipe", "loop", "socket", "folder", "dangling")}
    made |= {f"/dev/{name}": f"/dev/{name}" for name in ("zero", "full", "null", "stdin", "tty")}
    made |= {
        "a line's end": f"{folder}/no\nthing",
        "no UTF-8": f"{folder}/\udcff\udcfe",
        "a long name": f"{folder}/{'x' * 300}",
    }
    return made | {"a long path": "/x" * 3000, "home": "~/nothing", "a dash": "-", "/proc/self/mem": "/proc/self/mem"}


def _of_readers() -> Iterator[Case]:
    for name, path in odd().items():
        asked: dict[str, tuple[str, ...]] = {
            "--inputs": ("validate", "--op", "whiten", f"--inputs={path}"),
            "--load": ("bench", f"--load={path}"),
            "--compare": ("bench", "--compare", path if path != "-" else "./-", path if path != "-" else "./-"),
            "config": ("train", f"--config={path}"),
            "checkpoint": ("train", f"--resume={path}"),
            "model": ("train", f"--model={path}"),
            "task": ("train", f"--task={path}.jsonl"),
        }
        for flag, argv in asked.items():
            empty, heavy = name == "/dev/null" and flag == "config", argv[0] == "train"
            yield Case(_name(argv), f"{flag}: {name}", partial(run, argv), (flag,), may_pass=empty, heavy=heavy)


def _of_writers() -> Iterator[Case]:
    report = next(iter(sorted(RESULTS.glob("*/*.json"))))
    for name, path in odd().items():
        asked: dict[str, tuple[str, ...]] = {"--json": (*QUICK, f"--json={path}"), "out": ("train", f"--out={path}")}
        asked |= {flag: ("bench", f"{flag}={path}") for flag in ("--json", "--markdown", "--html", "--png")}
        asked |= {
            f"{flag} of what is loaded": ("bench", "--load", str(report), f"{flag}={path}") for flag in ("--markdown",)
        }
        for flag, argv in asked.items():
            named = (flag.partition(" ")[0], "--png" if flag == "--png" else flag)
            yield Case(_name(argv), f"{flag}: {name}", partial(run, argv), named, may_pass=True, heavy=True)


TOML = {
    "5 MB": b"# " + b"x" * 5_000_000 + b"\nnothing = 1",
    "a long text": b'task = "' + b"x" * 5_000_000 + b'"',
    "many keys": b"".join(b"x%d = 1\n" % n for n in range(100_000)),
    "a byte-order mark": b"\xef\xbb\xbfsteps = -1",
    "UTF-16": "steps = 1".encode("utf-16"),
    "no UTF-8": b'task = "\xff"',
    "a NUL": b'task = "a\0b"',
    "ends of lines of Windows": b"steps = -1\r\nprompts = -1\r\n",
    "nested lists": b"steps = " + b"[" * 50_000,
    "nested tables": b"steps = " + b"{a = " * 50_000,
    "dotted keys": b".".join([b"a"] * 20_000) + b" = 1",
    "a key twice": b"steps = 1\nsteps = 2",
    "a table twice": b"[loss]\n[loss]",
    "many digits": b"steps = " + b"9" * 10_000,
    "a date": b"steps = 1979-05-27T07:32:00Z",
    "a time": b"lr = 07:32:00",
    "a flag as a key": b'"--out" = "x"',
    "a text that is a flag": b'task = "--help"',
    "a text that is another": b'out = "--steps"',
    "tables of tables": b"[[loss]]",
    "an empty key": b'"" = 1',
}


def _of_toml() -> Iterator[Case]:
    for name, content in TOML.items():
        call, passes = partial(_with, content, "train", "--config"), name == "a text that is another"
        yield Case("trajkern train --config", name, call, ("config", "task", "out"), may_pass=passes, heavy=True)


def _with(content: bytes, *argv: str) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return run((*argv, *[file.name] * (2 if argv[-1] == "--compare" else 1)))


def _of_results() -> Iterator[Case]:
    """Results of a benchmark that were edited: each key without its value, and with others."""
    report = json.loads(next(iter(sorted(RESULTS.glob("*/*.json")))).read_text())
    report["cases"] = report["cases"][:2]
    values = itertools.cycle([..., None, 0, -1, "x", [], {}, [1], {"x": 1}, float("nan"), 10**400, True, "\x1b[2J"])
    for flag in ("--load", "--compare"):
        for name, content in (("nested", b"[" * 100_000), ("no UTF-8", b"\xff"), ("many digits", b"9" * 10_000)):
            yield Case("trajkern bench", f"{flag}: {name}", partial(_with, content, "bench", flag), (flag,))
        for path in _places(report):
            for value in itertools.islice(values, 3):
                call = partial(_edited, report, path, value, flag)
                label = f"{flag}: {'.'.join(map(str, path))} = {value!r:.20}"
                yield Case("trajkern bench", label, call, (flag,), may_pass=True, heavy=True)


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of lists the first two items."""
    items = (
        list(data.items()) if isinstance(data, dict) else list(enumerate(data))[:2] if isinstance(data, list) else []
    )
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def _edited(report: Any, path: tuple[Any, ...], value: Any, flag: str) -> str:
    changed = json.loads(json.dumps(report))
    at = changed
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    try:
        return _with(json.dumps(changed).encode(), "bench", flag)
    except ValueError as error:
        if str(error):
            raise
        return ""  # of results that say themselves that they are not whole, or that something is wrong


def _name(argv: tuple[str, ...]) -> str:
    return f"trajkern {argv[0]}" if argv[0] in cli.COMMANDS else "trajkern"
