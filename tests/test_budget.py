"""The error budget itself: what passes because torch errs as much, and what does not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import trajkern as tk
from trajkern import reference
from trajkern.testing import SPECS
from trajkern.testing.numerics import BEYOND_LUCK, Outcome, budget_shares, cast, neighbours, run
from trajkern.testing.registry import Inputs, OpSpec

OPS = {spec.name: spec for spec in SPECS}
APART = (97, 89, 83, 79)  # inputs above the given ones by one part in so many: none of the budget's own neighbours
SEED = 1


def _erring(spec: OpSpec, inputs: Inputs, part: int, times: float) -> Outcome:
    """The exact result plus ``times`` the error that torch's expression has close by."""
    function = getattr(reference, spec.name)
    close = inputs | {name: inputs[name] * (1 + 1 / part) for name in spec.typed if name in inputs}
    right, found = run(spec, function, cast(close, torch.float64)), run(spec, function, close)
    exact = run(spec, function, cast(inputs, torch.float64))
    return {
        name: (x + times * (found[name].double() - right[name]).nan_to_num(0)).to(found[name].dtype)
        if x.is_floating_point()
        else x
        for name, x in exact.items()
    }


def _shares(names: tuple[str, ...], times: float) -> Iterator[tuple[str, float]]:
    for spec in map(OPS.__getitem__, names):
        for case in (case for case in spec.cases[::2] if not case.large):
            inputs = spec.inputs(case, torch.float32, seed=SEED)
            for part in APART:
                for name, share in budget_shares(spec, _erring(spec, inputs, part, times), inputs).items():
                    yield f"{spec.name} {case.name}: {name}", share


@pytest.mark.parametrize("name", ["token_stats", "linear_token_stats"])
def test_torch_itself_passes(name: str) -> None:
    assert not [x for x in _shares((name,), 1) if not x[1] <= 1]


def test_twice_the_error_of_torch_does_not() -> None:
    """Where a single number stands out it may; over some hundred results it is found several times."""
    assert len([x for x in _shares(("linear_token_stats", "token_stats"), 2) if not x[1] <= 1]) > 1


def test_what_the_float64_oracle_errs_by_itself_is_seen() -> None:
    """One weight of a group is 1, and its gradient 0, of which the oracle's float64 keeps a few roundings of 1 / s."""
    spec = OPS["variance_weights"]
    case = next(case for case in spec.cases if case.name == "unbiased")
    inputs = spec.inputs(case, torch.float64, seed=13)
    exact = run(spec, tk.variance_weights, inputs)
    assert max(budget_shares(spec, exact, inputs).values()) <= 1
    wrong = exact | {"grad_logprobs": exact["grad_logprobs"] + 3e-13}
    assert budget_shares(spec, wrong, inputs)["grad_logprobs"] > 1


def test_no_number_of_draws_forgives_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = OPS["token_logprobs"]
    inputs = spec.inputs(spec.cases[0], torch.float32)
    outcome = run(spec, reference.token_logprobs, inputs)
    wrong = outcome | {"logprobs": outcome["logprobs"] * (1 + 1e-5)}

    def drawn(*_) -> Iterator[Inputs]:
        yield pytest.fail("drawn in vain")

    monkeypatch.setattr("trajkern.testing.numerics.neighbours", drawn)
    assert budget_shares(spec, wrong, inputs)["logprobs"] > BEYOND_LUCK


def test_neighbours_keep_what_is_equal_zero_or_nan() -> None:
    spec = OPS["token_logprobs"]
    logits = torch.tensor([[1.5, 1.5, 0.0, -torch.inf, torch.nan]])
    for near in neighbours(spec, {"logits": logits, "targets": torch.tensor([1]), "temperature": 0.5}):
        x = near["logits"][0]
        assert x[0] == x[1] < 1.5 and x[2] == 0 and x[3] == -torch.inf and x[4].isnan()
        assert near["temperature"] == 0.5 and near["targets"].item() == 1 and x.dtype == logits.dtype
