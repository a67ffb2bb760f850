"""What users' code may give back or raise, and of it what may be right."""

from __future__ import annotations

import asyncio
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from trajkern.trainer.tasks import Action, Answer, Belief, Question, Reply, Splits


class Odd(BaseException):
    """No Exception."""


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


class Shy:
    """What cannot be shown, compared or hashed."""

    def __repr__(self) -> str:
        raise KeyError("repr")

    def __eq__(self, other: object) -> bool:
        raise KeyError("eq")

    def __hash__(self) -> int:
        raise KeyError("hash")


class Loud:
    def __repr__(self) -> str:
        return "two\nlines \x1b[31m\u202e"


async def coroutine() -> float:
    return 1.0


def freed(*shape: int) -> torch.Tensor:
    x = torch.ones(shape)
    x.untyped_storage().resize_(0)
    return x


VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "'x'": lambda: "x",
    "3": lambda: 3,
    "-1": lambda: -1,
    "True": lambda: True,
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "400 digits": lambda: 10**400,
    "5000 digits": lambda: 10**5000,
    "1e39": lambda: 1e39,
    "3e38": lambda: 3e38,
    "-8e37": lambda: -8e37,
    "1e-45": lambda: 1e-45,
    "1j": lambda: 1j,
    "a Decimal": lambda: Decimal(1),
    "a Fraction": lambda: Fraction(1, 3),
    "a numpy scalar": lambda: np.float64(0.5),
    "a masked scalar": lambda: np.ma.masked,
    "a tensor of NaN": lambda: torch.full((2,), math.nan),
    "four of 1e38": lambda: torch.full((4,), 1e38),
    "four of -8e37": lambda: torch.full((4,), -8e37).mul_(torch.arange(4) % 2),
    "four of 1e300": lambda: torch.full((4,), 1e300, dtype=torch.float64),
    "four infinities": lambda: torch.full((4,), -math.inf),
    "four of NaN": lambda: torch.full((4,), math.nan),
    "four integers": lambda: torch.arange(4) * 2**60,
    "four flags": lambda: torch.arange(4) > 1,
    "four complex ones": lambda: torch.ones(4, dtype=torch.complex64),
    "four with a gradient": lambda: torch.ones(4, requires_grad=True) * 2,
    "four sparse ones": lambda: torch.ones(4).to_sparse(),
    "four freed ones": lambda: freed(4),
    "four in a column": lambda: torch.ones(4, 1),
    "a meta tensor": lambda: torch.ones((), device="meta"),
    "a freed tensor": lambda: freed(2),
    "a freed scalar": lambda: freed(),
    "[]": lambda: [],
    "()": lambda: (),
    "{}": lambda: {},
    "[None]": lambda: [None],
    "99 zeros": lambda: [0.0] * 99,
    "99 texts": lambda: ["x"] * 99,
    "an array": lambda: np.array([-1.0, -2.0]),
    "a generator": lambda: (x for x in (1.0, 2.0)),
    "no end": lambda: itertools.count(),
    "bytes": lambda: b"x",
    "half a pair": lambda: "\ud800",
    "NUL": lambda: "a\0b",
    "right to left": lambda: "\u202eabc",
    "2,000 characters": lambda: "ab \n" * 500,
    "an object": lambda: object(),
    "a class": lambda: dict,
    "a shy object": lambda: Shy(),
    "a loud object": lambda: Loud(),
    "a list in itself": lambda: (x := [], x.append(x), x)[2],
    "a coroutine": lambda: coroutine(),
    "an error": lambda: KeyError("x"),
    "Answer('x')": lambda: Answer("x"),  # type: ignore[arg-type]
    "Answer(2)": lambda: Answer(2),  # type: ignore[arg-type]
    "Answer(True, 2)": lambda: Answer(True, 2),
    "Answer(True, None, 'no')": lambda: Answer(True, None, "no"),  # type: ignore[arg-type]
    "Reply(None)": lambda: Reply(None),  # type: ignore[arg-type]
    "Reply of half a pair": lambda: Reply("\ud800"),
    "Reply('x', 'no')": lambda: Reply("x", "no"),  # type: ignore[arg-type]
    "Belief(3, 'x')": lambda: Belief(3, "x"),  # type: ignore[arg-type]
    "Belief('', '')": lambda: Belief("", ""),
    "actions that cross": lambda: [Action(0, 2, True), Action(1, 2, True)],
    "an action outside": lambda: [Action(0, 10**9, True)],
    "an action of NaN": lambda: [Action(math.nan, math.nan, True)],  # type: ignore[arg-type]
    "an action that is perhaps right": lambda: [Action(0, 1, 0.5)],  # type: ignore[arg-type]
    "a part outside": lambda: (0, 10**9),
    "a part of floats": lambda: (0.0, 1.0),
    "a gain": lambda: [0.5],
    "an empty question": lambda: Question("", "", "", {}),
    "a question of bytes": lambda: Question(b"x", "x", "x", {}),  # type: ignore[arg-type]
    "a question of half a pair": lambda: Question("x\ud800", "x", "x", {}),
    "Splits of none": lambda: Splits([], [], [], []),
    "Splits of None": lambda: Splits(None, None, None, None),  # type: ignore[arg-type]
    "the trainer's own figure": lambda: {"pass@2": 1.0},
    "a name that is none": lambda: {3: 1.0},
    "a text of a number": lambda: {"x": "1"},
}
# the annotation of what is returned -> of these, what may be right: the run goes on, or ends with the method's name
NUMBERS = ["3", "-1", "True", "a numpy scalar", "a Fraction", "3e38", "-8e37", "1e-45"]
TEXTS = ["'x'", "2,000 characters"]
EMPTY = ["[]", "()"]
RIGHT: dict[str, list[str]] = {
    "float": NUMBERS,
    "bool": ["True"],
    "str": TEXTS,
    "str | None": ["None", *TEXTS],
    "Reply | None": ["None"],
    "Belief | None": ["None"],
    "list[float]": [*EMPTY, "an array", "99 zeros", "four of -8e37"],
    "list[str]": [*EMPTY, "99 texts"],
    "list[bool]": ["four flags"],
    "list[Action]": EMPTY,
    "list[tuple[str, bool]]": EMPTY,
    "list[Question]": [],
    "dict[str, float]": ["{}"],
    "tuple[int, int]": [],
    "Sequence[str]": ["99 texts"],
    "torch.Tensor": ["four of -8e37", "four of NaN", "four flags", "four with a gradient"],
    "Any": [*NUMBERS, *TEXTS, "None", "()", "bytes", "inf", "1e39", "400 digits", "5000 digits", "1j", "a Decimal"],
}
RIGHT["Hashable | None"] = [*RIGHT["Any"], "half a pair", "NUL", "right to left"]
RIGHT["Hashable | None"] += [x for x in VALUES if x.startswith(("Answer(", "Reply", "Belief(", "Splits of None"))]
RIGHT["Hashable | None"] += ["a part outside", "a part of floats"]


