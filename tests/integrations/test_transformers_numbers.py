"""A number behind the head, however a model holds it and however it is changed: the form is measured for what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.integrations.held_numbers import CHANGES, KINDS
from tests.integrations.test_transformers_heads import V, model_of, own_log_probs, packed
from trajkern.integrations.transformers import log_probs

transformers = pytest.importorskip("transformers")


class Divided(transformers.LlamaForCausalLM):
    """A model that divides its logits by a number which a module of it holds."""

    held: Callable[[Any], Any]

    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = output.logits / type(self).held(self)
        return output


class Nested(nn.Module):
    """What stands beside the body: a step, and a step in it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Identity())


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "the model": lambda m: m,
    "its body": lambda m: m.model,
    "its head": lambda m: m.lm_head,
    "a child": lambda m: m.after,
    "a step within a child": lambda m: m.after.inside[0],
}
SHAPES: dict[str, tuple[int, ...]] = {"0-d": (), "[1]": (1,), "[V]": (V,)}


def _divided(held: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    model = model_of("Llama")
    model.__class__, model.after = Divided, Nested()
    monkeypatch.setattr(Divided, "held", staticmethod(held), raising=False)
    return model


@torch.no_grad()
def _check(model: Any, x: float, name: str) -> None:
    actual, expected = log_probs(model, packed()), own_log_probs(model, packed())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, msg=lambda text: f"{name} to {x}: {text}")


def _places() -> Iterator[Any]:
    """Of each holder and kind a shape in `make test`, the others slow."""
    for n, (holder, kind, shape) in enumerate(product(HOLDERS, KINDS, SHAPES)):
        sampled = n % 3 == (n // 3 + n // 9) % 3
        yield pytest.param(holder, kind, shape, marks=[] if sampled else pytest.mark.slow)


@pytest.mark.parametrize(("holder", "kind", "shape"), [*_places()])
def test_a_tensor(holder: str, kind: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change several times in a drawn order; new tensors come to lie where older ones did."""
    held, made = HOLDERS[holder], SHAPES[shape]
    model = _divided(lambda m: held(m).by, monkeypatch)
    draw = np.random.default_rng(0)
    KINDS[kind](held(model), "by", torch.ones(made))
    for name in draw.permutation([*CHANGES] * 2):
        x = float(draw.uniform(0.3, 3))
        (CHANGES[name] or KINDS[kind])(held(model), "by", torch.full(made, x))
        _check(model, x, name)


@pytest.mark.parametrize("shape", ["0-d", "[1]"])
def test_a_tensor_of_inference_mode(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no version."""
    model = _divided(lambda m: m.by, monkeypatch)
    with torch.inference_mode():
        model.by = torch.ones(SHAPES[shape])
    for x in (0.5, 2.0, 3.0):
        with torch.inference_mode():
            model.by.fill_(x)
        _check(model, x, "in place")


def _entry(m: Any, x: float) -> None:
    m.how = {"logits": {"by": x}}


def _class_attribute(m: Any, x: float) -> None:
    type(m).by = x


OTHERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, float], None]]] = {
    "a number of the head's": (lambda m: m.lm_head.by, lambda m, x: setattr(m.lm_head, "by", x)),
    "a number within a child": (lambda m: m.after.inside.by, lambda m, x: setattr(m.after.inside, "by", x)),
    "a nested entry": (lambda m: m.how["logits"]["by"], _entry),
    "a tensor in a list": (lambda m: m.how[0], lambda m, x: setattr(m, "how", [torch.tensor([x])])),
    "an array": (lambda m: float(m.by), lambda m, x: setattr(m, "by", np.array([x]).reshape(()))),
    "the class's": (lambda m: m.by, _class_attribute),
    "a word of the config's": (lambda m: len(m.config.way), lambda m, x: setattr(m.config, "way", "." * int(10 * x))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_tensor_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held, change = OTHERS[name]
    model = _divided(held, monkeypatch)
    monkeypatch.setattr(Divided, "by", None, raising=False)
    draw = np.random.default_rng(0)
    for x in draw.uniform(0.3, 3, 12):
        change(model, float(x))
        _check(model, float(x), name)


def test_a_scale_that_begins_to_be_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _divided(lambda m: m.by, monkeypatch)
    model.by = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
    _check(model, 2.0, "frozen")
    model.by.requires_grad_()
    with pytest.raises(ValueError, match="model must have no trained parameters behind its head"):
        log_probs(model, packed())


def test_a_step_beside_the_body_that_is_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _divided(lambda m: m.after.inside(torch.tensor(2.0)), monkeypatch)
    _check(model, 2.0, "as it was made")
    handle = model.after.inside[0].register_forward_hook(lambda layer, inputs, output: output * 3)
    _check(model, 6.0, "hooked")
    handle.remove()
    _check(model, 2.0, "as it was made")


def test_training_measures_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of an optimizer on the head, the body and a gate of many numbers leave the form as it was."""
    heads = pytest.importorskip("trajkern.integrations._model_head")
    model = _divided(lambda m: m.by, monkeypatch)
    model.by, model.gate = torch.tensor([2.0]), nn.Parameter(torch.ones(32))
    measured: list[None] = []
    measure = heads._measure
    monkeypatch.setattr(heads, "_measure", lambda parts: (measured.append(None), measure(parts))[1])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        log_probs(model, packed()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(measured) == 1
