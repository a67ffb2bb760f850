"""What is called on something made before: methods of the layouts and of the recipes' classes, and trajkern.testing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch

import trajkern as tk
from tests.attack import recipes
from tests.attack.case import GOOD, Case, of_function
from tests.attack.functions import _batch, _spans
from trajkern import bench, testing
from trajkern.recipes import dro, skillrl, toolpo

STATES = [None, 3, "x", [], {}, {"skills": 3}, {"rounds": 1}, {"rounds": -1, "last": []}, {"rounds": 1, "last": 3}]
STATES += [{"skills": [], "failures": 3, "taken": 0}, {"skills": [{}], "failures": [], "taken": 0}]
STATES += [{"skills": [], "failures": [], "taken": "x"}, {"rounds": 1, "last": [[]]}, {"rounds": 1, "last": ["a", "a"]}]
Arguments = Mapping[str, Any]
INDICES = [None, "x", 1.5, [0.5], [True], torch.tensor([0.5]), torch.tensor([True]), torch.zeros(1, 1).long(), {}]
INDICES += [object(), torch.tensor([0], dtype=torch.uint16), torch.tensor([0], dtype=torch.int8), b"a", [[0]], [None]]
MISSING = [2, -3, 2**63, 10**400, [2], [-3], torch.tensor([2]), torch.tensor([-3]), torch.tensor(2**62)]


def _tree() -> tk.Tree:
    return recipes.tree()


def _bank() -> skillrl.SkillBank:
    bank = skillrl.SkillBank()
    bank.add("1 + 1 =", "2", 1.0, "sums")
    bank.add("1 + 2 =", "4", 0.0, "sums")
    return bank


def _round() -> dro.Curriculum:
    curriculum = dro.Curriculum()
    curriculum.next_round(["a", "b"], [True, False])
    return curriculum


def _methods() -> Iterator[tuple[Callable[[], Any], str, Arguments]]:
    """What it is called on, the method, and arguments that it takes."""
    x, flags, leaves = torch.tensor([-1.0, -2.0, -0.5, -3.0]), torch.tensor([True, False, True, True]), torch.ones(2)
    yield _batch, "to_padded", {"x": x, "length": 3, "side": "left", "value": 0.5}
    yield _batch, "padded_index", {"length": 3}
    yield _batch, "concatenate", {"batches": [_batch(), _batch()], "groups": "apart"}
    yield _batch, "tokens_of", {"index": [0]}
    yield _spans, "taken", {"batch": _batch(), "index": [0]}
    yield _tree, "pairs", {"tokens": torch.arange(4), "loss_mask": ~flags}
    yield _tree, "leaf_weights", {"mask": flags, "aggregate": "seq_mean_token_sum_norm", "max_length": 3}
    yield _tree, "along_paths", {"per_node": torch.arange(3)}
    yield _tree, "attention_mask", {"dense": True}
    yield _tree, "pruned", {"leaves": leaves > 0}
    yield tk.PolicyLoss, "published", {"kind": "dapo"}
    yield dro.Curriculum, "next_round", {"prompts": ["a", "b"], "keep": [True, False]}
    yield _bank, "add", {"prompt": "1 + 3 =", "response": "4", "reward": 1.0, "family": "sums"}
    yield _bank, "update", {"family": "sums", "success_rate": 0.1, "general": False}
    yield _bank, "retrieve", {"prompt": "1 + 3 =", "family": "sums", "k": 2, "delta": -1.0, "general": 1}
    yield _bank, "render", {"prompt": "1 + 3 =", "skills": _bank().skills}
    yield partial(testing.spec_of, "whiten"), "case", {"name": testing.spec_of("whiten").cases[0].name}


def _functions() -> Iterator[tuple[Callable[..., Any], Arguments]]:
    spec = testing.spec_of("whiten")
    inputs = spec.inputs(spec.cases[0], torch.float32)
    yield testing.spec_of, {"name": "whiten"}
    yield testing.check, {"function": tk.whiten, "like": "whiten", "cases": [spec.cases[0].name], "intensity": 0}
    yield testing.run, {"spec": spec, "function": tk.whiten, "inputs": inputs}
    yield testing.oracle, {"spec": spec, "inputs": inputs}
    yield testing.errors, {"spec": spec, "function": tk.whiten, "inputs": inputs}
    yield testing.differences, {"spec": spec, "function": tk.whiten, "inputs": inputs}
    share = {"spec": spec, "name": "x", "actual": torch.ones(2), "high": torch.ones(2).double(), "low": torch.ones(2)}
    yield testing.budget_share, share
    yield compare, {"functions": {"mine": lambda **inputs: tk.whiten(**inputs)}, "like": "whiten", "shapes": [(8,)]}
    yield bench.shapes_of, {"like": "whiten"}
    yield use_backend, {"name": "reference"}
    yield action_mask, {"spans": _spans()}
    for kind in (skillrl.SkillBank, dro.Curriculum):
        yield kind, {}


@wraps(bench.compare)
def compare(*args: Any, **kwargs: Any) -> Any:
    """Up to where it measures."""
    with patch("trajkern._bench.compare.measure"):
        return bench.compare(*args, **kwargs)


def use_backend(name: str) -> None:
    with tk.use_backend(name):
        pass


def action_mask(spans: tk.Spans) -> torch.Tensor:
    return toolpo.action_mask(spans)


def cases() -> Iterator[Case]:
    for function, arguments in _functions():
        yield from _of(getattr(function, "__qualname__", ""), lambda function=function: function, arguments)
    for make, method, arguments in _methods():
        bound = getattr(make(), method)
        name = f"{type(make()).__name__}.{method}"
        yield from _of(name, lambda make=make, method=method: getattr(make(), method), arguments, bound)
    for make in (_bank, _round):
        name = f"{type(make()).__name__}.load_state_dict"
        yield Case(name, GOOD, partial(_loaded, make, make().state_dict()), (), may_pass=True)
        for state in STATES:
            yield Case(name, f"state: {state}"[:50], partial(_loaded, make, state), ("state",))
    yield from _of_indices()


def _loaded(make: Callable[[], Any], state: Any) -> None:
    """Into one that must be as it was where the state is refused."""
    kept = make()
    before = kept.state_dict()
    try:
        kept.load_state_dict(state)
    except ValueError:
        assert kept.state_dict() == before
        raise


def _of_indices() -> Iterator[Case]:
    for index in (*INDICES, *MISSING):
        yield Case("PackedBatch.__getitem__", f"{index!r}"[:50], partial(_taken, index), ("index",))


def _taken(index: Any) -> None:
    try:
        _batch()[index]
    except IndexError as error:
        raise ValueError(str(error)) from None


def _of(
    name: str, taken: Callable[[], Callable[..., Any]], arguments: Arguments, like: Callable[..., Any] | None = None
) -> Iterator[Case]:
    """Hostile and odd arguments, of a callable that each call makes anew."""
    like = like or taken()

    def call(**changed: Any) -> Any:
        try:
            return taken()(**changed)
        except IndexError as error:  # as of a list, where a trajectory is not there
            raise ValueError(str(error)) from None

    call.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    yield from of_function(name, call, arguments)