def raising(error: Callable[[], BaseException]) -> Callable[[], Any]:
    def give() -> Any:
        raise error()

    return give


def without_end(n: int) -> int:
    return without_end(n + 1) + 1


ERRORS: dict[str, Callable[[], Any]] = {
    "KeyError": raising(lambda: KeyError("x")),
    "StopIteration": raising(StopIteration),
    "GeneratorExit": raising(GeneratorExit),
    "SystemExit(0)": raising(lambda: SystemExit(0)),
    "SystemExit('x')": raising(lambda: SystemExit("x")),
    "RecursionError": lambda: without_end(0),
    "MemoryError": raising(MemoryError),
    "OSError": raising(lambda: FileNotFoundError(2, "no file", "x")),
    "ValueError": raising(lambda: ValueError("two\nlines\x1b[31m")),
    "no words": raising(ValueError),
    "TypeError": raising(lambda: TypeError("x")),
    "ImportError": raising(lambda: ImportError("x")),
    "Mute": raising(Mute),
    "no Exception": raising(lambda: Odd("x")),
    "CancelledError": raising(asyncio.CancelledError),
    "half a pair": raising(lambda: RuntimeError("\ud800")),
    "KeyboardInterrupt": raising(KeyboardInterrupt),
}


def setting(change: Callable[[], Any]) -> Callable[[Any], Any]:
    """Gives what is right, having changed something of the process."""

    def give(right: Any) -> Any:
        change()
        return right

    return give


EFFECTS: dict[str, Callable[[Any], Any]] = {
    "turns gradients off": setting(lambda: torch.set_grad_enabled(False)),
    "computes in float64": setting(lambda: torch.set_default_dtype(torch.float64)),
    "lets go of determinism": setting(lambda: torch.use_deterministic_algorithms(False)),
    "takes threads": setting(lambda: torch.set_num_threads(2)),
    "goes elsewhere": setting(lambda: os.chdir("/")),
}


def _ends_a_child() -> None:
    """As a verifier does that has taken too long."""
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    child.terminate()
    child.join(10)
    if child.exitcode is None:
        child.kill()
        raise RuntimeError("a child outlived SIGTERM")


def _leaves_a_child() -> None:
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(5,), daemon=True).start()


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "closes its output": setting(lambda: sys.stdout.close()),
    "ends a child": setting(_ends_a_child),
    "leaves a child": setting(_leaves_a_child),
}
