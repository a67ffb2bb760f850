"""Credit: the terms, the recipes as expressions, the algebra, the rollouts and what the losses are told."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import trajkern as tk
from tests.attack.case import Case, of_function
from tests.attack.values import CHOICES, NUMBERS, of_other_layouts, shown, without_memory
from trajkern import credit
from trajkern.credit import scored, terms, tree_terms

GROUP = {"baseline": "str", "scale": "str", "ddof": "int", "eps": "float", "singleton": "str"}
VALUES = [None, 3, "x", [1.0, 0.0], np.ones(2), torch.ones(3), torch.ones(2, 1), torch.ones(2, dtype=torch.complex64)]


def _batch() -> tk.PackedBatch:
    mask = torch.tensor([False, True, False, True])
    logprobs, groups = torch.tensor([0.0, -1.0, 0.0, -2.0]), torch.tensor([0, 0])
    rewards, cuts = torch.tensor([1.0, 0.0]), torch.tensor([0, 2, 4])
    return tk.PackedBatch(torch.arange(4), cuts, mask, groups, rewards, logprobs, logprobs, logprobs)


def _spans() -> tk.Spans:
    return tk.Spans(*(torch.tensor(x) for x in ([1, 3], [2, 4], [0, 1], [0, 0])), 4)


def _tree() -> tk.Tree:
    """Of two rollouts that share nothing."""
    return tk.Tree(torch.tensor([-1, -1]), torch.tensor([2, 2]))


def _score(contexts: list[Any], targets: list[Any], *, temperature: float = 1.0, ranks: bool = False) -> Any:
    count = len(targets)
    found = torch.full((count,), -1.0), torch.arange(count + 1)
    return (*found, torch.ones(count, dtype=torch.int64)) if ranks else found


def known() -> dict[str, Any]:
    """All that is known of two rollouts of two tokens."""
    rows = [{"reference": "a", "belief_target": "b", "belief_probe": "c"}] * 2
    rewards = {name: torch.tensor([1.0, 0.0]) for name in ("reward", "confidence", "similarity", "action")}
    return {
        "batch": _batch(),
        "rewards": rewards,
        "spans": {name: _spans() for name in ("call", "reasoning", "turn")},
        "span_rewards": {"call": torch.ones(2), "turn": torch.ones(2)},
        "flags": {"ok": torch.tensor([True, False])},
        "tree": _tree(),
        "texts": ["a", "b"],
        "rows": rows,
        "score": _score,
        "teacher_logprobs": torch.zeros(4),
        "adds_divergences": True,
    }


def _rollouts(**changed: Any) -> credit.Rollouts:
    return credit.Rollouts(**(known() | changed))


def _settings(preset: Callable[..., Any]) -> dict[str, str]:
    """A recipe's settings and what they are."""
    found = {
        x.name: str(x.annotation)
        for x in inspect.signature(preset).parameters.values()
        if x.kind is not inspect.Parameter.VAR_KEYWORD and x.name not in ("kind", "name")
    }
    return {name: kind if kind != str(inspect.Parameter.empty) else "str" for name, kind in found.items()}


def _of_recipes() -> Iterator[Case]:
    asks = {"dro": scored.Reflection, "delta_belief": scored.BeliefGain}
    for name, preset in credit.PRESETS.items():
        kinds = _settings(preset)
        if name in asks:
            kinds |= {x.name: str(x.type) for x in fields(asks[name])}
        if "reward" in kinds:
            kinds["reward"] = "str | None" if name == "delta_belief" else "str"
        yield from of_function(f"credit.recipe({name!r})", _Recipe(name), {}, kinds)
        yield Case(f"credit.recipe({name!r})", "computed", partial(_computed, name), (), may_pass=True)


