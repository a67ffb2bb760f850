"""Every exception of the package outlives a copy and another process: its words, its attributes and its type."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import trajkern
from trajkern.integrations import engines
from trajkern.testing.ptx.faults import Place

PACKAGE = Path(trajkern.__path__[0])
PLACE = Place("ld.global.f32", "head.py:3", (1, 0, 0), (0, 0, 0))
ARGUMENTS: dict[str, list[tuple[Any, ...]]] = {  # of those that have an __init__ of their own
    "BadAccess": [("reads byte 3", 5), ("reads byte 3", 5, 4096)],
    "EngineFailure": [({0: [1, 2]}, {1: OSError("down"), 2: KeyError("x")})],
    "Interrupted": [(Path("runs/a"), int(signal.SIGTERM))],
    "KernelFault": [("kernel", "reads where no tensor is"), ("kernel", "races", (PLACE, PLACE), 4096)],
    "Parted": [("tokens", 3, 4)],
}


def _classes() -> list[type[BaseException]]:
    """By their sources: whose base is an exception of Python's, or one of these."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE / "_bench").glob("*.py")]):
        module = ".".join(["trajkern", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        for x in ast.walk(ast.parse(path.read_text())):
            if isinstance(x, ast.ClassDef):
                found[module, x.name] = [ast.unparse(base).split(".")[-1] for base in x.bases]

    def is_one(name: str) -> bool:
        own = getattr(builtins, name, None)
        if isinstance(own, type):
            return issubclass(own, BaseException)
        return any(is_one(base) for (_, x), bases in found.items() if x == name for base in bases)

    ours = {x for x, bases in found.items() if any(map(is_one, bases))}
    return [getattr(importlib.import_module(module), name) for module, name in sorted(ours)]


CASES = [(x, given) for x in _classes() for given in ARGUMENTS.get(x.__name__, [(f"{x.__name__}'s words",)])]
WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": lambda x, n=n: pickle.loads(pickle.dumps(x, n)) for n in (0, pickle.HIGHEST_PROTOCOL)},
}


def _told(x: Any) -> Any:
    """An exception as what two of one content have alike."""
    if isinstance(x, BaseException):
        return type(x), str(x), {name: _told(y) for name, y in vars(x).items()}
    return {name: _told(y) for name, y in x.items()} if isinstance(x, dict) else x


def test_each_with_an_init_has_its_arguments_here() -> None:
    own = {x.__name__ for x in _classes() if "__init__" in vars(x)}
    assert own == set(ARGUMENTS) and len(_classes()) > len(own)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("kind", "given"), CASES, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_it_is_the_same_again(kind: type[BaseException], given: tuple[Any, ...], way: str) -> None:
    raised = kind(*given)
    raised.add_note("while testing")
    again = WAYS[way](raised)
    assert _told(again) == _told(raised) and (again is not raised)
    assert all(type(x) is type(y) for x, y in zip(vars(again).values(), vars(raised).values(), strict=True))


class Odd(Exception):
    """As many a client's: what it is made of are not its arguments."""

    def __init__(self, *, status: int) -> None:
        super().__init__(f"status {status}")


def _collect() -> list[int]:
    def ask(request: int) -> int:
        if request:
            raise Odd(status=500) if request == 1 else ConnectionError("down")
        return 7

    return engines.collect(ask, [0, 1, 2])


def test_what_came_crosses_a_process_whatever_the_failures_are() -> None:
    with pytest.raises(engines.EngineFailure) as here:
        _collect()
    assert copy.copy(here.value).failures == here.value.failures
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(engines.EngineFailure, match="2 of 3 requests failed") as there:
            pool.submit(_collect).result(timeout=120)
        assert there.value.finished == {0: 7}
        assert [repr(x) for x in there.value.failures.values()] == [
            "RuntimeError('Odd: status 500')",
            "ConnectionError('down')",
        ]
        assert pool.submit(abs, -1).result(timeout=120) == 1
