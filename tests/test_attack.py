"""No hostile call kills the process, gets through in silence or is refused without its name: a sample of them."""

from __future__ import annotations

import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module

import pytest

import trajkern as tk
from tests.attack.__main__ import SURFACES, attacked
from tests.attack.case import Case, outcome
from tests.attack.page import text
from trajkern import bench, credit, recipes, testing

STEPS = {
    "functions": 23,
    "odd": 97,
    "pairs": 97,
    "methods": 29,
    "credit": 11,
    "adapters": 17,
    "structures": 197,
    "command": 29,
    "returned": 71,
}


@pytest.mark.parametrize("surface", SURFACES)
def test_a_sample(surface: str) -> None:
    found = attacked(surface, STEPS[surface], heavy=False)
    assert len(found) > 50
    assert not [x for x in found if x.fault]


@pytest.mark.slow
@pytest.mark.parametrize("surface", SURFACES)
def test_all(surface: str) -> None:
    assert not [x for x in attacked(surface) if x.fault]


def _raise(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "came", "fault"),
    [
        (_raise(ValueError("x must be 1, got 2")), "ValueError", ""),
        (_raise(TypeError("xs must be 1, got 2")), "TypeError", "without the name x"),
        (_raise(RuntimeError("x must be 1")), "RuntimeError", "RuntimeError: x must be 1"),
        (lambda: None, "result", "was accepted"),
    ],
)
def test_what_is_good_enough(call: Callable[[], None], came: str, fault: str) -> None:
    found = outcome(Case("f", "x: 2", call, ("x",)))
    assert found.came == came and fault in found.fault and bool(found.fault) == bool(fault)


def test_a_call_that_kills_is_known_and_passed_over() -> None:
    found = attacked("killed")
    assert [(x.label, x.came) for x in found] == [
        ("first", "result"),
        ("second", "the process died"),
        ("third", "result"),
    ]
    page = text(found, {"killed": "what is killed"})
    assert "| `f` | 3 | 0 | 0 | 2 | 1 |" in page and "3 calls, 1 bad." in page


# what is given back rather than called, and what has no argument
GIVEN = {"Branch", "Credit", "GAE", "HeadInputs", "Reflection", "TokenStats", "TopK", "backends", "compiled"}
GIVEN |= {
    "Function",
    "Spec",
    "Case",
    "Comparison",
    "Difference",
    "Differences",
    "Failure",
    "KernelFault",
    "OpSpec",
    "Result",
    "Results",
    "Variant",
}


def _public() -> Iterator[tuple[str, str]]:
    """(module, name) of everything that users call."""
    for module in (tk, bench, credit, testing):
        yield from ((module.__name__, name) for name in module.__all__ if callable(getattr(module, name)))
    for part in pkgutil.iter_modules(recipes.__path__):
        module = import_module(f"trajkern.recipes.{part.name}")
        own = (x for x in vars(module).values() if inspect.isfunction(x) and x.__module__ == module.__name__)
        if not part.name.startswith("_") and part.name != "trees":  # which credit alone calls
            yield from ((module.__name__, x.__name__) for x in own if not x.__name__.startswith("_"))


def test_nothing_that_users_call_is_left_out() -> None:
    called = {case.name.split("(")[0] for part in ("functions", "methods", "credit") for case in _cases(part)}
    called |= {name.rpartition(".")[2] for name in called}
    assert not [f"{home}.{name}" for home, name in _public() if name not in called | GIVEN]


def _cases(surface: str) -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from import_module(f"tests.attack.{surface}").cases()
