"""Pairs of flags of a command, drawn by a seed: each with a value that it may have alone, or one that it may not."""

from __future__ import annotations

import argparse
import itertools
import random
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from tests.attack.case import Case
from tests.attack.process import run

SEED = 0
OF_EACH = 2  # draws of a pair of bench's and validate's flags
SETTINGS = 300  # pairs of the trainer's
QUICK = ("validate", "--op", "spread", "--dtype", "float32", "--intensity", "0")
NUMBERS = ("0", "1", "2", "3", "17", "1e-3", "0.5", "1e9", "-1", "nan")


def cases() -> Iterator[Case]:
    from trajkern._bench.__main__ import _parser as of_bench
    from trajkern.validate import _parser as of_validate

    draw = random.Random(SEED)
    for base, parser in ((("bench",), of_bench()), (QUICK, of_validate())):
        for one, two in itertools.combinations(_actions(parser), 2):
            for _ in range(OF_EACH):
                words = (*_given(one, draw), *_given(two, draw))
                yield _case(f"trajkern {base[0]}", (*base, *words), (one.option_strings[-1], two.option_strings[-1]))
    names = sorted(_settings())
    for _ in range(SETTINGS):
        chosen = draw.sample(names, 2)
        words = tuple(f"--{name.replace('_', '-')}={_value(_settings()[name], draw)}" for name in chosen)
        yield _case(
            "trajkern train",
            ("train", *words),
            tuple(n for x in chosen for n in (x, x.replace("_", "-"), x.rpartition(".")[2], x.partition(".")[0])),
        )


def _case(command: str, argv: tuple[str, ...], named: tuple[str, ...]) -> Case:
    call = partial(run, argv, _nothing_is_tried, None if argv[0] == "train" else 1)
    return Case(
        command,
        " ".join(argv)[-70:],
        call,
        (*named, "--help lists", "so that nothing was tried"),
        may_pass=True,
        heavy=True,
    )


def _nothing_is_tried() -> None:
    """Of validate's cases; bench and train begin none of their work."""
    from trajkern import validate

    validate.validate = lambda *_: iter(())
    validate._run_compiled = lambda _: []


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [x for x in parser._actions if x.option_strings and x.dest not in ("help", "static", "memory", "peers")]


def _given(action: argparse.Action, draw: random.Random) -> tuple[str, ...]:
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return (flag,)
    values: Sequence[Any] = list(action.choices or ()) or NUMBERS
    if action.type is Path:
        values = [_folder(), f"{_folder()}/new", f"{_folder()}/no/file", "/dev/null", "/dev/full"]
    if action.dest == "shape":
        values = ["4,8,16", "4", "0,0,0", "-1,2,3", "9" * 30 + ",1,1", "1,1,1,1,1"]
    count = action.nargs if isinstance(action.nargs, int) else 1
    return (flag, *(str(draw.choice(values)) for _ in range(count)))


@cache
def _folder() -> str:
    return tempfile.mkdtemp(prefix="attack-")


@cache
def _settings() -> dict[str, Any]:
    """The trainer's, but for files and switches."""
    from trajkern.trainer.config import _TABLES, TrainConfig
    from trajkern.trainer.schema import hints_of

    found = {name: hint for name, hint in hints_of(TrainConfig).items() if name not in _TABLES}
    for table, kind in _TABLES.items():
        found |= {f"{table}.{name}": hint for name, hint in hints_of(kind).items()}
    return {name: hint for name, hint in found.items() if "Path" not in str(hint) and "bool" not in str(hint)}


def _value(hint: Any, draw: random.Random) -> str:
    from typing import Literal, get_args, get_origin

    parts = [x for part in (hint, *get_args(hint)) if get_origin(part) is Literal for x in get_args(part)]
    return str(draw.choice(parts or NUMBERS))
