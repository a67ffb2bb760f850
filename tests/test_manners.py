"""What the package shows of itself: its parts by attribute, what `dir` and `help` say, what a misspelt name meets."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import pydoc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import trajkern as tk
from trajkern import credit
from trajkern._suggest import did_you_mean

PARTS = ("bench", "credit", "integrations", "recipes", "testing")
NO_RECIPES = {"trees"}  # what the recipes for trees share
BY_ENABLING = ("areal", "liger", "nemo_rl", "openrlhf", "prime_rl", "skyrl", "trl", "verl")


def modules(package: Any) -> set[str]:
    return {x.name for x in pkgutil.iter_modules(package.__path__) if not x.name.startswith("_")}


def test_parts_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys, trajkern as tk\n"
        f"names = {[f'trajkern.{name}' for name in PARTS]}\n"
        "assert not [x for x in names if x in sys.modules]\n"
        "assert set(dir(tk)) > set(tk.__all__) | {x.split('.')[1] for x in names}\n"
        "assert tk.recipes.dro.gate and 'trajkern.recipes.toolpo' not in sys.modules\n"
        "assert tk.integrations.trl.enable and 'trl' not in sys.modules\n"
        "assert tk.credit.outcome and tk.testing.SPECS and tk.bench.compare\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_recipe_and_adapter_is_listed_and_described() -> None:
    for package, listed in (
        (tk.recipes, modules(tk.recipes) - NO_RECIPES),
        (tk.integrations, modules(tk.integrations)),
    ):
        assert listed <= set(dir(package))
        shown = pydoc.plain(pydoc.render_doc(package))
        for name in listed:
            assert f"\n        {name} " in shown, f"{package.__name__} does not say what {name} is"


@pytest.mark.parametrize("name", PARTS[1:])
def test_nothing_else_is_listed(name: str) -> None:
    part = getattr(tk, name)
    public = {x for x in dir(part) if not x.startswith("__")}
    by_module = modules(part) - NO_RECIPES if name in ("recipes", "integrations") else set()
    assert public == {*getattr(part, "__all__", ()), *by_module}
    for attribute in public:
        assert getattr(part, attribute) is not None
    with pytest.raises(AttributeError, match=f"module 'trajkern.{name}' has no attribute 'nothing'"):
        part.nothing  # noqa: B018


# misspelt names


@pytest.mark.parametrize(
    "given, choices, found",
    [
        ("temprature", ("temperature", "targets"), "temperature"),
        ("DAPO", ("dapo", "grpo"), "dapo"),
        ("dr-grpo", ("grpo", "dr_grpo"), "dr_grpo"),
        ("nothing_like_it", ("grpo",), None),
        (3, ("grpo", 3), None),
        ("x" * 10**6, ("x" * 9,), None),
    ],
)
def test_did_you_mean(given: Any, choices: tuple[Any, ...], found: str | None) -> None:
    assert did_you_mean(given, choices) == (f"; did you mean {found!r}?" if found else "")


def options_of(function: Callable[..., Any]) -> list[str]:
    """What may be passed by name, and may be left out."""
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return [x.name for x in found if x.kind in named and (x.default is not x.empty or x.kind is x.KEYWORD_ONLY)]


def misspelt(name: str) -> str:
    """Without its last letter but one, which is nearest to the name itself."""
    return name[:-2] + name[-1] if len(name) > 3 else name + "_"


def functions_of(module: Any) -> Iterator[Any]:
    for name, x in vars(module).items():
        if not name.startswith("_") and inspect.isroutine(x) and x.__module__ == module.__name__:
            yield x


METHODS = (
    tk.PackedBatch.from_padded,
    tk.PackedBatch.to_padded,
    tk.Tree.from_trajectories,
    tk.Tree.leaf_weights,
    credit.Spec.gate,
    credit.Spec.asymmetric,
)
SETTINGS = {name: made for name, made in credit.PRESETS.items() if options_of(made)}


def public_calls() -> Iterator[Any]:
    yield from (x for x in (getattr(tk, name) for name in tk.__all__) if callable(x) and not hasattr(x, "_fields"))
    for name in modules(tk.recipes):
        yield from functions_of(importlib.import_module(f"trajkern.recipes.{name}"))
    yield from (tk.recipes.skillrl.SkillBank, tk.recipes.dro.Curriculum, tk.recipes.grpo, *METHODS)
    yield from (credit.Rollouts, credit.outcome, credit.spans, credit.directive, credit.divergence)
    yield from (credit.terms.Signs, credit.terms.OfTurns, credit.tree_terms.OfTree)
    for name in BY_ENABLING:
        adapter = importlib.import_module(f"trajkern.integrations.{name}")
        found = (getattr(adapter, x, None) for x in ("enable", "register", "enable_head", "enable_credit"))
        yield from (x for x in found if x is not None)


CALLS = dict(sorted((f"{x.__module__}.{x.__qualname__}", x) for x in public_calls() if options_of(x)))


@pytest.mark.parametrize("name", CALLS)
def test_a_misspelt_option_is_answered_by_the_call_it_was_meant_for(name: str) -> None:
    function = CALLS[name]
    for option in options_of(function):
        says = f"{function.__qualname__}() has no option '{misspelt(option)}'; did you mean '{option}'?"
        with pytest.raises(TypeError, match=f"^{re.escape(says)}$"):
            function(**{misspelt(option): None})


@pytest.mark.parametrize("name", SETTINGS)
def test_a_misspelt_setting_of_a_system(name: str) -> None:
    for option in options_of(SETTINGS[name]):
        with pytest.raises(TypeError, match=rf"^credit.recipe\('{name}'\) has no .*did you mean '{option}'\?$"):
            credit.recipe(name, **{misspelt(option): None})


def test_what_is_passed_on_is_not_blamed() -> None:
    """Another TypeError than that of an unknown name goes through, and without a near name all are listed."""
    with pytest.raises(TypeError, match="^hidden must be a tensor, got 3"):
        tk.linear_logprobs(3, 4, 5)
    with pytest.raises(TypeError, match=r"^whiten\(\) has no option 'zzz'; it takes .*\bmask\b"):
        tk.whiten(torch.zeros(3), zzz=1)
    with pytest.raises(TypeError, match="missing .* required positional argument"):
        tk.policy_loss(torch.zeros(3))


def test_the_head_s_options_are_seen() -> None:
    """By editors, which read signatures."""
    for function in (tk.linear_logprobs, tk.linear_token_stats, tk.linear_policy_loss, tk.linear_topk):
        assert {"temperature", "bias", "softcap", "logit_scale"} <= set(options_of(function)), function.__name__
    assert options_of(credit.PRESETS["dro"])[:4] == ["drop_fraction", "top_k", "worst_fraction", "span"]
    for made in (credit.outcome, credit.spans):  # their defaults are the terms'
        shown = inspect.signature(made).parameters
        assert {x: shown[x].default for x in credit.terms.GROUP} == {
            x: getattr(credit.terms.Compared, x) for x in credit.terms.GROUP
        }


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: tk.PolicyLoss("gropo"), r"got 'gropo'; did you mean 'grpo'\?$"),
        (lambda: tk.PolicyLoss("grpo", aggregate="token-mean"), r"got 'token-mean'; did you mean 'token_mean'\?$"),
        (lambda: tk.recipes.recipe("tree_rl"), r"got 'tree_rl'; did you mean 'treerl'\?$"),
        (lambda: credit.recipe("toolp"), r"got 'toolp'; did you mean 'toolpo'\?$"),
        (lambda: credit.outcome(within="tre"), r"got 'tre'; did you mean 'tree'\?$"),
        (lambda: credit.outcome("corect").check({"correct"}), r"they have correct; did you mean 'correct'\?$"),
        (
            lambda: credit.outcome().gate("wellformed").check({"reward", "flags:well_formed"}),
            r"did you mean 'well_formed'",
        ),
        (lambda: tk.use_backend("referense").__enter__(), r"did you mean 'reference'\?$"),
    ],
)
def test_a_misspelt_choice(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()