class _Recipe:
    """``credit.recipe`` of a name, without a signature of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, **settings: Any) -> credit.Spec:
        return credit.recipe(self.name, **settings)


def _computed(name: str) -> credit.Credit:
    return credit.recipe(name)(_rollouts())


def _of_terms() -> Iterator[Case]:
    yield from of_function("credit.outcome", credit.outcome, {}, GROUP)
    yield from of_function("credit.spans", credit.spans, {"name": "call"}, GROUP)
    yield from of_function("credit.directive", credit.directive, {})
    yield from of_function("credit.divergence", credit.divergence, {})
    yield from of_function("credit.load", credit.load, {"name": "tests.attack.credit:known"})
    for text in ("x", ":", "x:", ":x", "trajkern:nothing", "no.such.module:x", "tests.attack.credit:", "..:x"):
        yield Case("credit.load", f"name: {text!r}", partial(credit.load, text), ("name",))
    yield from of_function("credit.recipe", credit.recipe, {"name": "grpo"}, aliases={"name": ("recipe",)})
    for cls in (terms.OfTurns, terms.Signs, tree_terms.OfTree, tree_terms.OfTokens, scored.InReach):
        arguments = {"reward": scored.Reflection()} if cls is scored.InReach else {}
        kinds = {"reward": "str"} if cls is terms.OfTurns else {}
        yield from of_function(f"credit.{cls.__module__.rpartition('.')[2]}.{cls.__name__}", cls, arguments, kinds)


def _of_algebra() -> Iterator[Case]:
    spec = credit.outcome()
    given = {
        "gate": {"flag": "ok"},
        "on": {"span": "call"},
        "only": {"span": "call"},
        "asymmetric": {},
        "whiten": {},
        "clip": {"low": -1.0, "high": 1.0},
        "check": {"names": {"reward"}},
    }
    for name, arguments in given.items():
        lacking = {"names": ("rollouts",)}  # which do not have what the expression needs
        yield from of_function(f"Spec.{name}", getattr(spec, name), arguments, aliases=lacking)
    for x in NUMBERS:
        yield Case("Spec.__mul__", f"factor: {shown(x)}", partial(_times, spec, x), ("factor", "unsupported"))
    for x in (3, "x", None, [spec], torch.ones(2)):
        yield Case("Spec.__add__", f"other: {shown(x)}", partial(_plus, spec, x), ("unsupported", "other"))
    yield from of_function("Spec.__call__", spec, {"rollouts": _rollouts()})
    for need in ("rewards", "flags", "span_rewards", "tree", "rows", "score", "teacher_logprobs"):
        yield Case("Spec.__call__", f"rollouts without {need}", partial(_lacking, need), ("needs",))


def _times(spec: credit.Spec, factor: Any) -> Any:
    return spec * factor


def _plus(spec: credit.Spec, other: Any) -> Any:
    return spec + other


def _lacking(need: str) -> Any:
    """An expression that reads everything, of rollouts that lack something."""
    spec = credit.outcome(within="tree") + credit.spans("call") + credit.recipe("dro") + credit.directive()
    empty: Any = {} if isinstance(known()[need], Mapping) else None
    return spec.gate("ok")(_rollouts(**{need: empty, "texts": None}))


def _tensors(like: Tensor) -> Iterator[tuple[str, Any]]:
    yield from without_memory(like)
    yield from of_other_layouts(like)
    yield from ((shown(x), x) for x in VALUES)


def _of_functions() -> Iterator[Case]:
    """What functions of the rollouts give back."""
    for label, x in _tensors(torch.ones(2)):
        asked = {
            "an outcome's function": lambda x=x: credit.outcome(lambda _: x)(_rollouts()),
            "a span's function": lambda x=x: credit.spans("call", lambda _: x)(_rollouts()),
            "a gate's function": lambda x=x: credit.outcome().gate(lambda _: x)(_rollouts()),
        }
        for what, call in asked.items():
            yield Case("Spec.__call__", f"{what} returns {label}", call, ("the result of",))
        call = lambda x=x: credit.recipe("dro")(_rollouts(score=lambda *_, **__: (x, torch.arange(3))))  # noqa: E731
        yield Case("Spec.__call__", f"score returns log-probs {label}", call, ("the log-probs of score", "score"))
    for label, x in [*_tensors(torch.arange(3)), *((str(v), torch.tensor(v)) for v in ([0, 2**40, 2], [1, 1, 2]))]:
        call = lambda x=x: credit.recipe("dro")(_rollouts(score=lambda *_, **__: (-torch.ones(2), x)))  # noqa: E731
        yield Case("Spec.__call__", f"score returns cu_seqlens {label}", call, ("cu_seqlens",))
    for x in (None, 3, (), (1, 2, 3, 4), [torch.ones(2)]):
        call = lambda x=x: credit.recipe("dro")(_rollouts(score=lambda *_, **__: x))  # noqa: E731
        yield Case("Spec.__call__", f"score returns {shown(x)}", call, ("score",))


def _of_rollouts() -> Iterator[Case]:
    yield from of_function("credit.Rollouts", credit.Rollouts, known())
    for name, entry in (("rewards", torch.ones(2)), ("span_rewards", torch.ones(2)), ("flags", torch.ones(2).bool())):
        for label, x in _tensors(entry):
            if name == "span_rewards" and label == shown(torch.ones(3)):
                continue  # as many as other spans may be
            call = partial(_rollouts, **{name: {**known()[name], "x": x}})
            yield Case("credit.Rollouts", f"{name}['x']: {label}", call, (f"{name}['x']",))
    for x in (*CHOICES, 3):
        call = partial(_rollouts, spans={"call": x})
        yield Case("credit.Rollouts", f"spans['call']: {shown(x)}", call, ("spans['call']",))
    for name in ("rewards", "span_rewards", "flags", "spans"):
        call = partial(_rollouts, **{name: {3: next(iter(known()[name].values()))}})
        yield Case("credit.Rollouts", f"{name} by numbers", call, (name,))
    for name in ("texts", "rows"):
        for x in (["a"], "ab", [1, 2], [None, None], {"a": 1, "b": 2}, torch.ones(2)):
            yield Case("credit.Rollouts", f"{name}: {shown(x)}", partial(_rollouts, **{name: x}), (name,))
    yield from of_function("Rollouts.to", _rollouts().to, {"device": "cpu"}, {"device": "device"})


def _of_credit() -> Iterator[Case]:
    found = credit.outcome()(_rollouts())
    at = torch.tensor([1, 3])
    yield from of_function("Credit.loss_inputs", found.loss_inputs, {"at": at})
    yield from of_function("Credit.tree_inputs", found.tree_inputs, {"config": tk.PolicyLoss(), "at": at})
    yield from of_function("Credit.fits_tree", found.fits_tree, {"config": tk.PolicyLoss()})
    for values in ([4], [-1], [2**40]):
        for name, more in (("loss_inputs", {}), ("tree_inputs", {"config": tk.PolicyLoss()})):
            call = partial(getattr(found, name), at=torch.tensor(values), **more)
            yield Case(f"Credit.{name}", f"at: {values}", call, ("at",))


def cases() -> Iterator[Case]:
    for part in (_of_terms, _of_recipes, _of_algebra, _of_functions, _of_rollouts, _of_credit):
        yield from part()
